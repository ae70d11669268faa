"""Train an attribute classifier: `python -m fairness_dft.train_classifier`.

One network, any image classifier of Hugging Face, has a head for each attribute (`gender/man`, `gender/woman`, …). The
best epoch on the validation split is kept, calibrated and tested, and saved in Hugging Face's layout with a model card.
"""

if __name__ == "__main__":  # answers before the imports, which take seconds
    from fairness_dft.cli.help import answer_help

    answer_help("train_classifier")

import json
import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from typing_extensions import override

from fairness_dft.classifiers.calibration import at_a_bound, head_figures
from fairness_dft.classifiers.training import ClassifierTraining
from fairness_dft.cli.commands import new_folder, resumable, run_main
from fairness_dft.cli.lightning_cli import OneLineCLI
from fairness_dft.datasets.base import SPLITS, LabelledFaces
from fairness_dft.files import filling, resolve
from fairness_dft.reports.classifier_card import model_card, table
from fairness_dft.training.interruption import GracefulStop


class ClassifierCLI(OneLineCLI):
    """Build training, data and trainer from YAML files and flags."""

    def __init__(self, args: ArgsType = None) -> None:
        self.best = ModelCheckpoint(
            monitor="validation/balanced_accuracy",
            mode="max",
            filename="best",
            save_last=True,
            enable_version_counter=False,
        )
        example = "--config experiments/classifiers/training.yaml --output classifiers/training"
        defaults = {"callbacks": [self.best, GracefulStop()], "use_distributed_sampler": False}
        super().__init__("train_classifier", ClassifierTraining, LabelledFaces, args, example, defaults)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=str, required=True, help="Folder for the classifier; it must be new.")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Checkpoint to resume from.")
        parser.set_defaults({"trainer.max_epochs": 10})

    @override
    def before_instantiate_classes(self) -> None:
        output, checkpoint = Path(self.config.output), self.config.ckpt_path
        if checkpoint is not None:
            resumable(Path(checkpoint))
        if checkpoint is None or not Path(checkpoint).resolve().is_relative_to(output.resolve()):
            new_folder(output)
        self.save_config_kwargs["overwrite"] = checkpoint is not None  # a resumed training describes itself again
        self.config.trainer.default_root_dir = str(output / "training")
        self.best.dirpath = str(output / "training" / "checkpoints")


def main(args: ArgsType = None) -> None:
    """Train, keep the best epoch, calibrate, test and save.

    Raises:
        ValueError: In one line, for what the user can fix.
    """
    cli = ClassifierCLI(args)
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise ValueError("--trainer.max_epochs must be given, since the learning rate falls to zero by the end")
    if 0 in (trainer.limit_val_batches, trainer.limit_test_batches):
        raise ValueError(
            "--trainer.limit_val_batches and limit_test_batches must not be 0: the saved classifier is measured"
        )
    data.read()
    module.load(data)
    try:
        trainer.fit(module, data, ckpt_path=cli.config.ckpt_path)
        if cli.best.best_model_path:
            module.load_state_dict(
                torch.load(cli.best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
            )
        trainer.validate(module, data, verbose=False)
        temperatures = module.calibrate()
        trainer.test(module, data, verbose=False)
    except ValueError as error:  # a data worker reports a broken image with its whole traceback
        messages = re.findall(r"ValueError: (--data: .*)", str(error)) or [str(error)]
        raise ValueError(messages[-1]) from error
    heads = {}
    for head, classes in module.heads.items():
        logits, labels = module.verdicts[head]
        heads[head] = head_figures(logits, labels, classes)
    before = {
        head: head_figures(logits * temperatures[head], labels, module.heads[head])["calibration_error"]
        for head, (logits, labels) in module.verdicts.items()
    }
    figures = {
        "split": data.tested,
        "pictures": {name: len(data.pictures[name]) for name in SPLITS},
        "temperature": temperatures,
        "calibration_error_before": before,
        "heads": heads,
    }
    if trainer.is_global_zero:
        save(cli, figures)
        print(table(figures), *at_a_bound(temperatures), sep="\n")
        print(f"Classifier: {cli.config.output}")


def save(cli: ClassifierCLI, figures: dict[str, Any]) -> None:
    """Write the classifier in Hugging Face's layout, its figures and its model card, all at once."""
    module, data, folder = cli.model, cli.datamodule, Path(cli.config.output)
    start = resolve(module.backbone)
    random = not module.pretrained or (start.is_dir() and not any(start.glob("*.safetensors")))
    started = None if random else start.name if start.is_dir() else module.backbone
    hidden = ("folder", "workers", "classes")
    arguments = {k: v for k, v in cli.config.data.init_args.items() if k not in hidden and v is not None}
    training = {k: v for k, v in cli.config.model.items() if k != "backbone"}
    settings = {**arguments, **training, "epochs": cli.trainer.current_epoch, "seed": cli.config.seed_everything}
    card = model_card(type(module.network).__name__, started, type(data).__name__, settings, figures)
    with filling(folder) as draft:
        module.network.save_pretrained(draft, safe_serialization=True)
        for name, text in (
            ("preprocessor_config.json", json.dumps(module.preparation, indent=1) + "\n"),
            ("metrics.json", json.dumps(figures, indent=1, allow_nan=False) + "\n"),
            ("README.md", card),
        ):
            (draft / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
