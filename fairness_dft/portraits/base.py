"""The bias of the miniature before any finetuning, over the paper's test occupations."""

from pathlib import Path

import torch

from fairness_dft.classifiers.image_classifier import FacePresence, ImageClassifier
from fairness_dft.classifiers.judge import Judge
from fairness_dft.diffusion.stable_diffusion import StableDiffusion
from fairness_dft.faces.detectors import InsightFace
from fairness_dft.faces.finders import DetectedFaces
from fairness_dft.metrics.fairness_metric import FairnessMetric
from fairness_dft.portraits.classifiers import CROP, MARGIN
from fairness_dft.portraits.detector import SCRFD_FOLDER
from fairness_dft.portraits.draw import SIZE
from fairness_dft.prompts.datamodule import OccupationPrompts
from fairness_dft.sampling.sampler import Sampler

ATTRIBUTES = ("gender", "race", "age")
SAMPLER = Sampler(steps=6, guidance_scale=1.75, checkpoint=False, decode_chunk=64)  # as the experiments test


def judges(folder: Path) -> dict[str, Judge]:
    """Return the judge that finetuning learns from, "training", and the one that only evaluates, "independent".

    Args:
        folder: Where detector and classifiers lie.
    """
    crops = DetectedFaces([InsightFace(str(folder / SCRFD_FOLDER), size=(SIZE, SIZE))], MARGIN, CROP)
    evaluation = str(folder / "classifier_evaluation")
    return {
        "training": Judge(ImageClassifier(str(folder / "classifier_training")), crops),
        "independent": Judge(ImageClassifier(evaluation), FacePresence(evaluation)),
    }


@torch.no_grad()
def base_bias(folder: Path, images_per_prompt: int = 48) -> dict[str, dict[str, object]]:
    """Bias of each attribute by both judges, as `BiasSummary.as_dict` gives it.

    Args:
        folder: Where pipeline, detector and classifiers lie.
        images_per_prompt: How many images of each of the 50 test occupations.
    """
    generator = StableDiffusion(str(folder / "pipeline"))
    generator.load()
    batches = OccupationPrompts(test_images_per_prompt=images_per_prompt).test_dataloader()
    both = judges(folder)
    for judge in both.values():
        judge.load()
    metrics = {
        (name, attribute): FairnessMetric(judge.classes(attribute), len(batches))
        for name, judge in both.items()
        for attribute in ATTRIBUTES
    }
    for batch in batches:
        images = SAMPLER(generator, batch.prompt.text, generator.noise(batch.seeds))
        for name, judge in both.items():
            verdict = judge(images)
            for attribute in ATTRIBUTES:
                metrics[name, attribute].update(batch.index, verdict.classes(attribute), verdict.has_face)
    figures: dict[str, dict[str, object]] = {
        "sampler": {"steps": SAMPLER.steps, "guidance_scale": SAMPLER.guidance_scale}
    }
    figures |= {name: {} for name in both}
    for (name, attribute), metric in metrics.items():
        figures[name][attribute] = metric.compute().as_dict()
    return figures
