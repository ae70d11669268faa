"""What ships in data/portraits is what its manifest says."""

import json
from pathlib import Path

import pytest
import torch
from miniature import PORTRAITS, finetuning, judge, prompts

from fairness_dft.portraits.base import SAMPLER
from fairness_dft.portraits.judges import accuracies
from fairness_dft.portraits.training import draw_portraits
from fairness_dft.portraits.world import occupations

MANIFEST = json.loads((PORTRAITS / "manifest.json").read_text())


def test_at_most_16_megabytes():
    assert sum(file.stat().st_size for file in PORTRAITS.rglob("*") if file.is_file()) <= 16e6


def test_loads_as_a_stable_diffusion_pipeline():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(PORTRAITS / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(0)
    image = pipeline("a portrait of a chef", num_inference_steps=4, guidance_scale=2.0, generator=random).images[0]
    assert image.size == (64, 64)


@pytest.mark.parametrize("which", ["training", "evaluation"])
def test_classifiers_read_held_out_draws(which):
    network = judge(which).classifier
    network.load()
    test = draw_portraits(1_000, seed=777, balanced=True)
    with_occupation = "occupation" in network.heads
    found = accuracies(network.network, test.images(slice(None)), test.labels, with_occupation)
    for head in ("gender", "race", "age", "face"):
        assert found[head] >= 0.98, (head, found)
        assert MANIFEST[f"{which}_classifier"]["accuracy_drawn"][head] >= 0.98
        assert found[head] == pytest.approx(MANIFEST[f"{which}_classifier"]["accuracy_drawn"][head], abs=0.015)


def test_classifiers_differ_in_architecture():
    assert MANIFEST["training_classifier"]["architecture"] != MANIFEST["evaluation_classifier"]["architecture"]


def test_base_is_as_biased_as_the_manifest_says():
    """Ten occupations again, at fewer images than the manifest's fifty."""
    figures = MANIFEST["base_bias"]
    assert figures["training"]["gender"]["bias"] >= 0.6
    assert figures["training"]["race"]["bias"] >= 0.35
    module = finetuning()
    module.configure_model()
    data = prompts(test_prompts=10, test_images_per_prompt=24)
    module.evaluation_sampler = SAMPLER
    biases = []
    for batch in data.test_dataloader():
        seen = module.judge(module.compare(batch, ("original",))["original"])
        women = seen.classes("gender")[seen.face].double().mean()
        biases.append(abs(2 * women - 1).item())
    expected = figures["training"]["gender"]["per_prompt"][:10]
    assert sum(biases) / 10 == pytest.approx(sum(expected) / 10, abs=0.12)


def test_world_has_the_occupations_of_the_evaluation_head():
    network = judge("evaluation").classifier
    network.load()
    assert network.heads["occupation"] == tuple(job.name for job in occupations())


def test_nothing_is_pickled():
    assert not [file for file in PORTRAITS.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    assert Path(PORTRAITS, "pipeline", "model_index.json").is_file()
