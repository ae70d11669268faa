"""Finetune a model and measure it: `python -m fairness_dft.fit --config experiments/quickstart.yaml`."""

if __name__ == "__main__":  # answers before the imports, which take seconds
    from fairness_dft.cli.help import answer_help

    answer_help("fit")

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType
from lightning.pytorch.loggers import TensorBoardLogger

from fairness_dft.alignment.targets import check_names
from fairness_dft.attributes import Attribute
from fairness_dft.cli.commands import run_main
from fairness_dft.cli.lightning_cli import FairnessCLI
from fairness_dft.cli.memory import telling_what_saves_memory
from fairness_dft.prompts.datamodule import PromptModule
from fairness_dft.prompts.files import SPLITS, normalize
from fairness_dft.reports.results import RunFacts
from fairness_dft.reports.tables import print_results
from fairness_dft.training.bias_monitor import BiasMonitor
from fairness_dft.training.callbacks import AdapterAverage
from fairness_dft.training.dashboard import final_metrics
from fairness_dft.training.image_grid import ImageGrid
from fairness_dft.training.plan import print_plan
from fairness_dft.training.quality_monitor import QualityMonitor, model_name, results_of_test

SEEN = "the test does not measure unseen prompts; a JSON file separates the two (data/prompts/README.md)"


def main(args: ArgsType = None) -> None:
    """Train, test on the test prompts, and write the results into the run's folder; with `--plan` only measure.

    Raises:
        ValueError: In one line, for every mistake of the user.
    """
    cli = FairnessCLI(args)
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    unused = {"validation": trainer.limit_val_batches == 0, "test": trainer.limit_test_batches == 0}
    data.check([split for split in SPLITS if not unused.get(split)], trainer.world_size)
    check_targets(module.attribute, data, [split for split in SPLITS if not unused.get(split)])
    seen = [] if unused["test"] else tested_and_trained(data)
    if seen and trainer.is_global_zero:
        print(f"warning: {len(seen)} test prompts are also trained on, such as {seen[0]!r}: {SEEN}", file=sys.stderr)
    if not module.generator.trainable:
        raise ValueError(
            f"--model.generator: {type(module.generator).__name__} can only be audited; use "
            "fairness_dft.diffusion.StableDiffusion to finetune"
        )
    module.generator.check()
    callbacks: list[Any] = vars(trainer)["callbacks"]  # Trainer does not declare it
    find = {type(callback): callback for callback in callbacks}
    find[AdapterAverage].check(trainer.max_steps)
    module.check_end(trainer.max_steps, trainer.max_epochs)
    for monitor in (find[BiasMonitor], find[QualityMonitor]):
        monitor.load()  # small networks first, so that their errors come before the large ones load
    module.judge.load()
    tested = [] if unused["test"] else data.prompts("test")
    find[BiasMonitor].watch_named(tested)
    find[BiasMonitor].check_names(tested, module.judge)
    check_names(module.attribute, module.judge.classes, data.prompts("train"))
    module.configure_model()
    if cli.config.plan:
        with telling_what_saves_memory(module, data):
            print_plan(trainer, cli.config_init.trainer, module, data)
        return
    started = time.monotonic()
    with telling_what_saves_memory(module, data):
        trainer.fit(module, data, ckpt_path=cli.config.ckpt_path)
    trained = time.monotonic()
    if unused["test"]:
        return  # the user asked for no measurement
    with telling_what_saves_memory(module, data):
        trainer.test(module, data, verbose=False)
    log_dir = trainer.log_dir  # a broadcast: every rank must ask
    if not trainer.is_global_zero or log_dir is None:
        return
    run = RunFacts.here(
        model=model_name(module),
        images_per_prompt=data.test_images_per_prompt,
        seconds=round(time.monotonic() - trained, 1),
        steps=trainer.global_step,
        training_seconds=round(trained - started, 1),
        training_images_per_prompt=data.images_per_prompt,
        test_prompts_trained_on=tuple(seen),
    )
    results = results_of_test(module, data.prompts("test"), run)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(hyperparameters(cli.config), final_metrics(results))
    folder = Path(log_dir)
    results.write(folder / "results.json")
    find[BiasMonitor].image_table(module, data.prompts("test")).write(folder / "per_image.csv")
    print_results(results)
    print(f"Images:  {find[ImageGrid].file}\nResults: {folder / 'results.json'} and per_image.csv")
    if trainer.loggers:
        print(f"Curves:  tensorboard --logdir {folder.parent}")


def hyperparameters(config: Namespace) -> dict[str, str]:
    """Return the settings in which runs differ most, by short names, as text."""
    keys = {
        "attributes": "model.attribute.name",
        "adapter": "model.adapter.class_path",
        "learning_rate": "model.learning_rate",
        "semantics_weight": "model.semantics_weight",
        "images_per_prompt": "data.init_args.images_per_prompt",
        "steps": "trainer.max_steps",
        "seed": "seed_everything",
    }
    return {name: str(config.get(key)).removeprefix("fairness_dft.") for name, key in keys.items()}


def check_targets(attribute: Attribute, data: PromptModule, splits: Sequence[str]) -> None:
    """Refuse a target whose key is not a prompt, subject or concept.

    Raises:
        ValueError: If there is one.
    """
    known = {key for split in splits for prompt in data.prompts(split) for key in prompt}
    if unknown := [key for key in attribute.targets if key not in known]:
        concepts = ", ".join(sorted({prompt.concept for split in splits for prompt in data.prompts(split)}))
        raise ValueError(
            f"--model.attribute.targets: {unknown[0]!r} is not a prompt, subject or concept of the prompts; "
            f"their concepts are {concepts}"
        )


def tested_and_trained(data: PromptModule) -> list[str]:
    """Return the test prompts that are also training prompts, as all prompts of a plain text file are."""
    trained = {normalize(prompt.text) for prompt in data.prompts("train")}
    return [prompt.text for prompt in data.prompts("test") if normalize(prompt.text) in trained]


if __name__ == "__main__":
    run_main(main)
