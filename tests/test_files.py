"""Paths relative to the repository, and loaders that keep quiet."""

import warnings
from pathlib import Path

import pytest
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from fairness_dft import files as module
from fairness_dft.files import quiet, resolve

ROOT = Path(module.__file__).parent.parent


def test_resolve_prefers_the_current_directory_to_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sports = Path("data", "prompts", "sports.json")
    assert resolve(str(sports)) == ROOT / sports
    assert resolve(tmp_path / "nowhere.json") == tmp_path / "nowhere.json"
    assert resolve("nowhere.json") == Path("nowhere.json")
    sports.parent.mkdir(parents=True)
    sports.write_text("{}", encoding="utf-8")
    assert resolve(sports) == sports
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/data") == tmp_path / "data"


@pytest.mark.filterwarnings("error")
def test_quiet_silences_loaders_and_puts_everything_back_even_after_a_failure():
    libraries = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    bar = transformers_logging.is_progress_bar_enabled()
    with pytest.raises(KeyError), quiet():
        assert all(library.get_verbosity() == library.CRITICAL for library in libraries)
        assert not transformers_logging.is_progress_bar_enabled()
        warnings.warn("an old file", stacklevel=1)
        raise KeyError
    assert [library.get_verbosity() for library in libraries] == before
    assert transformers_logging.is_progress_bar_enabled() == bar


def test_a_file_is_replaced_in_one_piece_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "results.json"
    with module.replacing(file) as draft:
        draft.write_text("first")
        assert draft.suffix == ".json" and not file.exists()
    assert file.read_text() == "first"
    with pytest.raises(OSError, match="disk full"), module.replacing(file) as draft:
        draft.write_text("half of the sec")
        raise OSError("disk full")
    assert file.read_text() == "first" and list(file.parent.iterdir()) == [file]
