"""Compare pipelines for audits with diffusers: with and without a LoRA, and in the layout of SDXL."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from miniature import PORTRAITS
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fairness_dft.adapters.external import DiffusersAdapter
from fairness_dft.adapters.lora import UNetLoRA
from fairness_dft.diffusion.any_pipeline import AnyPipeline
from fairness_dft.diffusion.stable_diffusion import StableDiffusion
from fairness_dft.evaluate import main
from fairness_dft.fit import main as fit

PIPELINE = PORTRAITS / "pipeline"
QUICKSTART = f"--config={PORTRAITS.parents[1] / 'experiments' / 'quickstart.yaml'}"
FEW = [QUICKSTART, "--data.init_args.test_prompts=2", "--data.init_args.test_images_per_prompt=4"]


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the layout of SDXL, with random weights except for the miniature's decoder."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(PIPELINE, subfolder="tokenizer")
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": len(tokenizer), "projection_dim": 16, "max_position_embeddings": 77}
    vae = AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae")
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=vae.config.latent_channels, out_channels=vae.config.latent_channels,
        block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("xl")
    StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=EulerDiscreteScheduler(), tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text)),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_images_are_those_of_diffusers() -> None:
    model = AnyPipeline(str(PIPELINE), images_at_once=2)
    model.load()
    images = model.draw("a chef", torch.tensor([3, 5, 7]), 3, 1.75)
    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 5, 7)]
    settings = {"num_inference_steps": 3, "guidance_scale": 1.75, "output_type": "pt"}
    expected = pipeline(["a chef"] * 3, generator=generators, **settings).images
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


def test_a_lora_changes_the_finetuned_model_only(tmp_path: Path) -> None:
    trained, lora = StableDiffusion(str(PIPELINE)), UNetLoRA(rank=2)
    trained.load()
    lora.attach(trained)
    for parameter in lora.parameters():
        parameter.data.normal_(std=0.2)
    lora.save(tmp_path, "trained")
    base, finetuned = AnyPipeline(str(PIPELINE)), AnyPipeline(str(PIPELINE))
    base.load()
    finetuned.load()
    adapter = DiffusersAdapter(str(tmp_path))
    adapter.attach(finetuned)
    seeds = torch.tensor([1, 2])
    expected = base.draw("a chef", seeds, 2, 1.75)
    with adapter.using("original"):
        torch.testing.assert_close(finetuned.draw("a chef", seeds, 2, 1.75), expected, atol=1e-4, rtol=0)
    with adapter.using("ema"):
        assert (finetuned.draw("a chef", seeds, 2, 1.75) - expected).abs().max() > 0.05


def test_a_model_in_another_layout_is_audited(xl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = ["--model.generator=fairness_dft.diffusion.AnyPipeline", f"--model.generator.init_args.path={xl}"]
    monkeypatch.setattr("fairness_dft.evaluate.refuse_no_faces", lambda content: None)  # the images are noise
    main([*FEW, *generator, f"--output={tmp_path}", "--name=xl"])
    content = json.loads((tmp_path / "xl" / "results.json").read_text())
    side = content["bias"]["training"]["gender"]["original"]
    assert sum(map(sum, side["counts"])) + sum(side["no_face"]) == 8
    assert len(list((tmp_path / "xl" / "images").rglob("*.png"))) == 8


def test_finetuning_is_rejected() -> None:
    generator = [
        "--model.generator=fairness_dft.diffusion.AnyPipeline",
        f"--model.generator.init_args.path={PIPELINE}",
    ]
    with pytest.raises(ValueError, match="AnyPipeline can only be audited"):
        fit([QUICKSTART, *generator])


def test_a_folder_without_a_pipeline_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"^the text-to-image model .* could not be loaded \(there is no file 'model_index.json'\): give a local",
    ) as error:
        AnyPipeline(str(tmp_path)).check()
    assert "\n" not in str(error.value)
    assert "in the layout of a diffusers pipeline (--model.generator.init_args.path FOLDER)" in str(error.value)


def test_a_check_changes_nothing_and_a_second_load_keeps_the_pipeline() -> None:
    model = AnyPipeline(str(PIPELINE))
    state = dict(vars(model))
    model.check()
    assert vars(model) == state
    model.load()
    pipeline = model.pipeline
    model.load()
    assert model.pipeline is pipeline


def test_a_chunk_has_at_least_one_image() -> None:
    with pytest.raises(ValueError, match="`images_at_once` must be at least 1, but got 0"):
        AnyPipeline(str(PIPELINE), images_at_once=0)


def test_single_steps_are_rejected() -> None:
    model, latents = AnyPipeline(str(PIPELINE)), torch.zeros(1, 4, 8, 8)
    with pytest.raises(NotImplementedError, match="cannot encode prompts"):
        model.encode(["a chef"])
    with pytest.raises(NotImplementedError, match="cannot denoise single steps"):
        model.denoise(latents, torch.tensor(0), torch.zeros(1, 77, 16))
    with pytest.raises(NotImplementedError, match="cannot decode latents"):
        model.decode(latents)
