"""How a run is stopped early: Ctrl-C or SIGTERM ends training after a whole step, with a checkpoint to go on from."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override


class GracefulStop(Callback):
    """Ends training after the step in which a signal came, with a checkpoint; a second signal ends it at once.

    A whole step, because a checkpoint holds no accumulated gradients: so a resumed run is the one that was not stopped.
    """

    def __init__(self) -> None:
        self.signal, self.step = 0, 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def stop(number: int, frame: FrameType | None) -> None:
            self.signal = number
            for each, handler in before.items():
                signal.signal(each, handler)
            if trainer.is_global_zero:  # not print, which a signal may have interrupted
                os.write(2, b"\nstopping after this step; once more to stop at once\n")

        self.signal, self.step = 0, trainer.global_step
        if not trainer.fast_dev_run:  # Lightning puts its own handlers back after the fit
            before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        stepped, self.step = trainer.global_step > self.step, trainer.global_step
        if stepped:
            self.obey(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.obey(trainer)  # the signal came in the last validation

    def obey(self, trainer: Trainer) -> None:
        """Save a checkpoint and end the run on all ranks, if any of them got a signal.

        Raises:
            SystemExit: with a status that tells the signal, on the first rank.
        """
        if trainer.strategy.reduce_boolean_decision(self.signal > 0, all=False):
            folder = Path(trainer.log_dir or trainer.default_root_dir, "checkpoints")
            file = folder / f"stopped-step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(file)
            if trainer.is_global_zero:
                print(f"stopped after step {trainer.global_step}; to go on, add --ckpt_path {file}", file=sys.stderr)
            raise SystemExit(128 + (self.signal or signal.SIGTERM) if trainer.is_global_zero else 0)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt | SIGTERMException) and trainer.is_global_zero:
            print("stopped at once, without another checkpoint", file=sys.stderr)
