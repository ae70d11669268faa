"""Two processes that talk over gloo do what one process with the whole batch does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_cli import MINIATURE, ROOT, SMALL


def fit(folder: Path, *more: str) -> Path:
    """Run the command as a user does; return its run folder."""
    more = (f"--output={folder}", "--name=run", "--adapter_average.decay=0.5", *more)  # so that two steps show in it
    command = [sys.executable, "-m", "fairness_dft.fit", *MINIATURE, *SMALL, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all("Seed set to 0" in line for line in done.stderr.splitlines()), done.stderr  # nothing to worry about
    return folder / "run" / "version_0"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    alone = fit(tmp_path_factory.mktemp("alone"))
    together = fit(tmp_path_factory.mktemp("together"), "--trainer.devices=2", "--trainer.strategy=ddp")
    return alone, together


def test_two_processes_train_the_same_adapter(runs):
    for name in ("trained", "ema"):
        file = Path("adapters", "step_000002", name, "pytorch_lora_weights.safetensors")
        alone, together = (load_file(run / file) for run in runs)
        grown = [tensor.abs().max() for key, tensor in alone.items() if key.endswith("up.weight")]
        assert max(grown) > 1e-3  # it was trained
        for key, tensor in alone.items():  # by norm: Adam makes much of a gradient that is nearly zero
            assert (together[key] - tensor).norm() <= 1e-3 * tensor.norm(), key


def test_two_processes_measure_the_same(runs):
    alone, together = (json.loads((run / "results.json").read_text()) for run in runs)
    for judge, attributes in alone["bias"].items():
        for attribute, models in attributes.items():
            assert together["bias"][judge][attribute]["original"] == models["original"]
    for measure, models in alone["kept"].items():
        for model, value in models.items():
            assert together["kept"][measure][model] == pytest.approx(value, abs=1e-3)
