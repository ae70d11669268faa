"""What a finished run left behind: its settings, adapters and figures."""

import json
from pathlib import Path
from typing import Any, Literal

from fairness_dft.cli import FairnessCLI

Average = Literal["ema", "trained"]


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
        found = {int(folder.parent.name[5:]): folder for folder in sorted(self.folder.glob(f"adapters/step_*/{name}"))}
        if not found:
            raise ValueError(
                f"--run: {str(self.folder)!r} has no adapters/step_…/{name}: it was stopped before it exported any"
            )
        if step is not None and step not in found:
            raise ValueError(f"--step must be one of {', '.join(map(str, sorted(found)))}, but got {step}")
        return found[max(found) if step is None else step]

    def results(self) -> dict[str, Any] | None:
        """The figures of its test; None if it was not tested."""
        file = self.folder / "results.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def build(self, output: str) -> FairnessCLI:
        """Its module and trainer, by its own settings; nothing is loaded yet.

        Args:
            output: a folder that can be written.
        """
        settings = [f"--config={self.folder / 'config.yaml'}", "--ckpt_path=null", "--trainer.logger=false"]
        return FairnessCLI([*settings, f"--output={output}"])
