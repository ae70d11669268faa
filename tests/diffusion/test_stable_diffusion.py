"""Compare Stable Diffusion with diffusers and with formulas, and check its errors where there is no model."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import HfApi
from tiny import build_tiny_pipeline
from torch.testing import assert_close

from fairness_dft.adapters.lora import UNetLoRA
from fairness_dft.diffusion.diffusers_model import token_limit
from fairness_dft.diffusion.stable_diffusion import StableDiffusion
from fairness_dft.networks.cross_attention import SharedKeys, share_keys


@pytest.fixture(scope="module")
def model(tiny_pipeline: Path) -> StableDiffusion:
    return load(tiny_pipeline)


@pytest.fixture
def offline(monkeypatch) -> list:
    """Take away the hub, and list the requests that it did not answer."""
    requests = []

    def unreachable(*arguments, **options):
        requests.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    return requests


def load(folder: Path | str, *arguments, **options) -> StableDiffusion:
    model = StableDiffusion(str(folder), *arguments, **options)
    model.load()
    return model


def test_shapes_and_ranges(model: StableDiffusion) -> None:
    assert model.latent_shape == (4, 8, 8)
    conditioning = model.encode(["a chef", "", "a photo of a nurse"])
    assert conditioning.shape == (3, 16, 16)
    latents = 3 * model.noise(torch.arange(3))
    assert model.denoise(latents, torch.tensor(500), conditioning).shape == latents.shape
    images = model.decode(latents)
    assert images.shape == (3, 3, 16, 16)
    assert images.min() >= 0 and images.max() <= 1


def test_base_is_frozen_and_stays_in_evaluation_mode(model: StableDiffusion) -> None:
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.train()
    assert not any(module.training for module in model.modules())


def test_constructor_and_check_load_nothing_and_a_second_load_changes_nothing(tiny_pipeline: Path) -> None:
    model = StableDiffusion(str(tiny_pipeline))
    state = dict(vars(model))
    model.check()
    assert vars(model) == state and list(model.parameters()) == []
    model.load()
    unet, adapter = model.unet, UNetLoRA(rank=2)
    adapter.attach(model)
    model.load()
    assert model.unet is unet
    assert all(parameter.requires_grad for parameter in adapter.parameters())


def test_path_is_relative_to_the_working_directory(tiny_pipeline: Path, monkeypatch) -> None:
    monkeypatch.chdir(tiny_pipeline.parent)
    assert load(tiny_pipeline.name).latent_shape == (4, 8, 8)


def test_truncated_text_is_the_end_that_the_text_encoder_does_not_read(model: StableDiffusion) -> None:
    words = [word.removesuffix("</w>") for word in sorted(model.tokenizer.get_vocab()) if word.endswith("</w>")]
    words = [word for word in words if word.isalpha()][:8] * 20
    reads = token_limit(model.tokenizer, model.text_encoder) - 2
    assert model.truncated_text(" ".join(words[:reads])) == ""
    assert model.truncated_text(" ".join(words[: reads + 3])) == " ".join(words[reads : reads + 3])
    model.prefix = f"{words[0]} {words[1]} "
    try:
        assert model.truncated_text(" ".join(words[:reads])) == " ".join(words[reads - 2 : reads])
    finally:
        model.prefix = ""


def test_long_prompts_are_truncated_as_in_the_pipeline(model: StableDiffusion) -> None:
    long = "a photo of the face of a chef, a person"
    pipeline = diffusers.StableDiffusionPipeline(
        model.vae, model.text_encoder, model.tokenizer, model.unet, model.scheduler, None, None, None, False
    )
    expected, unconditional = pipeline.encode_prompt(long, "cpu", 1, True)
    assert_close(model.encode([long, ""]), torch.cat((expected, unconditional)))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_noise_is_that_of_diffusers_and_does_not_depend_on_the_batch(model: StableDiffusion, count: int) -> None:
    seeds = torch.randint(2**40, (count,))
    noise = model.noise(seeds)
    assert noise.shape == (count, 4, 8, 8)
    for latent, seed in zip(noise, seeds.tolist(), strict=True):
        generator = torch.Generator().manual_seed(seed)
        assert_close(latent[None], randn_tensor((1, 4, 8, 8), [generator]), rtol=0, atol=0)
    assert_close(model.noise(seeds.flip(0)), noise.flip(0), rtol=0, atol=0)


@pytest.mark.parametrize("prompts", [["a chef"], ["a chef", "a nurse at work"]])
def test_rows_share_a_conditioning(model: StableDiffusion, prompts: list[str]) -> None:
    latents, timestep = model.noise(torch.arange(4)), torch.tensor(300)
    results = []
    for repeats in (1, 4 // len(prompts)):
        conditioning = model.encode(prompts).requires_grad_()
        prediction = model.denoise(latents, timestep, conditioning.repeat_interleave(repeats, 0))
        gradient = torch.autograd.grad((prediction * torch.linspace(-1, 2, 4).view(-1, 1, 1, 1)).sum(), conditioning)
        results.append((prediction, *gradient))
    (shared, gradient), (each, expected) = results
    assert_close(shared, each)
    assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_conditioning_that_cannot_be_shared_equally_is_rejected(model: StableDiffusion) -> None:
    conditioning = model.encode(["a chef", "a nurse"])
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"2 rows of `conditioning` cannot be shared equally by {count} latents"):
            model.denoise(model.noise(torch.arange(count)), torch.tensor(300), conditioning)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("upcast", [False, True])
def test_cross_attention_is_that_of_diffusers(linear: bool, upcast: bool) -> None:
    """Version 1 projects by convolutions; version 2 projects by linear layers and has attention in single precision."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=16, use_linear_projection=linear, upcast_attention=upcast,
    ).eval()  # fmt: skip
    inputs = torch.randn(4, 4, 8, 8), torch.tensor(300), torch.randn(4, 7, 16, requires_grad=True)
    results = []
    for prepare in (lambda _: None, share_keys):
        prepare(unet)
        prediction = unet(*inputs).sample
        results.append((prediction, *torch.autograd.grad(prediction.square().sum(), inputs[2])))
    assert_close(results[1], results[0])
    assert {type(unet.attn_processors[name]) is SharedKeys for name in unet.attn_processors if "attn2" in name} == {
        True
    }


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 7.5])
def test_guidance_is_its_formula(model: StableDiffusion, guidance_scale: float) -> None:
    latents, timestep = model.noise(torch.arange(2)), torch.tensor(300)
    conditioning, unconditional = model.encode(["a chef", "a nurse"]), model.encode(["", ""])
    with_prompt = model.denoise(latents, timestep, conditioning)
    without = model.denoise(latents, timestep, unconditional)
    guided = model.guided(latents, timestep, conditioning, unconditional, guidance_scale)
    expected = without + guidance_scale * (with_prompt - without)
    assert_close(guided, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_scheduler_has_the_settings_of_the_model(tmp_path: Path, name: str) -> None:
    scheduler = load(build_tiny_pipeline(tmp_path, prediction_type="v_prediction"), name).scheduler
    assert type(scheduler).__name__ == name
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.config.beta_end == 0.012


def test_weights_stored_in_half_precision_are_loaded_in_the_requested_precision(
    tmp_path: Path, model: StableDiffusion
) -> None:
    stored = load(build_tiny_pipeline(tmp_path, dtype=torch.float16))
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.float32}
    for parameter, original in zip(stored.parameters(), model.parameters(), strict=True):
        assert_close(parameter, original, rtol=1e-3, atol=1e-4)
    half = load(tmp_path, weights_dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("trained", [False, True])
def test_only_trained_networks_use_autocast(tmp_path: Path, trained: bool) -> None:
    """A network that is frozen in half precision computes as it does without autocast, to the last bit."""
    model = load(build_tiny_pipeline(tmp_path), weights_dtype="bfloat16")
    if trained:
        UNetLoRA(rank=2).attach(model)
    cast = []
    for network in (model.unet.conv_in, model.vae.decoder.conv_in):
        network.register_forward_hook(lambda *_: cast.append(torch.is_autocast_enabled("cpu")))
    latents, conditioning = model.noise(torch.arange(2)), model.encode(["a chef", "a baker"])
    inputs = latents, torch.tensor(500), conditioning
    with torch.no_grad():
        prediction, images = model.denoise(*inputs), model.decode(latents)
        with torch.autocast("cpu", torch.bfloat16):
            autocast_prediction, autocast_images = model.denoise(*inputs), model.decode(latents)
            assert torch.is_autocast_enabled("cpu")
    assert cast == [False, False, trained, False]
    assert torch.equal(autocast_images, images)
    assert trained or torch.equal(autocast_prediction, prediction)


def test_resolution_sets_the_size_of_latents_and_images(tiny_pipeline: Path) -> None:
    model = load(tiny_pipeline, resolution=24)
    assert model.latent_shape == (4, 12, 12)
    assert model.decode(model.noise(torch.arange(1))).shape == (1, 3, 24, 24)


@pytest.mark.parametrize("resolution", [0, -2, 15])
def test_resolution_must_fit(tiny_pipeline: Path, resolution: int) -> None:
    with pytest.raises(ValueError, match=f"`resolution` must be a multiple of 2 .* got {resolution}"):
        load(tiny_pipeline, resolution=resolution)


@pytest.mark.parametrize("name", ["DDIM", "StableDiffusionPipeline", "SchedulerMixinn", "__version__"])
def test_unknown_scheduler(tiny_pipeline: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"`scheduler` must be .* such as .*DDIMScheduler.* got '{name}'"):
        load(tiny_pipeline, name)


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match="`weights_dtype` must be float32, float16 or bfloat16, but got 'int8'"):
        StableDiffusion(weights_dtype="int8")


@pytest.mark.parametrize("path", ["stable-diffusion-v1-5/no-such-model", "./no/such/folder", "two words"])
def test_a_missing_model_is_one_line_that_says_what_to_do(offline, path: str, capfd) -> None:
    with pytest.raises(ValueError, match="no such folder, and not within reach") as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"the text-to-image model {path!r} could not be loaded (")
    assert ("hf download" in message) == (path == "stable-diffusion-v1-5/no-such-model")
    for way_out in (
        "local folder in the layout of Stable Diffusion",
        "--model.generator.init_args.path",
        "--config experiments/parts/portraits.yaml",
    ):
        assert way_out in message
    assert len(offline) == 1  # the hub's own retries would take minutes
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "broken",
    [
        "unet",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer",
        "scheduler",
    ],
)
def test_an_incomplete_folder_is_one_line(tiny_pipeline: Path, tmp_path: Path, broken: str, capfd) -> None:
    copy = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    target = copy / broken
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(ValueError, match="the text-to-image model .*copy' could not be loaded") as caught:
        load(copy)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_damaged_weights_are_one_line(tiny_pipeline: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    (copy / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="the text-to-image model .* could not be loaded") as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_hub_is_asked_only_if_there_is_no_folder(tiny_pipeline: Path, monkeypatch) -> None:
    requests = []
    monkeypatch.setattr(HfApi, "model_info", lambda self, path, **options: requests.append(path))
    load(tiny_pipeline)
    assert requests == []


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler"])
def test_latents_are_not_clipped_like_pixels(scheduler: str) -> None:
    """The miniature's stored settings do not mention clipping, and the default of diffusers is for pixels."""
    model = load("data/portraits/pipeline", scheduler)
    assert model.scheduler.config.clip_sample is False


def test_thresholding_is_rejected(tiny_pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    settings = json.loads((tiny_pipeline / "scheduler" / "scheduler_config.json").read_text())
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings | {"thresholding": True}))
    with pytest.raises(ValueError, match="has `thresholding`, which is for models of pixels: set it to false"):
        StableDiffusion(str(tmp_path)).check()
