"""A finished run: its settings, adapters and results."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from fairness_dft.files import one_line
from fairness_dft.moved_names import rename
from fairness_dft.reports.results import Results

Average = Literal["ema", "trained"]
Module = TypeVar("Module")
PACKAGE = __name__.partition(".")[0]


class FinishedRun:
    """A folder that `fairness_dft.fit` wrote.

    Args:
        folder: Such as runs/gender/version_0.

    Raises:
        ValueError: If the folder has no config.yaml.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "config.yaml").is_file():
            raise ValueError(
                f"--run: {str(folder)!r} is not a run, which has a config.yaml; runs are in runs/NAME/version_N"
            )

    def adapter(self, step: int | None = None, name: Average = "ema") -> Path:
        """Return the folder of an exported adapter.

        Args:
            step: After how many training steps; the last ones by default.
            name: The average, or the trained adapter as it was.

        Raises:
            ValueError: If the run has not exported it.
        """
        folders = sorted(self.folder.glob(f"adapters/step_*/{name}"))
        exported = {
            int(match[1]): folder for folder in folders if (match := re.fullmatch(r"step_(\d+)", folder.parent.name))
        }
        if not exported:
            raise ValueError(
                f"--run: {str(self.folder)!r} has no adapters/step_…/{name}: the run stopped before it exported any"
            )
        if step is not None and step not in exported:
            raise ValueError(f"--step must be one of {', '.join(map(str, sorted(exported)))}, but got {step}")
        return exported[max(exported) if step is None else step]

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

    def settings(self) -> dict[str, Any]:
        """Return all settings of the run, as config.yaml has them, in the names of today.

        Raises:
            ValueError: If config.yaml is not valid YAML.
        """
        file = self.folder / "config.yaml"
        try:
            node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise ValueError(f"--run: {str(file)!r} is not valid: {one_line(error)}") from error
        if node is None:
            return {}
        rename(node)
        settings: dict[str, Any] = yaml.safe_load(yaml.serialize(node))
        return settings

    def module_settings(self) -> dict[str, Any]:
        """Return the settings of the finetuned module, with the seed of the run."""
        settings = self.settings()
        return {**settings.get("model", {}), "seed": int(settings.get("seed_everything") or 0)}

    def build(self, kind: type[Module], settings: Mapping[str, Any], other_classes: bool = False) -> Module:
        """Build a module from settings of the run.

        Args:
            kind: The module's class.
            settings: The arguments of that class, as config.yaml has them.
            other_classes: Whether the settings may name classes from outside this package.

        Raises:
            ValueError: If the settings do not fit the class, or name a class that is not allowed.
        """
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(kind, "model")
        try:
            self._check_classes(settings, other_classes)
            parsed = parser.parse_object({"model": dict(settings)})
            self._check_classes(parsed.as_dict(), other_classes)  # a class may also be named without the key class_path
        except ArgumentError as error:
            raise ValueError(f"--run: {str(self.folder)!r} cannot be opened: {one_line(error)}") from error
        module: Module = parser.instantiate_classes(parsed).model
        return module

    def _check_classes(self, settings: Mapping[str, Any], other_classes: bool) -> None:
        for path in class_paths(settings):
            if not (other_classes or path.startswith(f"{PACKAGE}.")):
                raise ValueError(
                    f"--run: {str(self.folder / 'config.yaml')!r} names {path!r}, which is not a class of {PACKAGE}; "
                    "set `other_classes` if you trust it"
                )


def class_paths(settings: Any) -> Iterator[str]:
    """Yield the import path of every class that nested settings name."""
    if isinstance(settings, Mapping):
        if isinstance(settings.get("class_path"), str):
            yield settings["class_path"]
        settings = settings.values()
    elif not isinstance(settings, list):
        return
    for value in settings:
        yield from class_paths(value)
