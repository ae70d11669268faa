"""Adapters against the algebra of LoRA and EMA, and exported files against the pipeline that reads them."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from miniature import PORTRAITS
from safetensors import safe_open
from tiny import build_tiny_pipeline
from torch.testing import assert_close

from fairness_dft.adapters import TextEncoderLoRA
from fairness_dft.diffusion import StableDiffusion
from fairness_dft.sampler import Sampler

PROMPTS = ["a chef", "a nurse", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


def attached(folder: Path, **options) -> tuple[StableDiffusion, TextEncoderLoRA]:
    model, adapter = StableDiffusion(str(folder), "DDIMScheduler"), TextEncoderLoRA(**{"rank": 3, **options})
    model.load()
    adapter.attach(model)
    return model, adapter


def randomize(adapter: TextEncoderLoRA) -> None:
    for name in ("trained", "ema"):
        for tensor in adapter.tensors(name).values():
            torch.nn.init.normal_(tensor, std=0.3)


def flags(adapter: TextEncoderLoRA, name: str) -> set[bool]:
    return {tensor.requires_grad for tensor in adapter.tensors(name).values()}


def test_fresh_adapter_changes_nothing_and_average_equals_trained(folder: Path) -> None:
    model = StableDiffusion(str(folder))
    model.load()
    original = model.encode(PROMPTS)
    adapter = TextEncoderLoRA(rank=3)
    adapter.attach(model)
    for name in ("original", "trained", "ema"):
        with adapter.using(name):
            assert_close(model.encode(PROMPTS), original, rtol=0, atol=0)
    trained, average = adapter.state_dict("trained"), adapter.state_dict("ema")
    assert trained.keys() == average.keys() and len(trained) == 2 * 6 * 2
    for key in trained:
        assert_close(trained[key], average[key], rtol=0, atol=0)
        assert key.endswith("up.weight") == (trained[key].abs().sum() == 0)


def test_initialisation_repeats_with_the_seed(folder: Path) -> None:
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(attached(folder)[1].state_dict("trained"))
    first, same, other = states
    for key in first:
        assert_close(first[key], same[key], rtol=0, atol=0)
        assert key.endswith("up.weight") or not torch.equal(first[key], other[key])


def test_only_trained_tensors_are_trainable_and_are_the_parameters(folder: Path) -> None:
    model, adapter = attached(folder)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trainable} == {id(parameter) for parameter in adapter.parameters()}
    assert len(trainable) == len(adapter.parameters())


@pytest.mark.parametrize("name", ["original", "trained", "ema"])
def test_switching_changes_the_model_and_no_flag(folder: Path, name: str) -> None:
    model, adapter = attached(folder)
    randomize(adapter)
    before = model.encode(PROMPTS)
    with adapter.using(name):
        assert adapter.active == name
        inside = model.encode(PROMPTS)
        assert inside.requires_grad == (name == "trained")
        assert (flags(adapter, "trained"), flags(adapter, "ema")) == ({True}, {False})
        with adapter.using("original"):
            original = model.encode(PROMPTS)
        assert_close(model.encode(PROMPTS), inside, rtol=0, atol=0)
    assert adapter.active == "trained"
    assert (flags(adapter, "trained"), flags(adapter, "ema")) == ({True}, {False})
    assert_close(model.encode(PROMPTS), before, rtol=0, atol=0)
    assert (name == "trained") == torch.equal(inside, before)
    assert (name == "original") == torch.equal(inside, original)


def test_previous_model_returns_after_an_error(folder: Path) -> None:
    model, adapter = attached(folder)
    randomize(adapter)
    before = model.encode(PROMPTS)
    with pytest.raises(RuntimeError, match="stop"), adapter.using("ema"), adapter.using("original"):
        raise RuntimeError("stop")
    assert adapter.active == "trained" and flags(adapter, "trained") == {True}
    assert_close(model.encode(PROMPTS), before, rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_adapted_weight_is_base_plus_scaled_product(folder: Path, alpha: float | None) -> None:
    model, adapter = attached(folder, alpha=alpha)
    randomize(adapter)
    scale = 1.0 if alpha is None else alpha / 3
    adapted = model.encode(PROMPTS)
    merged = StableDiffusion(str(folder))
    merged.load()
    weights, state = dict(merged.named_parameters()), adapter.state_dict("trained")
    for key in [key for key in state if key.endswith("down.weight")]:
        product = state[key.replace("down", "up")] @ state[key]
        name = key.replace("lora_linear_layer.down.", "").replace("text_model.", "")
        weights[name].data += scale * product
    assert_close(merged.encode(PROMPTS), adapted, rtol=1e-4, atol=1e-5)


def test_average_follows_its_recursion_in_place(folder: Path) -> None:
    _, adapter = attached(folder)
    expected = adapter.state_dict("ema")
    places = [tensor.data_ptr() for tensor in adapter.tensors("ema").values()]
    for _ in range(3):
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter))
        adapter.update_ema(0.9)
        trained = adapter.state_dict("trained")
        expected = {key: 0.9 * expected[key] + 0.1 * trained[key] for key in expected}
    assert_close(adapter.state_dict("ema"), expected)
    assert places == [tensor.data_ptr() for tensor in adapter.tensors("ema").values()]
    adapter.update_ema(1.0)
    assert_close(adapter.state_dict("ema"), expected)
    adapter.update_ema(0.0)
    assert_close(adapter.state_dict("ema"), trained)


@pytest.mark.parametrize("name", ["trained", "ema"])
def test_state_returns(folder: Path, name: str) -> None:
    _, adapter = attached(folder)
    randomize(adapter)
    state = adapter.state_dict(name)
    randomize(adapter)
    adapter.load_state_dict(state, name)
    assert_close(adapter.state_dict(name), state, rtol=0, atol=0)
    other = "ema" if name == "trained" else "trained"
    assert not torch.equal(next(iter(adapter.state_dict(other).values())), next(iter(state.values())))


def test_adapter_of_half_precision_weights_is_in_float32(folder: Path) -> None:
    model, adapter = StableDiffusion(str(folder), weights_dtype="bfloat16"), TextEncoderLoRA(rank=2)
    model.load()
    adapter.attach(model)
    for name in ("trained", "ema"):
        assert {tensor.dtype for tensor in adapter.tensors(name).values()} == {torch.float32}


@pytest.mark.parametrize(
    "targets",
    [{}, {"target_modules": ["fc1", "fc2"]}, {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}],
    ids=["default", "mlp", "attention"],
)
@pytest.mark.parametrize(("name", "alpha"), [("trained", None), ("ema", 1.5)])
def test_exported_file_gives_the_same_images_in_plain_diffusers(
    tmp_path: Path, name: str, alpha: float | None, targets: dict[str, list[str]]
) -> None:
    model, adapter = StableDiffusion(str(PORTRAITS / "pipeline")), TextEncoderLoRA(rank=3, alpha=alpha, **targets)
    model.load()
    adapter.attach(model)
    randomize(adapter)
    images = {}
    for active in ("original", name):
        with torch.no_grad(), adapter.using(active):
            images[active] = Sampler(steps=3, guidance_scale=2.0)(model, "a chef", model.noise(torch.tensor([4, 5])))
    path = adapter.save(tmp_path / "new" / "folder", name)
    assert path.name == "pytorch_lora_weights.safetensors"

    pipeline = StableDiffusionPipeline.from_pretrained(PORTRAITS / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(path.parent)
    seeds = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    loaded = pipeline(
        ["a chef"] * 2, num_inference_steps=3, guidance_scale=2.0, generator=seeds, output_type="pt"
    ).images
    assert_close(images[name], loaded, rtol=1e-4, atol=1e-5)
    assert (images[name] - images["original"]).abs().max() > 1e-2


def test_exported_file_holds_the_state_and_nothing_of_this_machine(folder: Path, tmp_path: Path) -> None:
    _, adapter = attached(folder)
    randomize(adapter)
    path = adapter.save(tmp_path, "trained")
    with safe_open(path, "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        assert str(folder) not in str(file.metadata())
    assert all(key.startswith("text_encoder.text_model.encoder.layers.") for key in state)
    adapter.load_state_dict(state, "ema")
    assert_close(adapter.state_dict("ema"), state, rtol=0, atol=0)


def test_state_of_another_adapter_is_refused_whole(folder: Path) -> None:
    _, adapter = attached(folder)
    before = adapter.state_dict("trained")
    fewer = dict(list(before.items())[:-1])
    with pytest.raises(ValueError, match="another adapter: 1 tensors do not match, such as text_encoder"):
        adapter.load_state_dict(fewer, "trained")
    wider = attached(folder, rank=4)[1].state_dict("trained")
    with pytest.raises(ValueError, match=r"must have the shape \(3, 16\), but got \(4, 16\)"):
        adapter.load_state_dict(wider, "trained")
    assert_close(adapter.state_dict("trained"), before, rtol=0, atol=0)


def test_refusals(folder: Path) -> None:
    with pytest.raises(ValueError, match="`rank` must be at least 1, but got 0"):
        TextEncoderLoRA(rank=0)
    model, adapter = attached(folder)
    with pytest.raises(ValueError, match="already has an adapter"):
        TextEncoderLoRA().attach(model)
    with pytest.raises(ValueError, match="`name` must be original, trained or ema, but got 'finetuned'"):
        adapter.switch("finetuned")
    assert adapter.active == "trained"


def test_unknown_target_modules(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"`target_modules` must be among .*'q_proj'.* but got \['qproj'\]"):
        attached(folder, target_modules=["k_proj", "qproj"])
