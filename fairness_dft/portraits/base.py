"""The bias of the miniature before any finetuning, over the paper's test occupations."""

from pathlib import Path

import torch

from fairness_dft.classifiers import FacePresence, ImageClassifier, Judge
from fairness_dft.diffusion import StableDiffusion
from fairness_dft.metrics import FairnessMetric
from fairness_dft.prompts import OccupationPrompts
from fairness_dft.sampler import Sampler

ATTRIBUTES = ("gender", "race", "age")
SAMPLER = Sampler(steps=6, guidance_scale=1.25, checkpoint=False, decode_chunk=64)  # as the experiments test


@torch.no_grad()
def base_bias(folder: Path, images_per_prompt: int = 48) -> dict:
    """Bias of each attribute by both judges, as `BiasSummary.as_dict` gives it.

    Args:
        folder: where pipeline and classifiers lie.
        images_per_prompt: how many images of each of the 50 test occupations.
    """
    generator = StableDiffusion(str(folder / "pipeline"))
    generator.load()
    paths = {"training": str(folder / "classifier_training"), "independent": str(folder / "classifier_evaluation")}
    judges = {name: Judge(ImageClassifier(path), FacePresence(path)) for name, path in paths.items()}
    batches = OccupationPrompts(test_images_per_prompt=images_per_prompt).test_dataloader()
    for judge in judges.values():
        judge.load()
    metrics = {
        (name, attribute): FairnessMetric(judge.classes(attribute), len(batches))
        for name, judge in judges.items()
        for attribute in ATTRIBUTES
    }
    for batch in batches:
        images = SAMPLER(generator, batch.prompt.text, generator.noise(batch.seeds))
        for name, judge in judges.items():
            verdict = judge(images)
            for attribute in ATTRIBUTES:
                metrics[name, attribute].update(batch.index, verdict.classes(attribute), verdict.face)
    figures: dict[str, dict] = {"sampler": {"steps": SAMPLER.steps, "guidance_scale": SAMPLER.guidance_scale}}
    figures |= {name: {} for name in judges}
    for (name, attribute), metric in metrics.items():
        figures[name][attribute] = metric.compute().as_dict()
    return figures
