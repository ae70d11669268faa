"""Diagnose the gradient: `python -m fairness_dft.diagnose --config experiments/gender.yaml`.

Accepts the settings of `fairness_dft.fit`. It answers two questions, each with a figure and a table: how much each
sampling step contributes to the gradient, exactly and without the coupling of the steps (Fig. 1b of the paper), and how
well the gradients of independent training batches agree, for each gradient path and at the same cost. Both use one
prompt, the first training prompt or that of `--prompt`, because the gradients of different prompts may cancel.
"""

if __name__ == "__main__":  # answers before the imports, which take seconds
    from fairness_dft.cli.help import answer_help

    answer_help("diagnose")

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from fairness_dft.alignment.targets import check_names
from fairness_dft.cli.commands import new_folder, run_main
from fairness_dft.cli.lightning_cli import MONITORS, FairnessCLI
from fairness_dft.prompts.batches import PromptBatch
from fairness_dft.prompts.files import Prompt
from fairness_dft.randomness import Stream, hashed_generator
from fairness_dft.reports.csv_tables import write_table
from fairness_dft.reports.gradients import (
    PARTS,
    draw_paths,
    draw_steps,
    paths_row,
    print_paths,
)
from fairness_dft.sampling.diagnosis import (
    DEVIATION,
    PATHS,
    GradientStatistics,
    clipped,
    flatten,
    passes,
    step_gradients,
)
from fairness_dft.training.evaluation_callback import callbacks_of
from fairness_dft.training.fairness_loss import FairnessLoss

PROMPT_HELP = "A training prompt, its subject, or any other text; the first training prompt by default."


class Diagnosis(FairnessLoss):
    """An evaluation that computes the gradients of training batches.

    Attributes:
        gradients: The gradient of each batch so far, with shape (P,), on the CPU.
    """

    gradients: list[Tensor] = []

    @override
    def on_test_start(self) -> None:
        self.gradients = []

    @override
    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Tensor]:
        parameters = self.adapter.parameters()
        with torch.enable_grad():
            loss = self.loss(batch, hashed_generator(self.seed, Stream.STEP, batch_idx))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        self.gradients.append(flatten(gradients, parameters).cpu())
        return {}  # no images, as nothing measures them


class DiagnoseCLI(FairnessCLI):
    """The settings of `fairness_dft.fit`, and those of a diagnosis.

    Raises:
        ValueError: In one line, for any mistake in the configuration, before a model is loaded.
    """

    def __init__(self, args: ArgsType = None) -> None:
        example = "--config experiments/gender.yaml --config experiments/parts/portraits.yaml"
        super().__init__(args, "diagnose", Diagnosis, example)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"output": "diagnoses"})
        parser.add_argument(
            "--noises", type=int, default=8, help="Number of initial noises in the figure of the steps."
        )
        parser.add_argument("--batches", type=int, default=16, help="Number of training batches to compare.")
        parser.add_argument("--prompt", type=str | None, default=None, help=PROMPT_HELP)

    @property
    def folder(self) -> Path:
        """The diagnosis's folder."""
        return Path(self.config.output, self.config.name)

    @override
    def before_instantiate_classes(self) -> None:
        for name in ("noises", "batches"):
            if self.config[name] < 2:
                raise ValueError(f"--{name} must be at least 2, but is {self.config[name]}")
        if self.config.ckpt_path is not None:
            raise ValueError("--ckpt_path: a diagnosis starts from a new adapter and reads no checkpoint")
        new_folder(self.folder)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.trainer_defaults["callbacks"] = []
        settings = {"logger": False, "default_root_dir": str(self.folder), "enable_checkpointing": False}
        settings |= {"inference_mode": False, "limit_test_batches": self.config.batches}
        return super(FairnessCLI, self).instantiate_trainer(**kwargs, **settings)


def main(args: ArgsType = None) -> None:
    """Compute the gradients, and write figures and tables into the diagnosis's folder.

    Raises:
        ValueError: In one line, for anything that the user can fix.
    """
    cli = DiagnoseCLI(args)
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    if trainer.world_size > 1:
        raise ValueError(f"--trainer.devices: a diagnosis takes one device, but got {trainer.world_size}")
    data.check(["train"], 1)
    prompt = chosen_prompt(data.prompts("train"), cli.config.prompt)
    print(f"Prompt:   {prompt.text!r}")
    data.limits["train"], data.noise_pool = 1, None
    module.sampler.steps_max = module.sampler.steps  # one T, so that costs can be compared
    loader = data.train_dataloader()  # each pass continues with fresh noise
    batches = [replace(batch, prompt=prompt) for _ in range(cli.config.batches) for batch in loader]
    callbacks = callbacks_of(trainer)
    callbacks[:] = [callback for callback in callbacks if not isinstance(callback, tuple(MONITORS.values()))]
    module.generator.check()
    module.judge.load()
    check_names(module.attribute, module.judge.classes, [prompt])
    module.configure_model()
    statistics = compare_paths(trainer, module, batches)
    norms = steps_table(module.to(trainer.strategy.root_device), prompt.text, cli.config.noises)

    folder = cli.folder
    write_table(folder / "steps.csv", ["noise", "timestep", "coefficient", *PARTS], norms)
    rows = [paths_row(name, values, cost, module.sampler.steps) for name, (values, cost) in statistics.items()]
    write_table(folder / "paths.csv", list(rows[0]), [list(row.values()) for row in rows])
    draw_steps(folder / "steps.png", norms, prompt.text)
    draw_paths(folder / "paths.png", rows)
    print_paths(rows)
    print(f"Figures:  {folder / 'steps.png'} and {folder / 'paths.png'}\nTables:   steps.csv and paths.csv beside them")


def chosen_prompt(known: Sequence[Prompt], wanted: str | None) -> Prompt:
    """Return the first training prompt, the one with this text or subject, or a new one with this text."""
    if wanted is None:
        return known[0]
    return next((prompt for prompt in known if wanted in (prompt.text, prompt.subject)), Prompt(wanted, wanted, "own"))


def compare_paths(
    trainer: Trainer, module: Diagnosis, batches: Sequence[PromptBatch]
) -> dict[str, tuple[GradientStatistics, float]]:
    """Return for each gradient path how its gradients of the batches relate, and the cost of one in network passes."""
    statistics: dict[str, tuple[GradientStatistics, float]] = {}
    steps = module.sampler.steps
    loader: DataLoader[PromptBatch] = DataLoader(cast(Any, batches), batch_size=None, collate_fn=lambda batch: batch)
    for name, path in PATHS.items():
        if path.count is not None and path.count > steps:
            continue
        module.sampler.gradient = path
        trainer.test(module, dataloaders=loader, verbose=False)
        gradients = torch.stack(module.gradients)
        statistics[name] = GradientStatistics.of(gradients), passes(path, steps)
        if name == "naive":
            statistics["naive, clipped"] = GradientStatistics.of(clipped(gradients)), passes(path, steps)
    return statistics


def steps_table(module: Diagnosis, prompt: str, noises: int) -> list[list[float]]:
    """Return a row for each noise and sampling step: noise, timestep, k_t, and the norms of `StepGradient.norms`."""
    rows, sampler = [], module.sampler
    for number in range(noises):
        noise = module.generator.noise(torch.tensor([number]))
        random = hashed_generator(module.seed, Stream.DIAGNOSIS, number)
        direction = DEVIATION * torch.randn(noise.shape, generator=random).to(noise)
        with module.adapter.using("trained"):
            for step in step_gradients(
                module.generator, module.adapter, prompt, noise, direction, sampler.steps, sampler.guidance_scale
            ):
                rows.append([number, step.timestep, step.coefficient, *step.norms()])
    return rows


if __name__ == "__main__":
    run_main(main)
