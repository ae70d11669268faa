"""Paths relative to the repository, and loaders that keep quiet."""

import warnings
from pathlib import Path

import pytest
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from fairness_dft import files as module
from fairness_dft.files import Location, filling, locate, quiet, resolve

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


def test_a_folder_is_filled_in_one_piece_or_not_at_all(tmp_path):
    folder = tmp_path / "classifier"
    with filling(folder) as draft:
        for name in ("config.json", "model.safetensors", "part/config.json"):
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text(name)
        assert [path for path in folder.iterdir() if path != draft] == []
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) == [
        "config.json", "model.safetensors", "part/config.json"
    ]  # fmt: skip
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="disk full"), filling(folder) as draft:
        (draft / "config.json").write_text("half")
        raise OSError("disk full")
    assert (folder / "config.json").read_text() == "config.json" and (folder / "notes.txt").read_text() == "mine"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    with filling(folder) as draft:
        (draft / "config.json").write_text("second")
    assert (folder / "config.json").read_text() == "second" and (folder / "notes.txt").exists()


def test_locations_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("fairness_dft.files.on_hub", lambda path: pytest.fail("asked the hub"))
    (tmp_path / "config.json").write_text("{}")
    here = locate(tmp_path)
    assert here == Location(str(tmp_path), tmp_path, True) and here.options == {"local_files_only": True}
    assert here.holds("config.json") and not here.holds("model.safetensors") and not here.holds("")
    assert here.file("config.json") == tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match="there is no file .*model.safetensors"):
        here.file("model.safetensors")
    one = locate(tmp_path / "config.json", single_file=True)
    assert one.holds(one.name) and one.file() == tmp_path / "config.json"
    assert not locate("owner/repository", local_only=True).reachable
    for path in ("missing.onnx", "~/x/y.onnx", "./x/y.onnx"):  # nobody else's business
        assert locate(path, single_file=True).folder is not None


@pytest.mark.parametrize("reachable", [True, False])
def test_locations_on_the_hub(reachable, monkeypatch):
    """Where the hub is out of reach, only cached files count."""
    monkeypatch.setattr("fairness_dft.files.on_hub", lambda path: reachable)
    monkeypatch.setattr("huggingface_hub.HfApi.file_exists", lambda self, repository, name: name == "weights/there")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repository, name: "/cache/file" if (repository, name) == ("owner/model", "weights/cached") else None,
    )
    downloads = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: downloads.append((a, k)) or "/cache/file")
    where = locate("owner/model/weights/there", single_file=True)
    assert where == Location("owner/model", None, reachable, "weights/there")
    assert where.holds("weights/there") == reachable and where.holds("weights/cached") != reachable
    assert not downloads
    assert where.file() == Path("/cache/file")
    assert downloads == [(("owner/model", "weights/there"), {"local_files_only": not reachable})]
    assert locate("owner/model") == Location("owner/model", None, reachable)
