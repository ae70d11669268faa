"""Pipelines that are only looked at: drawn as diffusers draws, with and without a LoRA, in other layouts too."""

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
from fairness_dft.evaluate import main

PIPELINE = PORTRAITS / "pipeline"
QUICKSTART = f"--config={PORTRAITS.parents[1] / 'experiments' / 'quickstart.yaml'}"
FEW = [QUICKSTART, "--data.init_args.test_prompts=2", "--data.init_args.test_images_per_prompt=4"]


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature in SDXL's layout, with random weights but for the miniature's decoder."""
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


def test_it_draws_what_diffusers_draws() -> None:
    ours = AnyPipeline(str(PIPELINE), images_at_once=2)
    ours.load()
    drawn = ours.draw("a chef", torch.tensor([3, 5, 7]), 3, 1.75)
    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE)
    noises = [torch.Generator().manual_seed(seed) for seed in (3, 5, 7)]
    settings = {"num_inference_steps": 3, "guidance_scale": 1.75, "output_type": "pt"}
    torch.testing.assert_close(drawn, pipeline(["a chef"] * 3, generator=noises, **settings).images, atol=1e-4, rtol=0)


def test_a_lora_changes_the_finetuned_model_alone(tmp_path: Path) -> None:
    from fairness_dft.diffusion.stable_diffusion import StableDiffusion

    trained, lora = StableDiffusion(str(PIPELINE)), UNetLoRA(rank=2)
    trained.load()
    lora.attach(trained)
    for parameter in lora.parameters():
        parameter.data.normal_(std=0.2)
    lora.save(tmp_path, "trained")
    frozen, looked = AnyPipeline(str(PIPELINE)), AnyPipeline(str(PIPELINE))
    frozen.load()
    looked.load()
    adapter = DiffusersAdapter(str(tmp_path))
    adapter.attach(looked)
    seeds = torch.tensor([1, 2])
    expected = frozen.draw("a chef", seeds, 2, 1.75)
    with adapter.using("original"):
        torch.testing.assert_close(looked.draw("a chef", seeds, 2, 1.75), expected, atol=1e-4, rtol=0)
    with adapter.using("ema"):
        assert (looked.draw("a chef", seeds, 2, 1.75) - expected).abs().max() > 0.05


def test_a_model_in_another_layout_is_audited(xl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = ["--model.generator=fairness_dft.diffusion.AnyPipeline", f"--model.generator.init_args.path={xl}"]
    monkeypatch.setattr("fairness_dft.evaluate.refuse_no_faces", lambda content: None)  # it draws noise
    main([*FEW, *generator, f"--output={tmp_path}", "--name=xl"])
    content = json.loads((tmp_path / "xl" / "results.json").read_text())
    side = content["bias"]["training"]["gender"]["original"]
    assert sum(map(sum, side["counts"])) + sum(side["no_face"]) == 8
    assert len(list((tmp_path / "xl" / "images").rglob("*.png"))) == 8


def test_it_is_not_finetuned() -> None:
    from fairness_dft.fit import main as fit

    generator = [
        "--model.generator=fairness_dft.diffusion.AnyPipeline",
        f"--model.generator.init_args.path={PIPELINE}",
    ]
    with pytest.raises(ValueError, match="AnyPipeline is only audited"):
        fit([QUICKSTART, *generator])


def test_a_folder_without_a_pipeline_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded|could not be loaded|no file named|model_index"):
        AnyPipeline(str(tmp_path)).check()
