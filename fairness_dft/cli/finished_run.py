"""Open a finished run on this machine, for the commands that draw with it or export it."""

import json
from pathlib import Path
from typing import Any

from fairness_dft.cli.lightning_cli import FairnessCLI
from fairness_dft.training.finished_run import Average, FinishedRun
from fairness_dft.training.module import FairFinetuning

HERE = ("accelerator=auto", "devices=1", "num_nodes=1", "strategy=auto", "logger=false")


def build(run: FinishedRun, output: str) -> FairnessCLI:
    """Build a run's module and a trainer for this machine; nothing is loaded yet, and prompts are not looked for.

    Args:
        run: The run.
        output: A folder that can be written.

    Raises:
        ValueError: If its settings cannot be read.
    """
    settings = run.settings()
    kept: dict[str, Any] = {key: settings[key] for key in ("model", "seed_everything") if key in settings}
    kept["trainer"] = {"precision": settings.get("trainer", {}).get("precision")}
    here = [f"--trainer.{setting}" for setting in HERE]
    data = "--data=fairness_dft.prompts.OccupationPrompts"
    return FairnessCLI([f"--config={json.dumps(kept)}", data, *here, f"--output={output}"])


def load_adapter(module: FairFinetuning, folder: Path, name: Average, scale: float) -> FairFinetuning:
    """Load the base model and a run's adapter.

    Raises:
        ValueError: If one of them cannot be loaded, or the adapter cannot be scaled.
    """
    if scale != 1 and not module.adapter.scalable:
        raise ValueError(f"--scale: {type(module.adapter).__name__} has no strength to change: leave it at 1")
    module.generator.load()
    module.adapter.attach(module.generator)
    module.adapter.load(folder, name)
    module.adapter.rescale(scale, name)
    return module
