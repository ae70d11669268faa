"""How the cost of a training step grows: with N, T, K, resolution and processes.

    python -m benchmarks.scaling --scale miniature

One setting changes at a time. Each row is measured in a process of its own: seconds of a step whose originals are
remembered (warm) and of one that samples them (cold), and in another process how far its memory rises. Then a model is
fitted,

    seconds = calls × a + images × b + c,

where `calls` counts calls of the denoising network on one image in one branch of guidance, a way back as one call:
2 N T to sample, as many for the originals, and 2 N K to make calls again and 2 N K on the way back; and `images` how
many are decoded, embedded and classified: N, twice where the originals are. a is the time of one call; b and c are what
is left. Rows of another resolution or with several processes are predicted, a and b in proportion to the pixels, not
fitted.
"""

import argparse
import json
import logging
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls

from benchmarks.networks import Scale
from benchmarks.step import Way, add_options, add_sizes, machine, measure, of_micro_batches, printed_by, scale_of
from fairness_dft.sampling.gradients import GradientPath
from fairness_dft.sampling.sampler import Sampler

GROWTH = {
    "miniature": dict(images=(8, 16, 32, 64), steps=(8, 16, 32), resolution=(64, 128), processes=(1, 2)),
    "sd15-cpu": dict(images=(1, 2, 4), steps=(4, 8, 16), resolution=(128, 192), processes=(1,)),
    "sd15-gpu": dict(images=(8, 16, 24, 32, 64), steps=(8, 16, 20, 32), resolution=(256, 512), processes=(1,)),
}


@dataclass(frozen=True)
class Setting:
    """What one row is measured of.

    Attributes:
        images: N, of each process.
        steps: T.
        count: K.
        resolution: in pixels.
        processes: how many.
    """

    images: int
    steps: int
    count: int
    resolution: int
    processes: int = 1

    def calls(self, cold: bool) -> int:
        """Calls of the denoising network in a step, on one image in one branch, a way back counted as one."""
        return 2 * self.images * (self.steps * (1 + cold) + 2 * self.count)

    def looks(self, cold: bool) -> int:
        """Images that are decoded, embedded and classified."""
        return self.images * (1 + cold)


@dataclass
class Row:
    """What was measured of a setting: seconds, warm and cold, and bytes of a warm step."""

    setting: Setting
    seconds: dict[str, float]
    memory: int


def settings(scale: Scale, growth: dict[str, tuple[int, ...]]) -> Iterator[Setting]:
    """The setting of a scale, and those in which one thing is another."""
    base = Setting(scale.images, scale.steps, scale.steps, scale.resolution)
    yield base
    yield from (replace(base, images=images) for images in growth["images"] if images != base.images)
    yield from (replace(base, steps=steps, count=steps) for steps in growth["steps"] if steps != base.steps)
    yield from (replace(base, count=count) for count in sorted({1, base.steps // 4, base.steps // 2} - {0, base.steps}))
    yield from (replace(base, resolution=size) for size in growth["resolution"] if size != base.resolution)
    yield from (replace(base, processes=processes) for processes in growth["processes"] if processes != 1)


def take(setting: Setting, options: argparse.Namespace) -> dict[str, tuple[float, int]]:
    """Seconds and bytes of a step, warm and cold, in this process."""
    scale = replace(scale_of(options), images=setting.images, steps=setting.steps, resolution=setting.resolution)
    every = setting.count == setting.steps
    path = GradientPath() if every else GradientPath(steps="random", count=setting.count)
    sampler = Sampler(gradient=path, **of_micro_batches(scale))
    taken = {"warm": Way(sampler, warm=True), "cold": Way(sampler)}
    measure(scale, taken, options, setting.processes)
    return {name: (statistics.median(way.seconds), way.memory) for name, way in taken.items()}


def measured(setting: Setting, options: argparse.Namespace) -> Row:
    """A row, from processes of its own."""
    command = [sys.executable, "-m", "benchmarks.scaling", *sys.argv[1:], "--one", json.dumps(asdict(setting))]

    def child(more: list[str], environment: dict[str, str]) -> dict[str, tuple[float, int]]:
        threads = {"OMP_NUM_THREADS": str(options.threads)}
        printed = printed_by(command + more, os.environ | threads | environment)
        return json.loads(next(line for line in printed.splitlines() if line.startswith("{")))

    # So that what is freed is given back, and the resident memory tells what is held.
    trimmed = child(["--rounds", "1"], {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"})
    timed = child([], {})
    row = Row(setting, {name: timed[name][0] for name in timed}, trimmed["warm"][1])
    print(row, file=sys.stderr, flush=True)
    return row


def fit(rows: list[Row], base: Setting) -> tuple[np.ndarray, list[float]]:
    """The model's a, b and c, from the rows of the base's resolution on one process, and what it predicts of all."""

    def features(row: Row, cold: bool) -> tuple[float, float, float]:
        area = (row.setting.resolution / base.resolution) ** 2
        return row.setting.calls(cold) * area, row.setting.looks(cold) * area, 1

    fitted = [row for row in rows if (row.setting.resolution, row.setting.processes) == (base.resolution, 1)]
    seconds = [row.seconds[name] for row in fitted for name in ("warm", "cold")]
    matrix = np.array([features(row, cold) for row in fitted for cold in (False, True)], dtype=float)
    weights = 1 / np.array(seconds)  # so that each row's error is relative
    found, _ = nnls(matrix * weights[:, None], np.ones(len(seconds)))
    return found, [float(np.dot(features(row, False), found)) for row in rows]


def main() -> None:
    """Measure, fit, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    add_sizes(parser)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.set_defaults(rounds=3, only=None, no_count=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.one:
        print(json.dumps(take(Setting(**options.one), options)), flush=True)
        return
    rows = [measured(setting, options) for setting in settings(scale_of(options), GROWTH[options.scale])]
    found, predicted = fit(rows, rows[0].setting)
    show(rows, found, predicted, f"{options.scale}, {options.precision}, {machine(options.threads)}")
    if options.output:
        options.output.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def show(rows: list[Row], found: np.ndarray, predicted: list[float], title: str) -> None:
    """Print the table and the model."""
    columns = "N", "T", "K", "pixels", "processes", "warm (s)", "predicted", "cold (s)", "memory (MiB)"
    table = Table(*columns, title=title)
    for row, prediction in zip(rows, predicted, strict=True):
        of = row.setting
        numbers = of.images, of.steps, of.count, of.resolution, of.processes
        seconds = f"{row.seconds['warm']:.2f}", f"{prediction:.2f}", f"{row.seconds['cold']:.2f}"
        table.add_row(*map(str, numbers), *seconds, f"{row.memory / 2**20:.0f}")
    Console(width=120).print(table)
    call, image, step = (1e3 * value for value in found)
    print(f"a call {call:.2f} ms, an image {image:.2f} ms, a step {step:.2f} ms")


if __name__ == "__main__":
    main()
