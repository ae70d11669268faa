"""What a user's settings go through before they are parsed.

`--config` takes a file, or the name of an experiment that ships with the package. An experiment lists what it varies,
and names what it varies from in its `base`; each base is put before the user's first `--config`, once. Names of older
versions become those of today.
"""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml

from fairness_dft.files import resolve, shipped
from fairness_dft.moved_names import FILES, current_flag, rename

ROOT = Path("experiments")
ROOMS = (ROOT, ROOT / "parts", ROOT / "classifiers")


def prepared(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command with every configuration found, completed and in the names of today.

    Args:
        arguments: Arguments of the command line.

    Raises:
        ValueError: If a configuration, or the base of one, does not exist.

    Example:
        >>> prepared(["--name=trial"])
        ['--name=trial']
    """
    words = list(_joined(arguments))
    given = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    texts = {value: _text(value) for value in dict.fromkeys(given)}
    bases: dict[Path, str] = {}
    for value in texts:
        _collect_bases(value, bases)
    before = [f"--config={text}" for text in bases.values()]
    result = []
    for word in words:
        if not word.startswith("--config="):
            result.append(current_flag(word))
            continue
        result += [*before, f"--config={texts[word.removeprefix('--config=')]}"]
        before = []
    return result


def located(name: str, folder: Path = Path()) -> Path | None:
    """Return the file that a name stands for; None if there is none.

    Args:
        name: A path, or the name of a shipped file such as `race`, `portraits` or `parts/base.yaml`.
        folder: Where a relative path starts; the shipped experiments come next.
    """
    stem = name.removesuffix(".yaml").removeprefix("experiments/")
    own = [shipped(room / f"{FILES.get(stem, stem)}.yaml") for room in ROOMS]
    return next((file for file in (folder / Path(name).expanduser(), resolve(name), *own) if file.is_file()), None)


def shipped_names() -> list[str]:
    """Return the names of the experiments that ship with the package."""
    return sorted(file.stem for file in shipped(ROOT).glob("*.yaml"))


def _joined(arguments: Sequence[str]) -> Iterator[str]:
    """Write `--config FILE` as `--config=FILE`."""
    words = iter(arguments)
    for word in words:
        value = next(words, None) if word == "--config" else None
        yield word if value is None else f"--config={value}"


def _file(value: str) -> Path | None:
    """Return the file of a `--config`; None for YAML that is written on the command line itself."""
    if "\n" in value or value.lstrip().startswith("{"):
        return None
    if file := located(value):
        return file
    close = get_close_matches(Path(value).stem, shipped_names(), n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; the package ships {', '.join(shipped_names())}"
    raise ValueError(f"--config: there is no file {value!r}{hint}")


def _node(file: Path | None, value: str) -> yaml.Node | None:
    """Parse YAML as far as its nodes, which keep every scalar as it is written."""
    try:
        return yaml.compose(value if file is None else file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {value!r} is not YAML: {' '.join(str(error).split())}") from error


def _text(value: str) -> str:
    """Return what the parser reads for a `--config`: the file, or its text where that has to change."""
    file = _file(value)
    node = _node(file, value)
    base = _pop_base(node)
    if node is None or not (rename(node) or base):
        return value if file is None else str(file)
    return str(yaml.serialize(node)) if node.value else "{}"


def _pop_base(node: yaml.Node | None) -> list[str]:
    """Remove the setting `base` from a configuration, and return the names in it."""
    if not isinstance(node, yaml.MappingNode):
        return []
    values = [value for name, value in node.value if name.value == "base"]
    node.value = [(name, value) for name, value in node.value if name.value != "base"]
    parts = [part for value in values for part in (value.value if isinstance(value, yaml.SequenceNode) else [value])]
    return [str(part.value) for part in parts]


def _collect_bases(value: str, bases: dict[Path, str], above: tuple[Path, ...] = ()) -> None:
    """Add the bases of a configuration, and theirs before them.

    Args:
        value: The value of a `--config`.
        bases: The text of each base by its file, in their order; extended in place.
        above: The files that led here, which are not added again.

    Raises:
        ValueError: If one does not exist.
    """
    file = _file(value)
    above = (*above, file.resolve()) if file else above
    for name in _pop_base(_node(file, value)):
        base = located(name, file.parent if file else Path())
        if base is None:
            raise ValueError(f"--config: {value!r} has the base {name!r}, which does not exist")
        if base.resolve() not in (*bases, *above):
            _collect_bases(str(base), bases, above)
            bases[base.resolve()] = _text(str(base))
