"""The base of callbacks that watch the original, trained and EMA model on the same noise."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from fairness_dft.prompts.batches import PromptBatch
from fairness_dft.training.evaluation import Evaluation


class EvaluationCallback(Callback):
    """A callback that does the same in validation and in test."""

    def start(self, trainer: Trainer, module: Evaluation, stage: str) -> None:
        """Before the first batch; stage is "validation" or "test"."""

    def see(self, module: Evaluation, images: dict[str, Tensor], batch: PromptBatch) -> None:
        """Images of each model, with shape (N, 3, H, W), in [0, 1], from the batch's prompt and noise."""

    def finish(self, trainer: Trainer, module: Evaluation, stage: str) -> None:
        """After the last batch."""

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start(trainer, pl_module, "validation")

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        self.see(pl_module, outputs, batch)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finish(trainer, pl_module, "validation")

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start(trainer, pl_module, "test")

    @override
    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        self.see(pl_module, outputs, batch)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finish(trainer, pl_module, "test")
