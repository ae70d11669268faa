"""Prompt files: read the prompts of every split, or fail with one line that says what to change in the file.

A file is checked as a whole before anything is loaded: an unknown key, a template without its placeholder, and a
prompt that is in both training and evaluation are errors. `PromptList` shows the format.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fairness_dft.files import resolve

SPLITS = ("train", "validation", "test")
KEYS = ("concept", "source", "licence", "templates", *SPLITS)


class Prompt(NamedTuple):
    """A complete prompt; a named tuple, because Lightning refuses to move frozen dataclasses between devices.

    Attributes:
        text: The text that the text encoder reads, "A photo of the face of a chef, a person".
        subject: The subject of the prompt, "chef".
        concept: The category of the subject, "occupation".
        names: The classes that the prompt specifies, such as ("gender", "woman"); prompt adherence measures whether
            images show them. None as a class means that the prompt specifies the attribute by a word that is not a
            class of the classifiers.
    """

    text: str
    subject: str
    concept: str
    names: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True)
class PromptList:
    """The prompts of one file, by split.

    In a JSON file, every entry fills every template, at the placeholder that is the concept in braces:

        {"concept": "occupation", "source": "...", "licence": "...",
         "templates": ["A photo of the face of a {occupation}, a person"],
         "train": ["chef", "pilot"], "validation": ["librarian"], "test": ["senator"]}

    An entry may also be a complete prompt, {"subject": "chef", "text": "A chef in a kitchen, watercolor"}. If its text
    specifies attributes, `names` can say which, in the words of the classifiers' heads and classes:
    {"subject": "chef", "text": "An old woman, a chef", "names": {"gender": "woman"}}. Prompt adherence is then
    measured, and training aligns the prompt with the class that it names. A class of null means that the text
    specifies the attribute by another word: the prompt is then left out of the bias of that attribute, and training
    that aligns the attribute rejects it.
    A file may leave out source, licence, and any split that is not needed. A file of any other type is plain text with
    one complete prompt per line, where "#" starts a comment line; its prompts are in every split.

    Attributes:
        path: The file of the prompts.
        splits: The prompts of each split that the file has, in the order of the file.
    """

    path: Path
    splits: dict[str, tuple[Prompt, ...]]

    @classmethod
    def from_file(cls, path: str | Path) -> "PromptList":
        """Read a prompt file.

        Args:
            path: JSON or plain text file, as `files.resolve` finds it.

        Raises:
            ValueError: If the file cannot be read or is malformed.
        """
        file = resolve(path)
        if file.suffix.lower() == ".json":
            return cls(file, _parse(file))
        prompts = tuple(Prompt(line, line, file.stem) for line in lines(file))
        return cls(file, dict.fromkeys(SPLITS, prompts))

    def split(self, name: str) -> tuple[Prompt, ...]:
        """Return the prompts of a split.

        Args:
            name: "train", "validation" or "test".

        Raises:
            ValueError: If the file has no such split.
        """
        if name not in self.splits:
            raise ValueError(
                f'{self.path}: there is no "{name}" split, only {_quoted(self.splits)};'
                f' add a "{name}" list to the file or choose another file'
            )
        return self.splits[name]


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def normalize(text: str) -> str:
    """Return a text in lower case and with single spaces, to compare texts."""
    return " ".join(text.casefold().split())


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(
            f"{path}: there is no such file; give a path relative to the current directory ({Path.cwd()}),"
            " a path relative to the repository, or an absolute one"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save the file again as UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def lines(path: Path) -> list[str]:
    """Read a plain text file with one entry per line.

    Args:
        path: Plain text file.

    Returns:
        The stripped lines without blank ones and "#" comments; at least one.

    Raises:
        ValueError: If the file cannot be read or has no entry.
    """
    entries = [line.strip() for line in _read(path).splitlines()]
    entries = [line for line in entries if line and not line.startswith("#")]
    if not entries:
        raise ValueError(f"{path}: every line is blank or a comment; add one entry per line")
    return entries


def _parse(path: Path) -> dict[str, tuple[Prompt, ...]]:
    try:
        data = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not JSON at line {error.lineno}, column {error.colno} ({error.msg}); correct it there,"
            " or use a .txt file with one prompt per line"
        ) from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must hold one object in braces, with some of the keys {_quoted(KEYS)}")
    if unknown := [key for key in data if key not in KEYS]:
        raise ValueError(f"{path}: unknown key {_quoted(unknown)}; the keys are {_quoted(KEYS)}")
    if not _is_text(data.get("concept")):
        raise ValueError(f'{path}: "concept" must be a name such as "occupation"; add it')
    splits = {split: _prompts(path, data, split) for split in SPLITS if split in data}
    if not splits:
        raise ValueError(f"{path}: there is no split; add at least one of the lists {_quoted(SPLITS)}")
    _check_overlap(path, splits)
    return splits


def _prompts(path: Path, data: dict[str, Any], split: str) -> tuple[Prompt, ...]:
    concept, entries, templates = data["concept"], data[split], data.get("templates", [])
    placeholder = f"{{{concept}}}"
    if not isinstance(templates, list) or not all(map(_is_text, templates)):
        raise ValueError(f'{path}: "templates" must be a list of strings, each with {placeholder} in it')
    if incomplete := [template for template in templates if placeholder not in template]:
        raise ValueError(f"{path}: the template {_quoted(incomplete)} has no placeholder; write {placeholder} in it")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'{path}: "{split}" must be a list with at least one entry; fill it or leave it out')
    prompts: list[Prompt] = []
    for number, entry in enumerate(entries, start=1):
        where = f'{path}: entry {number} of "{split}"'
        if _is_text(entry) and not templates:
            raise ValueError(f'{where} has no template to fill; add "templates" with {placeholder} in each')
        if _is_text(entry):
            subject = entry.strip()
            prompts += [Prompt(text.replace(placeholder, subject), subject, concept) for text in templates]
        elif _is_complete(entry):
            names = tuple(entry.get("names", {}).items())
            prompts.append(Prompt(entry["text"].strip(), entry["subject"].strip(), concept, names))
        else:
            raise ValueError(
                f'{where} is {entry!r}; write a string or {{"subject": "...", "text": "..."}}, optionally with '
                '"names": {"gender": "woman", ...}'
            )
    return tuple(prompts)


def _is_complete(entry: Any) -> bool:
    if not isinstance(entry, dict) or not {"subject", "text"} <= set(entry) <= {"subject", "text", "names"}:
        return False
    names = entry.get("names", {})
    if not isinstance(names, dict) or not all(label is None or _is_text(label) for label in names.values()):
        return False
    return all(map(_is_text, (entry["subject"], entry["text"], *names)))


def _check_overlap(path: Path, splits: dict[str, tuple[Prompt, ...]]) -> None:
    split_of: dict[str, str] = {}
    for split, prompts in splits.items():
        for prompt in prompts:
            if (other := split_of.setdefault(normalize(prompt.text), split)) != split:
                raise ValueError(
                    f'{path}: "{prompt.text}" is in both "{other}" and "{split}"; remove it from one of them,'
                    " or the evaluation is not on unseen prompts"
                )
