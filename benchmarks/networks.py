"""What is measured: the miniature with its own weights, or networks of real sizes with random ones.

Time and memory do not depend on what the weights are, so Stable Diffusion 1.5, CLIP ViT-H/14 and DINOv2 ViT-B/14 are
built from their published configurations; for two CPU cores CLIP ViT-B/32 and DINOv2 ViT-S/14, which always see 224 px,
so that the U-Net at 128 px is most of a step there too. No face is found in noise, so the whole frame is classified, by
a MobileNetV2 of 224 px in place of the authors' MobileNetV3.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from typing_extensions import override

from fairness_dft.adapters.lora import TextEncoderLoRA
from fairness_dft.attributes import Attribute
from fairness_dft.classifiers.image_classifier import ImageClassifier
from fairness_dft.classifiers.judge import Judge
from fairness_dft.diffusion.diffusers_model import find_scheduler
from fairness_dft.diffusion.stable_diffusion import StableDiffusion
from fairness_dft.features import Clip, Dino
from fairness_dft.files import resolve
from fairness_dft.networks.frozen_layers import forget_inputs
from fairness_dft.networks.preprocessing import Preprocessing
from fairness_dft.portraits.base import judges

MEAN, DEVIATION = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
PORTRAITS = "data/portraits"


@dataclass(frozen=True)
class Scale:
    """How large a measurement is.

    Attributes:
        networks: the miniature, or Stable Diffusion 1.5 and feature networks of real sizes.
        resolution: of the images, in pixels.
        images: N.
        micro_batch: images that a network works on at a time where it builds a graph.
        sampling_batch: and where it does not.
        steps: T.
        guidance_scale: s.
        features: CLIP and DINOv2 of these sizes, where the networks are not the miniature's.
    """

    networks: Literal["miniature", "sd15"]
    resolution: int
    images: int
    micro_batch: int
    sampling_batch: int
    steps: int
    guidance_scale: float
    features: tuple[str, str] = ("ViT-H/14", "ViT-B/14")


CLIPS = {
    "ViT-H/14": dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14,
        projection_dim=1024, hidden_act="gelu",
    ),
    "ViT-B/32": dict(),
}  # fmt: skip
DINOS = {"ViT-B/14": dict(), "ViT-S/14": dict(hidden_size=384, num_attention_heads=6)}

SCALES = {
    "miniature": Scale(
        "miniature", 64, images=8, micro_batch=8, sampling_batch=8, steps=8, guidance_scale=1.75
    ),
    "sd15-cpu": Scale(
        "sd15", 128, images=4, micro_batch=4, sampling_batch=4, steps=16, guidance_scale=7.5,
        features=("ViT-B/32", "ViT-S/14"),
    ),
    "sd15-gpu": Scale("sd15", 512, images=24, micro_batch=4, sampling_batch=8, steps=20, guidance_scale=7.5),
}  # fmt: skip


class RandomStableDiffusion(StableDiffusion):
    """Stable Diffusion 1.5 by its configuration, with random weights, built on the default device."""

    @override
    def check(self) -> None:
        """Need no files."""

    @override
    def load(self) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

        if hasattr(self, "unet"):
            return
        with torch.device("cpu"):
            self.scheduler = find_scheduler(self.scheduler_name)(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
            )
        # Its words are the miniature's, its length the real one's.
        self.tokenizer = CLIPTokenizer.from_pretrained(resolve(PORTRAITS) / "pipeline" / "tokenizer")
        self.tokenizer.model_max_length = 77
        text_encoder = CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        self.text_encoder = CLIPTextModel(text_encoder)
        self.unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=512,
        )
        self.latent_shape = (4, *self._latent_size())
        self.to(self.weights_dtype).freeze()


class RandomClip(Clip):
    """The vision tower of a CLIP, with random weights; its path says of which size."""

    @override
    def load(self) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        self.preprocessing = Preprocessing((224, 224), MEAN, DEVIATION, "bicubic")
        self.network = CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIPS[self.path])).requires_grad_(False).eval()


class RandomDino(Dino):
    """DINOv2 with random weights; its path says of which size."""

    @override
    def load(self) -> None:
        from transformers import Dinov2Config, Dinov2Model

        self.preprocessing = Preprocessing((224, 224), MEAN, DEVIATION, "bicubic")
        config = Dinov2Config(image_size=518, patch_size=14, **DINOS[self.path])
        self.network = Dinov2Model(config).requires_grad_(False).eval()


class RandomClassifier(ImageClassifier):
    """MobileNetV2 with random weights that tells two classes of gender."""

    @override
    def load(self) -> None:
        from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

        self.preprocessing = Preprocessing((224, 224), MEAN, DEVIATION)
        network = MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=2))
        self.network = network.requires_grad_(False).eval()
        forget_inputs(self.network)
        self.columns = {"gender": {"woman": 0, "man": 1}}
        self.heads = {"gender": ("woman", "man")}


def parts(scale: Scale, weights_dtype: str = "float32", compiled: bool = False) -> dict:
    """The arguments of `FairnessLoss` that say what is trained, by what, towards what.

    Args:
        scale: what to build.
        weights_dtype: of the frozen generator.
        compiled: whether its transformer blocks are.
    """
    options = dict(resolution=scale.resolution, weights_dtype=weights_dtype, compile=compiled)
    common = dict(adapter=TextEncoderLoRA(rank=50), attribute=Attribute("gender", confidence=0.55))
    if scale.networks == "miniature":
        return common | dict(
            generator=StableDiffusion(f"{PORTRAITS}/pipeline", **options),
            judge=judges(resolve(PORTRAITS))["training"],
            features=[Clip(f"{PORTRAITS}/clip"), Dino(f"{PORTRAITS}/dino")],
        )
    clip, dino = scale.features
    return common | dict(
        generator=RandomStableDiffusion("random", **options),
        judge=Judge(RandomClassifier("random")),
        features=[RandomClip(clip), RandomDino(dino)],
    )
