"""Stop a run early, with a checkpoint to continue from: on Ctrl-C or SIGTERM, or when its loss is not finite.

In both cases it ends after a whole step, because a checkpoint holds no accumulated gradients.
"""

import copy
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from fairness_dft.training.module import FairFinetuning


def save_stopped_run(trainer: Trainer) -> Path:
    """Save a checkpoint of a run that is stopped, and return its file; every rank must call it."""
    folder = Path(trainer.log_dir or trainer.default_root_dir, "checkpoints")
    file = folder / f"stopped-step={trainer.global_step}.ckpt"
    trainer.save_checkpoint(file)
    return file


class GracefulStop(Callback):
    """Ends training after the step in which a signal arrives, with a checkpoint; a second signal ends it at once.

    A run that is resumed from it gives the results of one that was not stopped, up to rounding where noise is repeated.
    """

    def __init__(self) -> None:
        self.signal, self.step = 0, 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def stop(number: int, frame: FrameType | None) -> None:
            self.signal = number
            for other, handler in before.items():
                signal.signal(other, handler)
            if trainer.is_global_zero:  # not print, which a signal may have interrupted
                os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")

        self.signal, self.step = 0, trainer.global_step
        if not getattr(trainer, "fast_dev_run", False):  # Lightning puts its own handlers back after the fit
            before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        stepped, self.step = trainer.global_step > self.step, trainer.global_step
        if stepped:
            self.stop_if_asked(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop_if_asked(trainer)  # the signal arrived in the last validation

    def stop_if_asked(self, trainer: Trainer) -> None:
        """Save a checkpoint and end the run on all ranks, if any of them received a signal.

        Raises:
            SystemExit: On the first rank with 128 plus the number of the signal, on the others with 0.
        """
        if trainer.strategy.reduce_boolean_decision(self.signal > 0, all=False):
            file = save_stopped_run(trainer)
            if trainer.is_global_zero:
                print(f"stopped after step {trainer.global_step}; to continue, add --ckpt_path {file}", file=sys.stderr)
            raise SystemExit(128 + (self.signal or signal.SIGTERM) if trainer.is_global_zero else 0)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt | SIGTERMException) and trainer.is_global_zero:
            print("stopped at once, without another checkpoint", file=sys.stderr)


class SkipNonFiniteSteps(Callback):
    """Skips each optimizer step whose loss or gradient is not finite, on all ranks, and counts them.

    Neither the adapter nor the optimizer's moments change in such a step. After many in a row, training ends with a
    checkpoint of the last good state: adapter, average and optimizer before the last update, since the update itself
    may have broken them. `16-mixed` tries ever larger scales of the loss, so that it skips a step now and then, at the
    start more often.

    Args:
        patience: Number of skipped steps in a row that end the run.

    Attributes:
        skipped: Number of steps that were skipped.
    """

    def __init__(self, patience: int = 20) -> None:
        if patience < 1:
            raise ValueError(f"skip_non_finite_steps.patience must be at least 1, but got {patience}")
        self.patience = patience
        self.skipped, self.in_a_row = 0, 0
        self.finite = True
        self.good: dict[str, Any] = {}

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.finite &= bool(loss.isfinite())

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flags = [gradient.isfinite().all() for gradient in gradients]
        finite = self.finite and (not flags or bool(torch.stack(flags).all()))  # read from a GPU once
        self.finite = True
        if trainer.strategy.reduce_boolean_decision(not finite, all=False):
            for parameter in parameters:
                parameter.grad = None  # so that the optimizer leaves it as it is
            self.skipped += 1
            self.in_a_row += 1
        else:
            self.in_a_row = 0
            self.keep(cast(FairFinetuning, pl_module), optimizer)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        pl_module.log("skipped/steps", float(self.skipped), prog_bar=True)
        if self.in_a_row >= self.patience:
            self.in_a_row = 0
            self.restore(cast(FairFinetuning, pl_module))
            file = save_stopped_run(trainer)
            if not trainer.is_global_zero:
                raise SystemExit(0)
            raise ValueError(
                f"the loss or its gradient was not finite in {self.patience} steps in a row, which were skipped; the "
                f"last good adapter is in {file}: continue from there (--ckpt_path) with a smaller "
                "--model.learning_rate, or with --trainer.precision 32-true"
            )

    def keep(self, module: FairFinetuning, optimizer: Optimizer) -> None:
        """Copy the state that the optimizer step is about to change."""
        adapters = {name: module.adapter.state_dict(name) for name in ("trained", "ema")}
        self.good = copy.deepcopy({"adapters": adapters, "moments": optimizer.state_dict()}) | {"optimizer": optimizer}

    def restore(self, module: FairFinetuning) -> None:
        """Restore the copied state, if there is one."""
        if self.good:
            for name, state in self.good["adapters"].items():
                module.adapter.load_state_dict(state, name)
            self.good["optimizer"].load_state_dict(self.good["moments"])

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
