"""Images of the same prompts and noise before and after, in TensorBoard and as a file."""

from pathlib import Path

import torch
from lightning import Trainer
from torch import Tensor
from typing_extensions import override

from fairness_dft.prompts.batches import PromptBatch
from fairness_dft.reports.grid import GridRow, GridSide, comparison_grid
from fairness_dft.training.evaluation import Evaluation
from fairness_dft.training.evaluation_callback import EvaluationCallback


class ImageGrid(EvaluationCallback):
    """Pictures of the same prompts from the same noise, before and after, in TensorBoard and as a file.

    Args:
        prompts: how many prompts, one a row.
        images: how many images of each model in a row.

    Attributes:
        file: the picture that the test wrote.
    """

    def __init__(self, prompts: int = 6, images: int = 12) -> None:
        self.prompts, self.images = prompts, images
        self.rows: list[GridRow] = []
        self.file: Path | None = None

    @override
    def start(self, trainer: Trainer, module: Evaluation, stage: str) -> None:
        self.rows = []

    @override
    @torch.no_grad()
    def see(self, module: Evaluation, images: dict[str, Tensor], batch: PromptBatch) -> None:
        if len(self.rows) >= self.prompts or not module.trainer.is_global_zero:
            return
        row = GridRow(batch.prompt.text)
        for model in [model for model in ("original", "ema") if model in images]:
            pictures = images[model][: self.images]
            verdict = module.judge(pictures)
            classes = [verdict.classes(name).cpu() for name in module.attribute.names]
            row.sides[model] = GridSide(pictures.float().cpu(), torch.stack(classes, 1), verdict.has_face.cpu())
        self.rows.append(row)

    @override
    def finish(self, trainer: Trainer, module: Evaluation, stage: str) -> None:
        log_dir = trainer.log_dir  # a broadcast: every rank must ask
        if not trainer.is_global_zero or not self.rows:
            return
        grid = comparison_grid(self.rows, {name: module.judge.classes(name) for name in module.attribute.names})
        if log_dir is not None and stage == "test":
            self.file = Path(log_dir, "before_after.png")
            self.file.parent.mkdir(parents=True, exist_ok=True)
            grid.save(self.file)
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_image"):
                import numpy as np

                logger.experiment.add_image(
                    f"before_after/{stage}", np.asarray(grid), trainer.global_step, dataformats="HWC"
                )
