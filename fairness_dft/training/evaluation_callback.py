"""The base of callbacks that measure the original, the trained and the EMA model on the same noise."""

from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from fairness_dft.prompts.batches import PromptBatch
from fairness_dft.training.evaluation import Evaluation


class EvaluationCallback(Callback):
    """A callback that does the same in validation and in test: it measures images and changes nothing."""

    def start(self, trainer: Trainer, module: Evaluation, stage: str) -> None:
        """Prepare for a validation or test, before its first batch.

        Args:
            trainer: The trainer.
            module: What samples the images.
            stage: `validation` or `test`.
        """

    def see(self, module: Evaluation, images: dict[str, Tensor], batch: PromptBatch) -> None:
        """Measure the images of one batch.

        Args:
            module: What sampled the images.
            images: The images of each model, with shape (N, 3, H, W), in [0, 1].
            batch: Their prompt, and the seeds of their noise.
        """

    def finish(self, trainer: Trainer, module: Evaluation, stage: str) -> None:
        """Log what was measured, after the last batch.

        Args:
            trainer: The trainer.
            module: What sampled the images.
            stage: `validation` or `test`.
        """

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start(trainer, cast(Evaluation, pl_module), "validation")

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        self.see(cast(Evaluation, pl_module), outputs, batch)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finish(trainer, cast(Evaluation, pl_module), "validation")

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start(trainer, cast(Evaluation, pl_module), "test")

    @override
    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        self.see(cast(Evaluation, pl_module), outputs, batch)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finish(trainer, cast(Evaluation, pl_module), "test")


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a trainer, an attribute that Lightning does not declare."""
    callbacks: list[Callback] = vars(trainer)["callbacks"]
    return callbacks
