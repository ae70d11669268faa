"""Adapters that are only looked at, against those that they were exported from."""

from pathlib import Path

import pytest
import torch
from lora import EXPORTED, load, predict, randomize
from safetensors.torch import load_file, save_file
from tiny import build_tiny_pipeline
from torch.testing import assert_close

from fairness_dft.adapters.external import DiffusersAdapter, NoAdapter
from fairness_dft.export import kohya
from fairness_dft.sampling.sampler import Sampler


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.mark.parametrize("kind", EXPORTED)
@pytest.mark.parametrize("layout", ["folder", "file", "kohya"])
def test_it_is_the_adapter_that_was_exported(folder: Path, kind: str, layout: str, tmp_path: Path) -> None:
    model, adapter = load(folder), EXPORTED[kind]()
    adapter.attach(model)
    randomize(adapter)
    files = adapter.save(tmp_path)
    path = tmp_path
    if layout == "file":
        if len(files) > 1:
            return
        path = files[0]
    elif layout == "kohya":
        weights = kohya(adapter, "ema")
        if not weights or len(files) > 1:
            return
        path = tmp_path / "kohya.safetensors"
        save_file(weights, path)
    other, ours = load(folder), DiffusersAdapter(str(path))
    original = predict(other)
    ours.attach(other)
    assert not any(parameter.requires_grad for parameter in other.parameters())
    with adapter.using("ema"):
        expected = predict(model)
    assert (expected - original).abs().max() > 1e-3
    assert_close(predict(other), expected, rtol=1e-4, atol=1e-5)
    with ours.using("original"):
        assert_close(predict(other), original, rtol=0, atol=0)
    assert_close(predict(other), expected, rtol=1e-4, atol=1e-5)


def test_a_lora_that_fits_in_part_is_refused(folder: Path, tmp_path: Path) -> None:
    """Such as one of a model with more blocks; diffusers would load the rest in silence."""
    adapter = EXPORTED["unet"]()
    adapter.attach(load(folder))
    (file,) = adapter.save(tmp_path)
    tensors = load_file(file)
    key = next(key for key in tensors if "down_blocks.1" in key)
    tensors[key.replace("down_blocks.1", "down_blocks.7")] = tensors[key].clone()
    save_file(tensors, file)
    message = f"only {len(tensors) - 1} of the {len(tensors)} matrices of {file.name} find a layer"
    with pytest.raises(ValueError, match=message):
        DiffusersAdapter(str(tmp_path)).attach(load(folder))


def test_it_comes_from_the_hub_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what is cached of it, as where the hub is out of reach."""
    repository = tmp_path / "models--owner--lora"
    snapshot = repository / "snapshots" / ("a" * 40)
    for part in (snapshot, repository / "refs"):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40, encoding="utf-8")
    adapter = EXPORTED["text_encoder"]()
    adapter.attach(load(folder))
    (file,) = adapter.save(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("fairness_dft.files.on_hub", lambda path: False)
    for path in ("owner/lora", f"owner/lora/{file.name}"):
        found = DiffusersAdapter(path)
        assert [held.resolve() for held in found.lora] == [file.resolve()] and not found.inversions
    with pytest.raises(ValueError, match="nor owner/repository or owner/repository/file on the Hugging Face hub"):
        DiffusersAdapter("owner/other")


def test_the_original_is_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    """Also its scheduler, whose settings diffusers' pipeline would change."""
    adapter = EXPORTED["text_encoder"]()
    adapter.attach(load(folder))
    adapter.save(tmp_path)
    images, settings = [], []
    for looked in (NoAdapter(), DiffusersAdapter(str(tmp_path))):
        model = load(folder)
        model.scheduler.register_to_config(clip_sample=True, steps_offset=0)  # what diffusers' pipeline would change
        looked.attach(model)
        with looked.using("original"), torch.no_grad():
            images.append(Sampler(steps=3, guidance_scale=2.0)(model, "a chef", model.noise(torch.arange(2))))
        settings.append(dict(model.scheduler.config))
    assert torch.equal(*images)
    assert settings[0] == settings[1]


def test_a_model_of_another_layout_is_refused(folder: Path, tmp_path: Path) -> None:
    adapter = EXPORTED["text_encoder"]()
    adapter.attach(load(folder))
    adapter.save(tmp_path)
    model = load(folder)
    del model.unet
    with pytest.raises(ValueError, match="has no unet, which diffusers' adapters need"):
        DiffusersAdapter(str(tmp_path)).attach(model)
