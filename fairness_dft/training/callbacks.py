"""Callbacks of a training: the average of the adapter, exported adapters, throughput, the progress bar."""

import time
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override

from fairness_dft.prompts.batches import PromptBatch
from fairness_dft.training.module import FairFinetuning


class AdapterAverage(Callback):
    """Exponential moving average of the adapter, after every optimizer step.

    Only the adapter is averaged. The average is in the model and in the checkpoint, beside the trained adapter.

    Args:
        decay: Share of the average that each step keeps, in [0, 1) (paper: 0.996).
        start: If given, the average is the plain mean of the adapters of all steps, which restarts at this share of the
            run, in [0, 1). After 1 / (1 - decay) steps, the decay forgets the oldest. A short run can so average its
            second half.
    """

    def __init__(self, decay: float = 0.996, start: float | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"adapter_average.decay must be at least 0 and below 1, but got {decay}")
        if start is not None and not 0 <= start < 1:
            raise ValueError(f"adapter_average.start must be at least 0 and below 1, but got {start}")
        self.decay, self.start = decay, start
        self.averaged_steps = 0

    def check(self, max_steps: int) -> None:
        """Refuse a share of a run whose length is not known.

        Raises:
            ValueError: If `start` is given and the trainer's `max_steps` is not.
        """
        if self.start is not None and max_steps < 0:
            raise ValueError("adapter_average.start is a share of trainer.max_steps: give that too, or start: null")

    def decay_at(self, step: int, max_steps: int) -> float:
        """Return the share of the average that an optimizer step keeps.

        Args:
            step: Number of the step, from 1.
            max_steps: Steps of the run.
        """
        if self.start is None:
            return self.decay
        begin = int(self.start * max_steps)
        since = step - begin if step > begin else step
        return min(self.decay, (since - 1) / since)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step > self.averaged_steps:
            self.averaged_steps = trainer.global_step
            decay = self.decay_at(trainer.global_step, trainer.max_steps)
            cast(FairFinetuning, pl_module).adapter.update_ema(decay)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"averaged_steps": self.averaged_steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.averaged_steps = state_dict["averaged_steps"]


class AdapterCheckpoint(Callback):
    """Exports the trained and the averaged adapter for diffusers, as safetensors, at every validation and at the end.

    The files are in adapters/step_000200/{trained,ema}/ in the run's folder.
    """

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer, cast(FairFinetuning, pl_module))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer, cast(FairFinetuning, pl_module))

    def save(self, trainer: Trainer, module: FairFinetuning) -> None:
        """Write both adapters, on the first rank."""
        log_dir = trainer.log_dir  # a broadcast, which every rank must join
        if trainer.is_global_zero and log_dir is not None and not getattr(trainer, "fast_dev_run", False):
            folder = Path(log_dir, "adapters", f"step_{trainer.global_step:06d}")
            for name in ("trained", "ema"):
                module.adapter.save(folder / name, name)


class Throughput(Callback):
    """Logs images per second over whole training steps, backward pass included, and shows them in the progress bar."""

    def __init__(self) -> None:
        self.started = 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.started = time.monotonic()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, *args: Any
    ) -> None:
        images = len(batch.seeds) * trainer.world_size
        pl_module.log("speed/images_per_second", images / (time.monotonic() - self.started), prog_bar=True)


class StepBar(TQDMProgressBar):
    """One progress bar for the whole training, in optimizer steps; Lightning's own restarts in every epoch.

    It shows the loss, the bias of the batch, the bias that a fair model has in as few images, and the speed.
    """

    short = {
        "loss/total": "loss",
        "batch/bias": "bias",
        "batch/floor": "floor",
        "speed/images_per_second": "images/s",
        "skipped/steps": "skipped",
    }

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if not metrics.get("skipped/steps"):
            metrics.pop("skipped/steps", None)
        return {self.short.get(name, name): value for name, value in metrics.items()}

    @override
    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.max_steps < 0:  # the run's length is given in epochs
            return super().on_train_epoch_start(trainer, *args)
        bar = self.train_progress_bar
        if bar.total is None:
            bar.total, bar.initial, bar.n = trainer.max_steps, trainer.global_step, trainer.global_step
            bar.set_description("Finetuning")

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.max_steps < 0:
            return super().on_train_batch_end(trainer, pl_module, *args)
        bar = self.train_progress_bar
        bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        bar.update(trainer.global_step - bar.n)
