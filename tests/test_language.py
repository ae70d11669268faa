"""The words of the project: plain English, and one word for one thing."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fairness_dft", "docs", "experiments", "benchmarks", "data/prompts")
SUFFIXES = {".py", ".md", ".yaml", ".html"}
# These files list names of older versions, so that old runs and configurations still open.
MOVED_NAMES = {"moved_names.py", "configuration.py", "CHANGELOG.md"}
DENIED = {
    r"obedien": "prompt adherence",
    r"faceless": "no face",
    r"\bfactor[12]\b": "semantics_factor, face_gradient_factor",
    r"WayBack|way_back": "recompute",
    r"\bin_chunks\b": "map_chunks",
    r"only_training": "classifier_overfit",
    r"gap_without_chance": "unbiased_rms_gap",
    r"(?<!Non)FiniteSteps": "SkipNonFiniteSteps",
    r"is there already|are there already": "already exists",
    r"(does|do) not suffice": "is not enough",
    r"\blikewise\b": "also",
    r"\banew\b": "again, or nothing",
}


def denied_words(text: str) -> list[str]:
    """Return each denied word of a text, with its line and what to write instead."""
    lines = enumerate(text.splitlines(), 1)
    return [
        f"line {number}: {match[0]!r}; write {better}"
        for number, line in lines
        for pattern, better in DENIED.items()
        for match in re.finditer(pattern, line, re.IGNORECASE if pattern.islower() else 0)
    ]


def written_files() -> list[Path]:
    """Return the files of the project that a person reads."""
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.suffix in SUFFIXES]
    return sorted([*files, *ROOT.glob("*.md")])


def test_the_project_uses_the_words_of_its_glossary() -> None:
    files = written_files()
    assert len(files) > 100
    assert [
        f"{file.relative_to(ROOT)}, {word}"
        for file in files
        if file.name not in MOVED_NAMES
        for word in denied_words(file.read_text(encoding="utf-8"))
    ] == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("obedience of prompts", "prompt adherence"),
        ("semantics: factor1", "semantics_factor"),
        ("fairness_dft.stop.FiniteSteps", "SkipNonFiniteSteps"),
        ("the file is there already", "already exists"),
        ("draw it anew", "again"),
    ],
)
def test_a_denied_word_is_reported_with_its_line(text: str, word: str) -> None:
    [report] = denied_words("a plain line\n" + text)
    assert report.startswith("line 2: ") and word in report


@pytest.mark.parametrize("text", ["SkipNonFiniteSteps", "factor10", "renew the token"])
def test_plain_words_pass(text: str) -> None:
    assert denied_words(text) == []
