"""Two processes that talk over gloo do what one process with the whole batch does, also stopped and resumed."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import MINIATURE, ROOT, SMALL
from faces_world import SCRFD, build_arcface
from safetensors.torch import load_file, save_file

from fairness_dft.faces.realism import NETWORK


def fit(folder: Path, *more: str) -> Path:
    """Run the command as a user does; return its run folder."""
    more = (f"--output={folder}", "--name=run", *more)
    command = [sys.executable, "-m", "fairness_dft.fit", *MINIATURE, *SMALL, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all("Seed set to 0" in line for line in done.stderr.splitlines()), done.stderr  # nothing to worry about
    return max((folder / "run").iterdir())


@pytest.fixture(scope="module")
def realism(tmp_path_factory) -> dict:
    """Settings of face realism, with a random network and a bank of its embeddings."""
    folder = tmp_path_factory.mktemp("realism")
    network = build_arcface(folder / "arcface.onnx")
    metadata = {NETWORK: hashlib.sha256(network.read_bytes()).hexdigest()}
    bank = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    save_file({"embeddings": bank}, folder / "bank.safetensors", metadata=metadata)
    embedding = {"class_path": "fairness_dft.faces.FaceEmbedding", "init_args": {"path": str(network)}}
    settings = {"bank": str(folder / "bank.safetensors"), "embedding": embedding, "confidence": 0.5}
    return {"class_path": "fairness_dft.faces.FaceRealism", "init_args": settings}


def detecting(realism: dict) -> list[str]:
    """Flags: faces are found by the shipped detector, and compared with the bank."""
    detector = {"class_path": "fairness_dft.faces.InsightFace", "init_args": {"name": SCRFD, "size": [64, 64]}}
    finder = {"class_path": "fairness_dft.faces.DetectedFaces", "init_args": {"detectors": [detector], "size": 64}}
    return [f"--model.judge.faces={json.dumps(finder)}", f"--model.face_realism={json.dumps(realism)}"]


EVERY = tuple(
    f"{{class_path: fairness_dft.{kind}}}"
    for kind in ("adapters.TextEncoderLoRA", "adapters.UNetLoRA", "prompt_prefix.PromptPrefix")
)
COMBINED = ("--model.adapter=fairness_dft.adapters.Combined", f"--model.adapter.parts=[{', '.join(EVERY)}]")
JOINT = (
    "--model.attribute.name=[gender, race]",  # eight classes, more than the images of a rank
    "--model.schedule=constant",
    "--model.semantics_weight=3",  # more of it amplifies rounding: where x is still o, its gradient is nothing else
    "--adapter_average.decay=0.5",  # so that five steps show in it
    "--trainer.val_check_interval=3",
)
# A pixel that rounding puts on the other side of where it is clamped changes a gradient by a thousandth.
DOUBLE = "--trainer.precision=64-true"
TWO = ("--trainer.devices=2", "--trainer.strategy=ddp")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, realism) -> tuple[Path, Path]:
    """One process for five steps; two for three and, from their checkpoint, for two more."""
    joint = (*JOINT, *detecting(realism), DOUBLE)
    alone = fit(tmp_path_factory.mktemp("alone"), *joint, "--trainer.max_steps=5")
    folder = tmp_path_factory.mktemp("together")
    begun = fit(folder, *joint, *TWO, "--trainer.max_steps=3", "--trainer.limit_test_batches=0")
    [checkpoint] = (begun / "checkpoints").glob("*step=3.ckpt")
    return alone, fit(folder, *joint, *TWO, "--trainer.max_steps=5", f"--ckpt_path={checkpoint}")


def test_two_processes_train_the_same_adapter(runs):
    for name in ("trained", "ema"):
        file = Path("adapters", "step_000005", name, "pytorch_lora_weights.safetensors")
        alone, together = (load_file(run / file) for run in runs)
        grown = [tensor.abs().max() for key, tensor in alone.items() if key.endswith("up.weight")]
        assert max(grown) > 1e-3  # it was trained
        for key, tensor in alone.items():  # by norm: Adam makes much of a gradient that is nearly zero
            assert (together[key] - tensor).norm() <= 1e-3 * tensor.norm(), key


def test_two_processes_have_the_same_gradient(runs):
    assert_same_gradient(runs[0], runs[1].parent / "version_0")


def test_two_processes_that_make_calls_again_have_the_same_gradient(tmp_path):
    """Three rows at a time, so that each process cuts its own across steps, branches and images."""
    again = ("--model.sampler.checkpoint=true", "--model.sampler.images_at_once=3", "--model.semantics_weight=0")
    again += (DOUBLE, "--trainer.max_steps=3", "--trainer.val_check_interval=3", "--trainer.limit_test_batches=0")
    assert_same_gradient(fit(tmp_path / "alone", *again), fit(tmp_path / "together", *again, *TWO))


def assert_same_gradient(*runs: Path) -> None:
    """By Adam's first moment after three steps, which is a weighted sum of their gradients."""
    alone, together = (
        torch.load(next((run / "checkpoints").glob("*step=3.ckpt")), weights_only=True)["optimizer_states"][0]["state"]
        for run in runs
    )
    assert alone.keys() == together.keys() and len(alone) > 20
    for number, moments in alone.items():
        gradient = moments["exp_avg"]
        assert gradient.norm() > 0
        assert (together[number]["exp_avg"] - gradient).norm() <= 1e-6 * gradient.norm(), number


def test_two_processes_measure_the_same(runs):
    alone, together = (json.loads((run / "results.json").read_text()) for run in runs)
    for judge, attributes in alone["bias"].items():
        for attribute, models in attributes.items():
            assert together["bias"][judge][attribute]["original"] == models["original"]
    for measure, models in alone["kept"].items():
        for model, value in models.items():
            assert together["kept"][measure][model] == pytest.approx(value, abs=1e-3)


def test_a_rank_without_any_face_does_not_hang_the_other(tmp_path, realism):
    blind = ("--model.judge.faces=odd_ranks.BlindRank", f"--model.face_realism={json.dumps(realism)}")
    run = fit(tmp_path, *TWO, *blind, *COMBINED, "--model.sampler.checkpoint=true")
    content = json.loads((run / "results.json").read_text())["bias"]["training"]["gender"]["ema"]
    assert (content["images"], content["no_face_images"]) == (8, 4)
    state = load_file(run / "adapters" / "step_000002" / "trained" / "pytorch_lora_weights.safetensors")
    grown = [tensor.abs().max() for key, tensor in state.items() if "up.weight" in key or "lora_B" in key]
    assert len(grown) > 40 and min(grown) > 1e-3
