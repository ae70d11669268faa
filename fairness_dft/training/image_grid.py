"""Images of the base model and the finetuned model from the same prompts and noise, in TensorBoard and as a file."""

from pathlib import Path

import torch
from lightning import Trainer
from torch import Tensor
from typing_extensions import override

from fairness_dft.files import replacing
from fairness_dft.prompts.batches import PromptBatch
from fairness_dft.reports.grid import GridRow, GridSide, comparison_grid
from fairness_dft.training.evaluation import Evaluation
from fairness_dft.training.evaluation_callback import EvaluationCallback


class ImageGrid(EvaluationCallback):
    """Shows images of the base and the finetuned model from the same noise, in TensorBoard and as a file.

    Args:
        prompts: Number of prompts, one per row.
        images: Number of images of each model in a row.

    Attributes:
        file: The image file that the test wrote.
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
        log_dir = trainer.log_dir  # a broadcast, which every rank must join
        if not trainer.is_global_zero or not self.rows:
            return
        grid = comparison_grid(self.rows, {name: module.judge.classes(name) for name in module.attribute.names})
        if log_dir is not None and stage == "test":
            self.file = Path(log_dir, "before_after.png")
            with replacing(self.file) as draft:
                grid.save(draft)
        for logger in trainer.loggers:
            writer = getattr(logger, "experiment", None)
            if writer is not None and hasattr(writer, "add_image"):
                import numpy as np

                writer.add_image(f"before_after/{stage}", np.asarray(grid), trainer.global_step, dataformats="HWC")
