"""Set up the shipped miniature for tests: few images, few steps."""

from pathlib import Path

from lightning import Trainer

from fairness_dft.adapters.lora import TextEncoderLoRA
from fairness_dft.attributes import Attribute
from fairness_dft.classifiers.judge import Judge
from fairness_dft.diffusion.stable_diffusion import StableDiffusion
from fairness_dft.features import Clip, Dino
from fairness_dft.portraits.base import judges
from fairness_dft.prompts.datamodule import OccupationPrompts
from fairness_dft.sampling.sampler import Sampler
from fairness_dft.training.module import FairFinetuning

PORTRAITS = Path(__file__).parents[1] / "data" / "portraits"


def judge(which: str = "training") -> Judge:
    """Return the face finder with the "training" or the "independent" classifier, not loaded yet."""
    return judges(PORTRAITS)[which]


def finetuning(**settings) -> FairFinetuning:
    """Return a module on the miniature with a small adapter and three sampling steps."""
    defaults = dict(
        generator=StableDiffusion(str(PORTRAITS / "pipeline")),
        judge=judge(),
        attribute=Attribute("gender"),
        adapter=TextEncoderLoRA(rank=4),
        sampler=Sampler(steps=3, guidance_scale=2.0, checkpoint=False),
        features=[Clip(str(PORTRAITS / "clip")), Dino(str(PORTRAITS / "dino"))],
        learning_rate=1e-3,
    )
    return FairFinetuning(**{**defaults, **settings})


def prompts(**settings) -> OccupationPrompts:
    """Return occupations of the drawn portraits, with few images per prompt."""
    defaults = dict(
        train_subjects=str(PORTRAITS / "training_subjects.txt"),
        images_per_prompt=6,
        validation_images_per_prompt=4,
        test_images_per_prompt=4,
        validation_prompts=2,
        test_prompts=2,
    )
    return OccupationPrompts(**{**defaults, **settings})


def trainer(folder: Path, **settings) -> Trainer:
    """Return a quiet trainer on one CPU process."""
    defaults = dict(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        log_every_n_steps=1,
    )
    return Trainer(**{**defaults, **settings})
