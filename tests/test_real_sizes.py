"""Train one step of the whole method on Stable Diffusion 1.5 and 2.1 at their real sizes, with random weights.

These tests need gigabytes of memory and minutes. Run them with `pytest -m large`.
"""

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from miniature import finetuning, prompts, trainer
from tiny import tiny_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

from fairness_dft.adapters.combined import Combined
from fairness_dft.adapters.lora import TextEncoderLoRA, UNetLoRA
from fairness_dft.adapters.prompt_prefix import PromptPrefix
from fairness_dft.diffusion.stable_diffusion import StableDiffusion
from fairness_dft.sampling.sampler import Sampler

pytestmark = pytest.mark.large
resource = pytest.importorskip("resource", reason="Windows has no such module")

# Their published config.json files, where these differ from the defaults of diffusers and transformers.
TEXT_ENCODERS = {
    "1.5": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    "2.1": dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
    ),
}
UNETS = {
    "1.5": dict(cross_attention_dim=768, sample_size=64),
    "2.1": dict(
        cross_attention_dim=1024, sample_size=96, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    ),
}
MILLIONS = {"1.5": 860, "2.1": 866}  # parameters of the U-Net, from the model cards


def build(folder: Path, version: str) -> Path:
    """Save a pipeline of random weights, in half precision, in the layout and sizes of the real one."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction" if version == "2.1" else "epsilon",
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 77
    unet = UNet2DConditionModel(**UNETS[version]).half()
    assert round(sum(parameter.numel() for parameter in unet.parameters()) / 1e6) == MILLIONS[version]
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49408, eos_token_id=49407, **TEXT_ENCODERS[version])).half()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
    ).half()  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["1.5", "2.1"])
def folder(request, tmp_path_factory) -> Iterator[Path]:
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 12 * 2**30:
        pytest.skip("needs 12 GiB of memory")
    made = build(tmp_path_factory.mktemp("pipeline"), request.param)
    gc.collect()
    yield made
    shutil.rmtree(made)


def check_one_step(folder: Path, tmp_path: Path, resolution: int, images: int, steps: int, **settings):
    """Run one optimizer step on one prompt, with the same classes as the command."""
    generator = StableDiffusion(str(folder), resolution=resolution, weights_dtype=settings.pop("dtype", "float32"))
    adapter = Combined([TextEncoderLoRA(), UNetLoRA(), PromptPrefix()])
    sampler = Sampler(steps=steps, guidance_scale=7.5, decode_chunk=1)
    module = finetuning(generator=generator, adapter=adapter, sampler=sampler, weight_decay=0.0)
    module.configure_model()
    before = adapter.state_dict("trained")
    fit = trainer(tmp_path, max_steps=1, gradient_clip_val=100.0, **settings)
    fit.fit(module, prompts(images_per_prompt=images))
    assert fit.callback_metrics["loss/total"].isfinite()
    after = adapter.state_dict("trained")
    assert all(tensor.isfinite().all() for tensor in after.values())
    # The factor B of every product is initially zero, so A has no gradient yet.
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved == {key for key in after if "up.weight" in key or "lora_B" in key or key == "<fair>"}


def test_one_step_at_low_resolution(folder, tmp_path, capsys):
    check_one_step(folder, tmp_path, resolution=64, images=2, steps=2)
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with capsys.disabled():
        print(f"\npeak memory so far: {gigabytes:.1f} GiB of main memory")


@pytest.mark.gpu
def test_one_step_at_full_resolution(folder, tmp_path, capsys):
    torch.cuda.reset_peak_memory_stats()
    check_one_step(
        folder, tmp_path, 512, images=4, steps=20, dtype="bfloat16", accelerator="gpu", precision="bf16-mixed"
    )
    with capsys.disabled():
        print(f"\npeak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of the GPU, 4 images of 512 px")
