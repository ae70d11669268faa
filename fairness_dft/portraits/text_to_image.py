"""The miniature Stable Diffusion: variational autoencoder, tokenizer, text encoder and U-Net.

Latents are 4 x 8 x 8 for 64 px pictures (factor 8, as in Stable Diffusion). As there, the text encoder is trained
first, on captions and what their pictures show, and then frozen; the U-Net is trained on its embeddings with the usual
loss |ε − ε(z_t, t, caption)|², one caption in ten left empty for guidance.
"""

import json
from pathlib import Path
from typing import cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fairness_dft.portraits.training import Portraits, count_parameters, optimise

TOKENS = 32
BATCH = 32  # of the U-Net
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def train_autoencoder(portraits: Portraits, steps: int, seed: int) -> tuple[AutoencoderKL, dict[str, object]]:
    """Train the autoencoder: on the whole picture, with more weight on the face, then by small batches, the finest.

    The second stage takes two thirds as many steps as the first, the third twice as many, of a quarter of the size.
    """
    torch.manual_seed(seed)
    autoencoder = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)

    seconds = fit_autoencoder(autoencoder, portraits, steps, 2e-3, seed, face_weight=1.0)
    seconds += fit_autoencoder(autoencoder, portraits, steps * 2 // 3, 1.5e-3, seed + 100, face_weight=4.0)
    seconds += fit_autoencoder(autoencoder, portraits, steps * 2, 1e-3, seed + 200, face_weight=4.0, batch_size=8)
    deviation = encode(autoencoder, portraits, slice(0, 2000)).std().item()
    autoencoder.register_to_config(scaling_factor=1 / deviation)
    return autoencoder, {
        "parameters": count_parameters(autoencoder),
        "steps": steps + steps * 2 // 3 + steps * 2,
        "seconds": round(seconds),
    }


def fit_autoencoder(
    autoencoder: AutoencoderKL,
    portraits: Portraits,
    steps: int,
    rate: float,
    seed: int,
    face_weight: float,
    batch_size: int = 32,
) -> float:
    """Minimise L1 in pixels and in differences between neighbours, which keeps edges sharp; returns seconds.

    The region where faces are counts `face_weight` times: it is about half of the picture and holds what is judged.
    """
    weight = torch.ones(1, 1, 64, 64)
    weight[..., 12:52, 8:56] = face_weight
    weight /= weight.mean()

    def loss(step: int) -> Tensor:
        batch = portraits.images(torch.randint(len(portraits), (batch_size,))) * 2 - 1
        batch = batch.contiguous(memory_format=torch.channels_last)
        posterior: DiagonalGaussianDistribution = autoencoder.encode(batch).latent_dist
        error: Tensor = autoencoder.decode(posterior.sample()).sample - batch
        across, down = error.diff(dim=-1).abs() * weight[..., 1:], error.diff(dim=-2).abs() * weight[..., 1:, :]
        return (error.abs() * weight).mean() + 0.5 * (across.mean() + down.mean()) + 2e-6 * posterior.kl().mean()

    return optimise("autoencoder", [autoencoder], loss, steps, rate, seed, weight_decay=1e-4)


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, portraits: Portraits, index: slice, batch: int = 128) -> Tensor:
    """Means of the latents of some portraits, not yet scaled, with shape (n, 4, 8, 8)."""
    images = portraits.pictures[index]
    parts = images.split(batch)  # type: ignore[no-untyped-call]
    chunks = [autoencoder.encode(chunk.float() / 127.5 - 1).latent_dist.mean for chunk in parts]
    return torch.cat(chunks).contiguous()


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL, images: Tensor, batch: int = 128) -> Tensor:
    """Images through the autoencoder and back, with shape (n, 3, 64, 64), in [0, 1]."""
    parts = images.split(batch)  # type: ignore[no-untyped-call]
    chunks = [autoencoder(chunk * 2 - 1).sample / 2 + 0.5 for chunk in parts]
    return torch.cat(chunks).clamp(0, 1).contiguous()


def half_reconstructed(portraits: Portraits, autoencoder: AutoencoderKL) -> Portraits:
    """Put every second picture through the autoencoder, in place."""
    decoded = reconstruct(autoencoder, portraits.images(slice(0, None, 2)))
    portraits.pictures[::2] = (decoded * 255).round().to(torch.uint8)
    return portraits


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Return a CLIP tokenizer whose byte-pair vocabulary is learned from the captions: nearly every word one token."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=SPECIAL[1]))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Whitespace()])
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=list(SPECIAL),
        initial_alphabet=bytes_,
        end_of_word_suffix="</w>",
        min_frequency=20,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    pieces = [*SPECIAL, *bytes_, *(b + "</w>" for b in bytes_), *("".join(pair) for pair in merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)  # type: ignore[arg-type]


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids, padded and cut to the text encoder's length, int64 with shape (n, 32)."""
    encoded = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return cast(Tensor, encoded.input_ids)


def text_config(tokenizer: CLIPTokenizer, **changes: int) -> CLIPTextConfig:
    """Return the configuration of a text encoder of 2 layers, 64 wide, for this tokenizer."""
    settings = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextConfig(**{**settings, **changes})


def train_generator(
    autoencoder: AutoencoderKL, portraits: Portraits, steps: int, seed: int
) -> tuple[StableDiffusionPipeline, dict[str, object]]:
    """Train the text encoder on what captions say, then the U-Net on its embeddings, and assemble the pipeline."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(portraits.captions)
    text_encoder = CLIPTextModel(text_config(tokenizer))
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE, steps_offset=1),
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    text_steps = steps // 5
    seconds = fit_text_encoder(text_encoder, tokenize(tokenizer, portraits.captions), portraits, text_steps, seed)
    seconds += fit_unet(pipeline, portraits, steps, seed)
    return pipeline, {
        "parameters": {"unet": count_parameters(unet), "text_encoder": count_parameters(text_encoder)},
        "steps": {"unet": steps, "text_encoder": text_steps},
        "seconds": round(seconds),
        "portraits": len(portraits),
    }


def fit_text_encoder(text_encoder: CLIPTextModel, tokens: Tensor, portraits: Portraits, steps: int, seed: int) -> float:
    """Predict from a caption what its picture shows, by linear heads on the mean of the end tokens; returns seconds.

    This stands in for CLIP's pretraining. Linear heads that all captions share give the text space one direction
    for gender (and for the others): a caption that says "a woman" lies far out on it, one that names an occupation
    as far as its pictures lean. Trained with the U-Net alone it has none (an occupation's skew is then known to the
    U-Net only, occupation by occupation), and what finetuning changes on some occupations says nothing about others.
    """
    labels = {name: label for name, label in portraits.labels.items() if name != "subject"}
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(64, int(label.max()) + 1) for name, label in labels.items()})

    def loss(step: int) -> Tensor:
        index = torch.randint(len(tokens), (256,))
        ended = (tokens[index] == cast(int, text_encoder.config.eos_token_id))[..., None]
        states = text_encoder(tokens[index]).last_hidden_state
        summary = (states * ended).sum(1) / ended.sum(1)
        losses = (cross_entropy(head(summary), labels[name][index]) for name, head in heads.items())
        return cast(Tensor, sum(losses)) / len(heads)

    return optimise("text encoder", [text_encoder, heads], loss, steps, 2e-3, seed)


def fit_unet(pipeline: StableDiffusionPipeline, portraits: Portraits, steps: int, seed: int) -> float:
    """Minimise |ε − ε(z_t, t, caption)|² over the U-Net, the text encoder frozen; returns seconds."""
    latents = encode(pipeline.vae, portraits, slice(None)) * pipeline.vae.config.scaling_factor
    tokens = tokenize(pipeline.tokenizer, portraits.captions)
    empty = tokenize(pipeline.tokenizer, [""])
    scheduler = DDPMScheduler(**SCHEDULE)

    def loss(step: int) -> Tensor:
        index = torch.randint(len(portraits), (BATCH,))
        dropped = torch.rand(BATCH, 1) < 0.1
        with torch.no_grad():
            conditioning = pipeline.text_encoder(torch.where(dropped, empty, tokens[index])).last_hidden_state
        noise, timesteps = torch.randn(BATCH, 4, 8, 8), torch.randint(1000, (BATCH,))
        noisy = scheduler.add_noise(latents[index], noise, timesteps)
        return cast(Tensor, (pipeline.unet(noisy, timesteps, conditioning).sample - noise).pow(2).mean())

    return optimise("U-Net", [pipeline.unet], loss, steps, 1.5e-3, seed, average=0.999)


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save in the Stable Diffusion layout, the large parts in half precision.

    transformers loads a text encoder in the precision it is stored in, diffusers everything else in single
    precision; a half-precision text encoder would not fit the rest.
    """
    for part in (pipeline.vae, pipeline.unet):
        part.half()
    pipeline.save_pretrained(folder, safe_serialization=True)
    for part in (pipeline.vae, pipeline.unet):
        part.float()
    for file in (folder / "model_index.json", *folder.glob("*/config.json")):
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)  # where the machine that trained it kept it
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
