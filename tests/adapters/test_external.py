"""Compare adapters for audits with the adapters that they were exported from."""

from pathlib import Path

import pytest
import torch
from lora import EXPORTED, load, predict, randomize
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from fairness_dft.adapters.external import DiffusersAdapter, NoAdapter
from fairness_dft.export import kohya
from fairness_dft.sampling.sampler import Sampler


@pytest.mark.parametrize("kind", EXPORTED)
@pytest.mark.parametrize("layout", ["folder", "file", "kohya"])
def test_a_loaded_adapter_is_the_exported_one(tiny_pipeline: Path, kind: str, layout: str, tmp_path: Path) -> None:
    model, adapter = load(tiny_pipeline), EXPORTED[kind]()
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
    other, loaded = load(tiny_pipeline), DiffusersAdapter(str(path))
    original = predict(other)
    loaded.attach(other)
    assert not any(parameter.requires_grad for parameter in other.parameters())
    with adapter.using("ema"):
        expected = predict(model)
    assert (expected - original).abs().max() > 1e-3
    assert_close(predict(other), expected, rtol=1e-4, atol=1e-5)
    with loaded.using("original"):
        assert_close(predict(other), original, rtol=0, atol=0)
    assert_close(predict(other), expected, rtol=1e-4, atol=1e-5)


def test_a_lora_that_fits_in_part_is_rejected(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Such a LoRA may come from a model with more blocks; diffusers silently loads the rest."""
    adapter = EXPORTED["unet"]()
    adapter.attach(load(tiny_pipeline))
    (file,) = adapter.save(tmp_path)
    tensors = load_file(file)
    key = next(key for key in tensors if "down_blocks.1" in key)
    tensors[key.replace("down_blocks.1", "down_blocks.7")] = tensors[key].clone()
    save_file(tensors, file)
    message = f"only {len(tensors) - 1} of the {len(tensors)} matrices of {file.name} have a layer in the model"
    with pytest.raises(ValueError, match=message):
        DiffusersAdapter(str(tmp_path)).attach(load(tiny_pipeline))


def test_an_adapter_is_loaded_from_the_cache_of_the_hub(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--owner--lora"
    snapshot = repository / "snapshots" / ("a" * 40)
    for part in (snapshot, repository / "refs"):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40, encoding="utf-8")
    adapter = EXPORTED["text_encoder"]()
    adapter.attach(load(tiny_pipeline))
    (file,) = adapter.save(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("fairness_dft.files.on_hub", lambda path: False)
    for path in ("owner/lora", f"owner/lora/{file.name}"):
        loaded = DiffusersAdapter(path)
        assert [lora.resolve() for lora in loaded.lora] == [file.resolve()] and not loaded.inversions
    with pytest.raises(ValueError, match="or owner/repository or owner/repository/file on the Hugging Face hub"):
        DiffusersAdapter("owner/other")


def test_the_base_model_and_its_scheduler_stay_unchanged(tiny_pipeline: Path, tmp_path: Path) -> None:
    adapter = EXPORTED["text_encoder"]()
    adapter.attach(load(tiny_pipeline))
    adapter.save(tmp_path)
    images, settings = [], []
    for audited in (NoAdapter(), DiffusersAdapter(str(tmp_path))):
        model = load(tiny_pipeline)
        model.scheduler.register_to_config(clip_sample=True, steps_offset=0)  # what diffusers' pipeline would change
        audited.attach(model)
        with audited.using("original"), torch.no_grad():
            images.append(Sampler(steps=3, guidance_scale=2.0)(model, "a chef", model.noise(torch.arange(2))))
        settings.append(dict(model.scheduler.config))
    assert torch.equal(*images)
    assert settings[0] == settings[1]


def test_a_model_in_another_layout_is_rejected(tiny_pipeline: Path, tmp_path: Path) -> None:
    adapter = EXPORTED["text_encoder"]()
    adapter.attach(load(tiny_pipeline))
    adapter.save(tmp_path)
    model = load(tiny_pipeline)
    del model.unet
    with pytest.raises(ValueError, match="the text-to-image model has no unet: choose another adapter"):
        DiffusersAdapter(str(tmp_path)).attach(model)
