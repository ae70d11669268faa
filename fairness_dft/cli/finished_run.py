"""What a finished run left behind: its settings, adapters and figures."""

import json
import re
import tempfile
from pathlib import Path
from typing import Literal

import yaml

from fairness_dft.cli.lightning_cli import FairnessCLI
from fairness_dft.reports.results import Results
from fairness_dft.training.module import FairFinetuning

Average = Literal["ema", "trained"]
HERE = ("accelerator=auto", "devices=1", "num_nodes=1", "strategy=auto", "logger=false")


class FinishedRun:
    """A folder that `fairness_dft.fit` wrote.

    Args:
        folder: such as runs/gender/version_0.

    Raises:
        ValueError: if it is no such folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        if not (self.folder / "config.yaml").is_file():
            raise ValueError(f"--run: {folder!r} is no run, which has a config.yaml; runs lie in runs/NAME/version_N")

    def adapter(self, step: int | None = None, name: Average = "ema") -> Path:
        """Where an adapter was exported.

        Args:
            step: after how many steps; the last one by default.
            name: the average, or the trained adapter as it was.

        Raises:
            ValueError: if there is none.
        """
        folders = sorted(self.folder.glob(f"adapters/step_*/{name}"))
        found = {
            int(match[1]): folder for folder in folders if (match := re.fullmatch(r"step_(\d+)", folder.parent.name))
        }
        if not found:
            raise ValueError(
                f"--run: {str(self.folder)!r} has no adapters/step_…/{name}: it was stopped before it exported any"
            )
        if step is not None and step not in found:
            raise ValueError(f"--step must be one of {', '.join(map(str, sorted(found)))}, but got {step}")
        return found[max(found) if step is None else step]

    def results(self) -> Results | None:
        """Return the results of its test; None if it was not tested.

        Raises:
            ValueError: If another version of this program wrote them.
        """
        file = self.folder / "results.json"
        if not file.is_file():
            return None
        try:
            return Results.read(file)
        except ValueError as error:
            raise ValueError(f"--run: {error}") from error

    def build(self, output: str) -> FairnessCLI:
        """Its module and a trainer for this machine; nothing is loaded yet, and its prompts are not looked for.

        Args:
            output: a folder that can be written.

        Raises:
            ValueError: if its settings cannot be read.
        """
        settings = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8")) or {}
        kept = {key: settings[key] for key in ("model", "seed_everything") if key in settings}
        kept["trainer"] = {"precision": settings.get("trainer", {}).get("precision")}
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
            json.dump(kept, file)
            file.flush()
            here = [f"--trainer.{setting}" for setting in HERE]
            data = "--data=fairness_dft.prompts.OccupationPrompts"
            return FairnessCLI([f"--config={file.name}", data, *here, f"--output={output}"])


def load_adapter(module: FairFinetuning, folder: Path, name: Average, scale: float) -> FairFinetuning:
    """Load the base model and a run's adapter.

    Raises:
        ValueError: if one of them cannot be loaded, or the adapter cannot be scaled.
    """
    if scale != 1 and not module.adapter.scalable:
        raise ValueError(f"--scale: {type(module.adapter).__name__} has no strength to change: leave it at 1")
    module.generator.load()
    module.adapter.attach(module.generator)
    module.adapter.load(folder, name)
    module.adapter.rescale(scale, name)
    return module
