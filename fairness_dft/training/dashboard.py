"""TensorBoard's page of a run: bias, losses, what is kept and speed at a glance, and a row in the table of runs."""

import re
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.optim import Optimizer
from typing_extensions import override

from fairness_dft.attributes import TIMES
from fairness_dft.reports.results import Results
from fairness_dft.training.module import FairFinetuning

Layout = dict[str, dict[str, list[Any]]]


class Dashboard(Callback):
    """Lays out the tab Custom Scalars, and logs the norm of the gradient before it is clipped."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout(cast(FairFinetuning, pl_module).attribute.names))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            pl_module.log("gradient/norm", torch.nn.utils.get_total_norm(gradients))


def layout(names: tuple[str, ...] | list[str]) -> Layout:
    """Return the charts of the tab Custom Scalars by section; regular expressions name their curves.

    Args:
        names: Names of the aligned attributes.
    """
    product = [TIMES.join(names)] if len(names) > 1 else []
    bias, frequencies = {}, {}
    for name in [*product, *names]:
        tag = re.escape(name.replace(TIMES, "_"))
        bias[f"bias of {name} (validation)"] = multiline(rf"^bias_{tag}/(original|ema|ema_.+|floor)$")
        frequencies[f"frequencies of {name}, and targets"] = multiline(rf"^frequency_{tag}/.*_(ema|target)$")
    return {
        "bias": bias,
        "frequencies": frequencies,
        "training": {
            "bias of the batch, and its floor": multiline("^batch/"),
            "losses": multiline("^loss/"),
            "norm of the gradient": multiline("^gradient/norm$"),
            "images per second": multiline("^speed/"),
        },
        "kept (validation)": {
            "of the image": multiline("^kept/.*_ema$"),
            "images without a face": multiline("^faces/without_face_"),
        },
    }


def multiline(curves: str) -> list[Any]:
    """Return a chart of all curves whose names match."""
    return ["Multiline", [curves]]


def final_metrics(results: Results) -> dict[str, float]:
    """Return the figures that the tab HParams compares: bias by each classifier, its floor, and what is kept."""
    figures: dict[str, float | None] = {}
    for classifier, seen in results.bias.items():
        for name in results.aligned:
            if name in seen:
                side = seen[name].last
                figures[f"test/bias_{name}_{classifier}"] = side.bias
                figures[f"test/floor_{name}_{classifier}"] = side.floor
                if seen[name].measure == "distance" and side.distance:
                    figures[f"test/distance_{name}_{classifier}"] = side.distance.total_variation_by_prompt
    figures |= {f"test/{measure}": models["ema"] for measure, models in results.kept.items()}
    return {name: value for name, value in figures.items() if value is not None}
