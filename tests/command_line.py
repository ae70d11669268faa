"""Build the arguments of a small run on the miniature, and run a command that must fail with one line."""

from pathlib import Path

import pytest

from fairness_dft.cli.commands import run_main
from fairness_dft.fit import main

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
PORTRAITS = ["--config", str(EXPERIMENTS / "parts" / "portraits.yaml")]
MINIATURE = ["--config", str(EXPERIMENTS / "gender.yaml"), *PORTRAITS]
SMALL = [
    "--data.init_args.images_per_prompt=4",
    "--data.init_args.validation_images_per_prompt=2",
    "--data.init_args.test_images_per_prompt=4",
    "--data.init_args.validation_prompts=1",
    "--data.init_args.test_prompts=2",
    "--model.sampler.steps=2",
    "--model.sampler.steps_max=2",
    "--model.evaluation_sampler.steps=2",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.enable_progress_bar=false",
]


def small(tmp_path, *more):
    """Return the arguments of a run of two short steps."""
    return [*MINIATURE, *SMALL, f"--output={tmp_path}", *more]


def refused(capsys, arguments):
    """Run a command that fails; return its only line on standard error."""
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: main(arguments))
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("Seed set")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]
