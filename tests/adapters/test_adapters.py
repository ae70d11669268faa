"""Compare adapters with the algebra of LoRA and EMA, and exported files with the pipeline that reads them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from lora import EXPORTED, PROMPTS, load, predict, randomize
from miniature import PORTRAITS
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch.testing import assert_close

from fairness_dft.adapters.base import Adapter
from fairness_dft.adapters.combined import Combined
from fairness_dft.adapters.lora import TextEncoderLoRA, UNetLoRA
from fairness_dft.adapters.prompt_prefix import PromptPrefix
from fairness_dft.diffusion.stable_diffusion import StableDiffusion
from fairness_dft.sampling.sampler import Sampler

SMALL = {
    "text_encoder": lambda **options: TextEncoderLoRA(**{"rank": 3, **options}),
    "unet": lambda **options: UNetLoRA(**{"rank": 3, **options}),
    "both": lambda: Combined([TextEncoderLoRA(rank=2), UNetLoRA(rank=3, learning_rate=0.5)]),
    "prefix": lambda **options: PromptPrefix(**{"length": 3, **options}),
    "all": lambda: Combined([PromptPrefix(length=2), TextEncoderLoRA(rank=2), UNetLoRA(rank=3)]),
}
every_adapter = pytest.mark.parametrize("kind", SMALL)


def attached(tiny_pipeline: Path, kind: str = "text_encoder", **options) -> tuple[StableDiffusion, Adapter]:
    model, adapter = load(tiny_pipeline), SMALL[kind](**options)
    adapter.attach(model)
    return model, adapter


def flags(adapter: Adapter, name: str) -> set[bool]:
    return {tensor.requires_grad for tensor in adapter.tensors(name).values()}


@pytest.mark.parametrize(
    ("kind", "count"), [("text_encoder", 2 * 6 * 2), ("unet", 4 * 8 * 2), ("both", 2 * 6 * 2 + 4 * 8 * 2)]
)
def test_new_lora_changes_nothing_and_ema_equals_trained(tiny_pipeline: Path, kind: str, count: int) -> None:
    original = predict(load(tiny_pipeline))
    model, adapter = attached(tiny_pipeline, kind)
    for name in ("original", "trained", "ema"):
        with adapter.using(name):
            assert_close(predict(model), original, rtol=0, atol=0)
    trained, average = adapter.state_dict("trained"), adapter.state_dict("ema")
    assert trained.keys() == average.keys() and len(trained) == count
    for key in trained:
        assert_close(trained[key], average[key], rtol=0, atol=0)
        assert ("up.weight" in key or "lora_B" in key) == (trained[key].abs().sum() == 0)


@every_adapter
def test_initialization_depends_on_the_seed_only(tiny_pipeline: Path, kind: str) -> None:
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(attached(tiny_pipeline, kind)[1].state_dict("trained"))
    first, same, other = states
    assert_close(first, same, rtol=0, atol=0)
    assert all(torch.equal(first[key], other[key]) == (first[key].abs().sum() == 0) for key in first)


@every_adapter
def test_only_trained_tensors_are_trainable_and_are_the_parameters(tiny_pipeline: Path, kind: str) -> None:
    model, adapter = attached(tiny_pipeline, kind)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trainable} == {id(parameter) for parameter in adapter.parameters()}
    assert len(trainable) == len(adapter.parameters())


@every_adapter
@pytest.mark.parametrize("name", ["original", "trained", "ema"])
def test_switching_changes_the_model_and_no_flag(tiny_pipeline: Path, kind: str, name: str) -> None:
    model, adapter = attached(tiny_pipeline, kind)
    randomize(adapter)
    before = predict(model)
    with adapter.using(name):
        assert adapter.active == name
        inside = predict(model)
        assert inside.requires_grad == (name == "trained")
        assert (flags(adapter, "trained"), flags(adapter, "ema")) == ({True}, {False})
        with adapter.using("original"):
            original = predict(model)
        assert_close(original, predict(load(tiny_pipeline)), rtol=0, atol=0)
        assert_close(predict(model), inside, rtol=0, atol=0)
    assert adapter.active == "trained"
    assert (flags(adapter, "trained"), flags(adapter, "ema")) == ({True}, {False})
    assert_close(predict(model), before, rtol=0, atol=0)
    assert (name == "trained") == torch.equal(inside, before)
    assert (name == "original") == torch.equal(inside, original)


@every_adapter
def test_every_trained_tensor_gets_a_gradient(tiny_pipeline: Path, kind: str) -> None:
    model, adapter = attached(tiny_pipeline, kind)
    randomize(adapter)
    predict(model).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


@every_adapter
def test_exported_files_load_again(tiny_pipeline: Path, kind: str, tmp_path: Path) -> None:
    model, adapter = attached(tiny_pipeline, kind)
    randomize(adapter)
    adapter.save(tmp_path, "trained")
    again, other = attached(tiny_pipeline, kind)
    other.load(tmp_path, "ema")
    with other.using("ema"):
        assert_close(predict(again), predict(model), rtol=0, atol=0)
    file = next(tmp_path.iterdir())
    file.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=f"{file.name}' could not be read"):
        other.load(tmp_path, "ema")
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name}' could not be read"):
        other.load(tmp_path, "ema")


@every_adapter
def test_scale_multiplies_the_change_of_the_weights(tiny_pipeline: Path, kind: str) -> None:
    model, adapter = attached(tiny_pipeline, kind)
    randomize(adapter)
    if kind in ("prefix", "all"):
        adapter.rescale(1.0, "trained")
        with pytest.raises(ValueError, match="PromptPrefix has no strength to change"):
            adapter.rescale(0.5, "trained")
        return
    before = dict(merged(model))
    adapter.rescale(0.5, "trained")
    for name, (weight, delta) in merged(model):
        assert_close(weight, before[name][0], rtol=0, atol=0)
        assert_close(delta, before[name][1] / 2)
        assert delta.abs().sum() > 0
    adapter.rescale(0, "trained")
    assert_close(predict(model), predict(load(tiny_pipeline)), rtol=0, atol=0)


def merged(model) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Yield each adapted layer's name, its weight, and the change that `trained` adds to it."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            yield name, (layer.get_base_layer().weight.clone(), layer.get_delta_weight("trained"))


def test_previous_model_is_active_again_after_an_error(tiny_pipeline: Path) -> None:
    model, adapter = attached(tiny_pipeline)
    randomize(adapter)
    before = model.encode(PROMPTS)
    with pytest.raises(RuntimeError, match="stop"), adapter.using("ema"), adapter.using("original"):
        raise RuntimeError("stop")
    assert adapter.active == "trained" and flags(adapter, "trained") == {True}
    assert_close(model.encode(PROMPTS), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("alpha", "strength", "name", "scale"),
    [(None, 1.0, "trained", 1.0), (1.5, 4.0, "trained", 0.5), (None, 1.25, "ema", 1.25), (1.5, 4.0, "ema", 2.0)],
)
@pytest.mark.parametrize("kind", ["text_encoder", "unet"])
def test_adapted_weight_is_base_plus_scaled_product(
    tiny_pipeline: Path, kind: str, alpha: float | None, strength: float, name: str, scale: float
) -> None:
    model, adapter = attached(tiny_pipeline, kind, alpha=alpha, strength=strength)
    randomize(adapter)
    merged = load(tiny_pipeline)
    weights, state = dict(merged.named_parameters()), adapter.state_dict(name)
    for key in [key for key in state if "down.weight" in key or "lora_A" in key]:
        product = state[key.replace("layer.down", "layer.up").replace("lora_A", "lora_B")] @ state[key]
        weight = key.replace("lora_linear_layer.down.", "").replace("text_model.", "").replace("lora_A.", "")
        weights[weight].data += scale * product
    with adapter.using(name):
        adapted = predict(model)
    assert_close(predict(merged), adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, predict(load(tiny_pipeline)), rtol=1e-2, atol=1e-2)


def test_prefix_stands_before_every_prompt_except_the_empty_one(tiny_pipeline: Path) -> None:
    model, adapter = attached(tiny_pipeline, "prefix")
    randomize(adapter)
    original = load(tiny_pipeline)
    begin, end = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id
    embedding = original.text_encoder.get_input_embeddings()
    words = original.tokenizer("chef", add_special_tokens=False).input_ids
    soft = adapter.tensors("trained")["<fair>"]
    padding = torch.tensor([end] * (16 - 1 - 3 - len(words)))
    rows = (embedding(torch.tensor([begin])), soft, embedding(torch.tensor(words)), embedding(padding))
    # The reference is the same text encoder with a hook that replaces the output of its embedding layer.
    layer = original.text_encoder.get_input_embeddings()
    handle = layer.register_forward_hook(lambda *_: torch.cat(rows)[None])
    expected = original.encode(["chef"])
    handle.remove()
    assert_close(model.encode(["chef", ""])[:1], expected, rtol=1e-5, atol=1e-6)
    assert_close(model.encode(["chef", ""])[1:], original.encode([""]), rtol=1e-5, atol=1e-6)


def test_prefix_starts_at_the_embeddings_of_words(tiny_pipeline: Path) -> None:
    model, adapter = attached(tiny_pipeline, "prefix")
    embedding = model.text_encoder.get_input_embeddings()
    vocabulary = model.tokenizer.get_vocab()
    whole = torch.tensor([index for word, index in vocabulary.items() if word[0].isalpha() and word.endswith("</w>")])
    for row in adapter.state_dict("trained")["<fair>"]:
        assert (embedding.weight[whole] == row).all(dim=1).any()
    assert len({tuple(row.tolist()) for row in adapter.state_dict("ema")["<fair>"]}) > 1


def test_parts_learn_at_their_own_rates(tiny_pipeline: Path) -> None:
    _, adapter = attached(tiny_pipeline, "both")
    text_encoder, unet = adapter.parameter_groups(0.1)
    assert (text_encoder["lr"], unet["lr"]) == (0.1, 0.5)
    assert (len(text_encoder["params"]), len(unet["params"])) == (2 * 6 * 2, 4 * 8 * 2)
    assert UNetLoRA(learning_rate=0.0).learning_rate == 0.0


@every_adapter
def test_ema_is_updated_in_place_by_its_recursion(tiny_pipeline: Path, kind: str) -> None:
    _, adapter = attached(tiny_pipeline, kind)
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


@every_adapter
@pytest.mark.parametrize("name", ["trained", "ema"])
def test_state_loads_again(tiny_pipeline: Path, kind: str, name: str) -> None:
    _, adapter = attached(tiny_pipeline, kind)
    randomize(adapter)
    state = adapter.state_dict(name)
    randomize(adapter)
    adapter.load_state_dict(state, name)
    assert_close(adapter.state_dict(name), state, rtol=0, atol=0)
    other = "ema" if name == "trained" else "trained"
    assert not torch.equal(next(iter(adapter.state_dict(other).values())), next(iter(state.values())))


@every_adapter
def test_adapter_of_a_model_in_half_precision_is_in_float32(tiny_pipeline: Path, kind: str) -> None:
    model, adapter = load(tiny_pipeline, weights_dtype="bfloat16"), SMALL[kind]()
    adapter.attach(model)
    for name in ("trained", "ema"):
        assert {tensor.dtype for tensor in adapter.tensors(name).values()} == {torch.float32}
    predict(model).float().square().sum().backward()
    assert {parameter.grad.dtype for parameter in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["trained", "ema"])
@pytest.mark.parametrize("kind", EXPORTED)
def test_exported_files_give_the_same_images_in_plain_diffusers(tmp_path: Path, name: str, kind: str) -> None:
    model, adapter = StableDiffusion(str(PORTRAITS / "pipeline")), EXPORTED[kind]()
    model.load()
    adapter.attach(model)
    randomize(adapter, std=0.15)  # larger tensors amplify the different rounding of the two pipelines
    images = {}
    for active in ("original", name):
        with torch.no_grad(), adapter.using(active):
            images[active] = Sampler(steps=3, guidance_scale=2.0)(model, "a chef", model.noise(torch.tensor([4, 5])))
    paths = adapter.save(tmp_path / "new" / "folder", name)

    pipeline, prompt = StableDiffusionPipeline.from_pretrained(PORTRAITS / "pipeline"), "a chef"
    pipeline.set_progress_bar_config(disable=True)
    for path in paths:
        if path.name == "learned_embeds.safetensors":
            token = adapter.parts[-1].token
            pipeline.load_textual_inversion(path.parent)
            prompt = f"{token} {prompt}"
        else:
            assert path.name == "pytorch_lora_weights.safetensors"
            pipeline.load_lora_weights(path.parent)
    seeds = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    loaded = pipeline([prompt] * 2, num_inference_steps=3, guidance_scale=2.0, generator=seeds, output_type="pt").images
    assert_close(images[name], loaded, rtol=1e-4, atol=1e-5)
    assert (images[name] - images["original"]).abs().max() > 1e-2


def test_a_failed_export_keeps_the_previous_file(tiny_pipeline: Path, tmp_path: Path, monkeypatch) -> None:
    def fail(state, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise OSError("no space left on device")

    _, adapter = attached(tiny_pipeline)
    [path] = adapter.save(tmp_path, "trained")
    content = path.read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        adapter.save(tmp_path, "trained")
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == content


def test_exported_file_holds_the_state_and_no_path_of_this_machine(tiny_pipeline: Path, tmp_path: Path) -> None:
    _, adapter = attached(tiny_pipeline)
    randomize(adapter)
    [path] = adapter.save(tmp_path, "trained")
    with safe_open(path, "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        assert str(tiny_pipeline) not in str(file.metadata())
    assert all(key.startswith("text_encoder.text_model.encoder.layers.") for key in state)
    adapter.load_state_dict(state, "ema")
    assert_close(adapter.state_dict("ema"), state, rtol=0, atol=0)


def test_state_of_another_adapter_changes_nothing(tiny_pipeline: Path) -> None:
    _, adapter = attached(tiny_pipeline)
    before = adapter.state_dict("trained")
    fewer = dict(list(before.items())[:-1])
    with pytest.raises(ValueError, match="belongs to another adapter: 1 tensors do not match, such as text_encoder"):
        adapter.load_state_dict(fewer, "trained")
    wider = attached(tiny_pipeline, rank=4)[1].state_dict("trained")
    with pytest.raises(ValueError, match=r"must have the shape \(3, 16\), but got \(4, 16\)"):
        adapter.load_state_dict(wider, "trained")
    assert_close(adapter.state_dict("trained"), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text_encoder", "the text encoder already has an adapter"),
        ("unet", "the U-Net already has an adapter"),
        ("prefix", "must be a new word, but the tokenizer knows <fair>"),
    ],
)
def test_second_adapter_of_the_same_class_is_rejected(tiny_pipeline: Path, kind: str, message: str) -> None:
    model, adapter = attached(tiny_pipeline, kind)
    with pytest.raises(ValueError, match=message):
        SMALL[kind]().attach(model)
    with pytest.raises(ValueError, match="`name` must be original, trained or ema, but got 'finetuned'"):
        adapter.switch("finetuned")
    assert adapter.active == "trained"


def test_settings_out_of_range_are_rejected() -> None:
    with pytest.raises(ValueError, match="`rank` must be at least 1, but got 0"):
        UNetLoRA(rank=0)
    for strength in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"`strength` must be positive, but got {strength}"):
            TextEncoderLoRA(strength=strength)
    with pytest.raises(ValueError, match="`length` must be at least 1, but got 0"):
        PromptPrefix(length=0)
    for token in ("", "fair", "<fair one>", "<fair><"):
        with pytest.raises(ValueError, match="`token` must be a word in angle brackets, such as <fair>, but got"):
            PromptPrefix(token=token)
    for kind in (UNetLoRA, PromptPrefix):
        with pytest.raises(ValueError, match="`learning_rate` must not be negative, but got -1"):
            kind(learning_rate=-1)
    with pytest.raises(ValueError, match="`parts` must be adapters of different classes.* but got none"):
        Combined([])
    with pytest.raises(ValueError, match="but got UNetLoRA, UNetLoRA"):
        Combined([UNetLoRA(), UNetLoRA()])
    assert [type(part) for part in Combined().parts] == [TextEncoderLoRA, UNetLoRA]


@pytest.mark.parametrize(("adapter", "what"), [(UNetLoRA(), "unet"), (PromptPrefix(), "tokenizer and no text_encoder")])
def test_model_without_the_network_of_an_adapter_is_rejected(adapter: Adapter, what: str) -> None:
    with pytest.raises(ValueError, match=f"the text-to-image model has no {what}: choose another adapter"):
        adapter.attach(torch.nn.Module())


def test_a_prefix_leaves_room_for_the_prompt(tiny_pipeline: Path) -> None:
    attached(tiny_pipeline, "prefix", length=7)  # of 16 tokens, two of which mark start and end
    with pytest.raises(ValueError, match="`length` must be at most 7, half of what the text encoder reads, but got 8"):
        attached(tiny_pipeline, "prefix", length=8)


def test_unknown_target_modules_are_rejected(tiny_pipeline: Path) -> None:
    with pytest.raises(ValueError, match=r"`target_modules` must be among .*'q_proj'.* but got \['qproj'\]"):
        attached(tiny_pipeline, target_modules=["k_proj", "qproj"])
    with pytest.raises(ValueError, match=r"among .*'to_out.0', 'to_q'.* but got \['out.0'\]"):
        attached(tiny_pipeline, "unet", target_modules=["to_q", "out.0"])
