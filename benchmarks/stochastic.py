"""Bias on validation prompts against steps and against seconds, where K of T steps carry gradient.

    python -m benchmarks.stochastic --output runs/stochastic

Trains the quickstart's miniature for gender with T = 8 and K = 1, T/4, T/2 random steps and all of them (exact), with
several seeds, and draws how the bias of the averaged adapter falls. Seconds are a run's median training step times the
number of steps, without validations. Runs that already exist are kept.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.step import positive

STEPS = 8
EXACT = STEPS
COUNTS = (1, STEPS // 4, STEPS // 2, EXACT)
BIAS, FLOOR, SPEED = "bias_gender/ema", "bias_gender/floor", "speed/images_per_second"
IMAGES = 8
VALIDATIONS = 5

Curve = list[tuple[int, float, float]]


def train(count: int, seed: int, options: argparse.Namespace) -> Path:
    """Train with K steps of gradient, and return the run's folder; a run that did not end starts over."""
    name = f"{label(count)}_seed_{seed}_steps_{options.steps}_prompts_{options.prompts}".replace(" ", "_")
    folder, log = options.output / name / "version_0", options.output / f"{name}.log"
    if (folder / "done").exists():
        return folder
    if folder.parent.exists():
        shutil.rmtree(folder.parent)
    options.output.mkdir(parents=True, exist_ok=True)
    path = (
        [] if count == EXACT else ["--model.sampler.gradient.steps=random", f"--model.sampler.gradient.count={count}"]
    )
    settings = {
        "seed_everything": seed, "name": name, "output": options.output, "model.sampler.steps": STEPS,
        "trainer.max_steps": options.steps, "trainer.val_check_interval": options.steps // VALIDATIONS,
        "trainer.check_val_every_n_epoch": "null", "trainer.log_every_n_steps": 1, "trainer.limit_test_batches": 0,
        "data.init_args.validation_prompts": options.prompts, "data.init_args.images_per_prompt": IMAGES,
    }  # fmt: skip
    command = [sys.executable, "-m", "fairness_dft.fit", "--config", "experiments/quickstart.yaml"]
    command += [f"--{key}={value}" for key, value in settings.items()]
    with log.open("w") as file:
        if subprocess.run(command + path, stdout=file, stderr=subprocess.STDOUT).returncode:
            raise SystemExit(f"{name} failed; what it said is in {log}")
    (folder / "done").touch()
    return folder


def label(count: int) -> str:
    """What a curve is called."""
    return "exact" if count == EXACT else f"{count} of {STEPS}"


def read(folder: Path) -> tuple[Curve, float]:
    """What a run logged: steps, seconds and bias of each validation, and the floor of the bias."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    each = statistics.median(IMAGES / event.value for event in events.Scalars(SPEED))
    curve = [(event.step, (event.step + 1) * each, event.value) for event in events.Scalars(BIAS)]
    return curve, events.Scalars(FLOOR)[-1].value


def main() -> None:
    """Train, print a table and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder for the runs and the picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, choices=COUNTS, help="which K")
    parser.add_argument("--steps", type=positive, default=400, help="of training")
    parser.add_argument("--prompts", type=positive, default=10, help="of validation")
    options = parser.parse_args()
    if options.steps < VALIDATIONS:
        parser.error(f"--steps must be at least {VALIDATIONS}, as many as there are validations")
    curves: dict[int, list[Curve]] = defaultdict(list)
    floors = []
    for seed in options.seeds:
        for count in options.counts:
            curve, floor = read(train(count, seed, options))
            print(f"{label(count)}, seed {seed}: {curve[-1][2]:.2f} after {curve[-1][1]:.0f} s", flush=True)
            curves[count].append(curve)
            floors.append(floor)
    show(curves, max(floors))
    draw(curves, max(floors), options.output / "stochastic.png")


def show(curves: dict[int, list[Curve]], floor: float) -> None:
    """Print the mean bias of the seeds at each validation, and the seconds of a step."""
    steps = [step for step, *_ in curves[min(curves)][0]]
    table = Table(
        "gradient of", *(f"{step + 1} steps" for step in steps), "a step (s)", title=f"bias, floor {floor:.2f}"
    )
    for count, runs in sorted(curves.items()):
        biases = [[bias for *_, bias in curve] for curve in runs]
        cells = [
            f"{statistics.mean(column):.2f} ({min(column):.2f} – {max(column):.2f})"
            for column in zip(*biases, strict=True)
        ]
        seconds = statistics.mean(curve[-1][1] / (curve[-1][0] + 1) for curve in runs)
        table.add_row(label(count), *cells, f"{seconds:.2f}")
    Console(width=150).print(table)


def draw(curves: dict[int, list[Curve]], floor: float, file: Path) -> None:
    """Draw the bias of each seed, thin, and their mean, against steps and against seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    for panel, axis, name in zip(panels, (0, 1), ("training steps", "seconds of training"), strict=True):
        for count, runs in sorted(curves.items()):
            points = list(zip(*runs, strict=True))
            across = [statistics.mean(point[axis] for point in column) for column in points]
            biases = [[point[2] for point in column] for column in points]
            (line,) = panel.plot(across, [statistics.mean(column) for column in biases], marker="o", label=label(count))
            for seed in zip(*biases, strict=True):
                panel.plot(across, seed, color=line.get_color(), alpha=0.3, linewidth=0.8)
        panel.axhline(floor, color="gray", linestyle=":", label="floor")
        panel.set(xlabel=name, xlim=(0, None), ylim=(0, None))
    panels[0].set(ylabel="gender bias on validation prompts")
    panels[1].legend(title="steps that\ncarry gradient", loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
