"""Where the time of one training step goes, by torch.profiler.

    python -m benchmarks.profile --scale miniature

An exact step whose originals are remembered. Each part is a range of the profiler; the way back is cut where the
gradient reaches the images, the latents, and the embeddings of the prompts. What is in no range is the rest: losses,
logging, Lightning. On a GPU a part is from the first of its kernels to the last, with what the GPU waits in between.
"""

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from typing_extensions import override

from benchmarks.step import Comparison, add_options, add_sizes, machine, measure, scale_of, ways
from fairness_dft.sampling.replay import RecomputedBackward

WAY = "exact, warm"
NETWORKS = ("U-Net", "VAE", "features")  # what a range of these begins with is inside of them
SAMPLING, BACK = "U-Net, sampling", "U-Net, again and back"
FEATURES_BACK, VAE_BACK, TEXT_BACK = "features and classifier, back", "VAE, again and back", "text encoder, back"


class Profiled(Comparison):
    """Takes steps under the profiler.

    Attributes:
        shares: seconds of each range in the last step.
        seconds: of that step.
    """

    shares: dict[str, float]
    seconds: float

    @override
    def take(self, step: Callable[[], None]) -> tuple[float, int]:
        on_gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
        with ranges(self) as names, profile(activities=activities) as profiler:
            seconds, memory = super().take(step)
        device = DeviceType.CUDA if on_gpu else DeviceType.CPU  # a range is there twice on a GPU: launches and kernels
        events = (event for event in profiler.key_averages() if event.device_type == device)
        found = {event.key: event for event in events if event.key in names}
        times = {name: found[name].device_time_total if on_gpu else found[name].cpu_time_total for name in found}
        self.shares, self.seconds = {name: time / 1e6 for name, time in times.items()}, seconds
        return seconds, memory


@contextmanager
def ranges(module: Comparison) -> Iterator[set[str]]:
    """Within, the parts of a step are ranges of the profiler; yields their names."""
    backwards = Backwards()
    forwards = {
        (module.generator, "encode"): "text encoder",
        (module.generator, "guided"): SAMPLING,
        (module.generator, "decode"): "VAE",
        (module, "embed"): "features",
        (module.judge, "submit"): "faces",
        (module, "assign"): "targets",
    }
    for (owner, method), name in forwards.items():
        setattr(owner, method, backwards.outside(name, getattr(owner, method)))
    cut(module, backwards)
    again = RecomputedBackward.__call__

    def recompute(self: RecomputedBackward, *arguments: Any) -> Any:
        backwards.enter(BACK)
        found = again(self, *arguments)
        backwards.enter(TEXT_BACK)
        return found

    RecomputedBackward.__call__ = recompute
    back = module.manual_backward

    def backward(loss: Tensor) -> None:
        # Entered where the gradient begins: on a GPU the way back is in a thread of its own, as every range is.
        loss.register_hook(lambda gradient: backwards.enter(FEATURES_BACK))
        back(loss)
        backwards.leave()

    module.manual_backward = backward
    try:
        yield {*forwards.values(), "classifier", FEATURES_BACK, VAE_BACK, BACK, TEXT_BACK}
    finally:
        RecomputedBackward.__call__ = again
        for owner, method in (*forwards, (module, "manual_backward")):
            delattr(owner, method)


def cut(module: Comparison, backwards: "Backwards") -> None:
    """Begin the VAE's way back where the gradient has reached the images, and name what waits for the faces."""
    submit = module.judge.submit

    def submit_and_wait(images: Tensor) -> Callable[[], Any]:
        if images.requires_grad:
            images.register_hook(lambda gradient: backwards.enter(VAE_BACK))
        return backwards.outside("classifier", submit(images))

    module.judge.submit = submit_and_wait


class Backwards:
    """The range that the way back is in, if it has begun."""

    def __init__(self) -> None:
        self.range: record_function | None = None

    def enter(self, name: str) -> None:
        """Leave the range, and enter the next."""
        self.leave()
        self.range = record_function(name)
        self.range.__enter__()

    def leave(self) -> None:
        """Leave the range."""
        if self.range is not None:
            self.range.__exit__(None, None, None)
        self.range = None

    def outside(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is a range of its own, but on the way back, where it belongs to that."""

        @wraps(function)
        def ranged(*arguments: Any, **options: Any) -> Any:
            if self.range is not None:
                return function(*arguments, **options)
            with record_function(name):
                return function(*arguments, **options)

        return ranged


def main() -> None:
    """Profile a step and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    add_sizes(parser)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    parser.set_defaults(rounds=1, only=None, no_count=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scale = scale_of(options)
    module = measure(scale, {WAY: ways(scale)[WAY]}, options, kind=Profiled)
    show(module.shares, module.seconds, f"{options.scale}: {scale}, {options.precision}, {machine()}")
    if options.output:
        found = {"machine": machine(), "scale": str(scale), "seconds": module.seconds, "ranges": module.shares}
        options.output.write_text(json.dumps(found, indent=1))


def inside(shares: dict[str, float], seconds: float) -> float:
    """The share of a step inside U-Net, VAE and feature networks."""
    return sum(value for name, value in shares.items() if name.startswith(NETWORKS)) / seconds


def show(shares: dict[str, float], seconds: float, title: str) -> None:
    """Print all ranges, the longest first."""
    table = Table("part of the step", "seconds", "share", title=title)
    rest = seconds - sum(shares.values())
    for name, value in sorted(shares.items(), key=lambda pair: -pair[1]):
        table.add_row(name, f"{value:.3f}", f"{value / seconds:.1%}")
    table.add_row("the rest", f"{rest:.3f}", f"{rest / seconds:.1%}")
    Console(width=120).print(table)
    print(f"{inside(shares, seconds):.1%} inside U-Net, VAE and feature networks, of {seconds:.3f} s")


if __name__ == "__main__":
    main()
