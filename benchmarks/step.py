"""One training step: the authors' way beside ours, on the same networks, seeds and loss, in one run.

    python -m benchmarks.step --scale miniature

The ways take turns. A first round, which is not timed, counts floating point operations, in units of one sampling
pass of the denoising network (N images, T steps, with guidance, no graph), or only warms up in two steps (--no-count);
gradients are compared with the authors' of the same round. Times are set beside the authors' round by round. Memory is
the most that CUDA allocated during the step; on a CPU it is how far the resident memory of a child process, which takes
this one way and has warmed up, rises above what it held before.
"""

import argparse
import copy
import gc
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from benchmarks.authors import authors_step
from benchmarks.networks import SCALES, Scale, parts
from fairness_dft.prompts.batches import PromptBatch
from fairness_dft.prompts.files import Prompt
from fairness_dft.sampling.gradients import GradientPath
from fairness_dft.sampling.sampler import Sampler
from fairness_dft.training.fairness_loss import FairnessLoss

PRECISIONS = "32-true", "bf16-mixed", "16-mixed"
WEIGHTS = "float32", "bfloat16", "float16"
PROMPT = "A photo of the face of a firefighter, a person"


@dataclass
class Way:
    """One way to take a training step, and what was measured of it.

    Attributes:
        sampler: ours; None for the authors' step.
        warm: whether what is needed of the original images is remembered.
        seconds: of each timed round.
        memory: peak, in bytes.
        passes: operations of the denoising network, in sampling passes, its forward-equivalents.
        operations: of everything, in the same unit.
        gradient: of the last round.
        cosine: of the gradient with the authors'.
        difference: from the authors' gradient, relative to its length.
    """

    sampler: Sampler | None = None
    warm: bool = False
    seconds: list[float] = field(default_factory=list)
    memory: int = 0
    passes: float | None = None
    operations: float | None = None
    gradient: Tensor | None = None
    cosine: float | None = None
    difference: float | None = None


def ways(scale: Scale) -> dict[str, Way]:
    """All ways that are compared, the authors' first."""
    found = {"authors": Way()}
    shared = of_micro_batches(scale)
    kept = dict(checkpoint=False, decode_chunk=scale.micro_batch)
    exact, quarter = GradientPath(weights="authors"), max(1, scale.steps // 4)
    some = {count: GradientPath(weights="authors", steps="random", count=count) for count in sorted({1, quarter})}
    settings = {
        "exact": {},
        "exact, activations kept": kept,
        **{f"{count} of {scale.steps} steps": dict(gradient=path) for count, path in some.items()},
        f"{quarter} of {scale.steps} steps, activations kept": kept | dict(gradient=some[quarter]),
    }
    for name, own in settings.items():
        if scale.resolution == 512 and "checkpoint" in own:
            continue  # terabytes
        for warm in (False, True):
            sampler = Sampler(**{"gradient": exact} | shared | own)
            found[f"{name}, {'warm' if warm else 'cold'}"] = Way(sampler, warm)
    return found


def of_micro_batches(scale: Scale) -> dict[str, int | float]:
    """Settings of our sampler that take about the memory of the authors' micro-batches in decoder and features.

    The decoder's activations are kept of as many images at a time as their micro-batch has, in calls of half of them.
    What that saves is spent on the denoising network: three rows for each image, where theirs is two branches.
    """
    sampling = dict(steps=scale.steps, guidance_scale=scale.guidance_scale, images_at_once=3 * scale.micro_batch)
    return sampling | dict(decode_chunk=-(-scale.micro_batch // 2), decode_kept=scale.micro_batch)


class Comparison(FairnessLoss):
    """Takes the ways in turns, round after round, and changes no weight."""

    def __init__(self, scale: Scale, compared: dict[str, Way], count: bool, **arguments) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False
        self.scale, self.compared, self.count = scale, compared, count

    @override
    def on_train_start(self) -> None:
        # The factor B of a new LoRA is zero, which leaves half of the gradient zero too.
        generator = torch.Generator().manual_seed(0)
        for parameter in self.trained():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)

    def trained(self) -> list[Tensor]:
        """The parameters that have a gradient."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def randomness(self) -> torch.Generator:
        """Return the random generator of this round, the same for every way."""
        return torch.Generator().manual_seed(self.trainer.fit_loop.total_batch_idx // len(self.compared))

    @override
    def report_step(self, *values) -> None:
        pass

    @override
    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        name = list(self.compared)[batch_idx % len(self.compared)]
        way = self.compared[name]
        first = batch_idx < len(self.compared)
        # Features and classifier of the authors' micro-batches keep their activations.
        self.sampler = way.sampler or Sampler(
            self.scale.steps, guidance_scale=self.scale.guidance_scale, checkpoint=False,
            decode_chunk=self.scale.micro_batch,
        )  # fmt: skip
        if first and not self.count:
            self.sampler = copy.copy(self.sampler)
            self.sampler.steps = self.sampler.steps_max = 2
        if way.warm:
            self.original(batch, self.generator.noise(batch.seeds), self.sampler.steps)
        else:
            self.originals.cached.clear()
        for parameter in self.trained():
            parameter.grad = None

        def step() -> None:
            if way.sampler is None:
                sizes = self.scale.micro_batch, self.scale.sampling_batch
                authors_step(self, batch, *sizes, self.randomness, self.manual_backward)
            else:
                self.manual_backward(self.loss(batch, self.randomness()))

        if first:
            with FlopCounterMode(display=False) if self.count else nullcontext() as counter:
                step()
            if counter:
                a_pass = self.sampling_pass(batch)
                way.passes, way.operations = denoising_operations(counter) / a_pass, counter.get_total_flops() / a_pass
            return
        seconds, memory = self.take(step)
        way.seconds.append(seconds)
        way.memory = max(way.memory, memory)
        self.compare(way)
        told = f"{seconds:.3f} s, {memory / 2**20:.0f} MiB, cosine {way.cosine:.6f}"
        print(f"{name}: {told}", file=sys.stderr, flush=True)

    def take(self, step: Callable[[], None]) -> tuple[float, int]:
        """Take a step that is measured: its seconds and bytes."""
        return measured(step, self.device)

    def compare(self, way: Way) -> None:
        """Set the gradient beside the authors' of this round."""
        way.gradient = torch.cat([parameter.grad.flatten().double().cpu() for parameter in self.trained()])
        reference = self.compared["authors"].gradient if "authors" in self.compared else way.gradient
        way.cosine = float(cosine_similarity(way.gradient, reference, dim=0))
        way.difference = float((way.gradient - reference).norm() / reference.norm())

    def sampling_pass(self, batch: PromptBatch) -> int:
        """Floating point operations of the denoising network in one sampling pass."""
        noise = self.generator.noise(batch.seeds)
        context = self.generator.encode([""]).expand(len(noise), -1, -1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.generator.guided(noise, torch.tensor(1), context, context, self.scale.guidance_scale)
        return counter.get_total_flops() * self.scale.steps

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.trained(), lr=0.0)


def denoising_operations(counter: FlopCounterMode) -> int:
    """Floating point operations of the denoising network, forwards and back.

    The counter does not see whose the way back of a call made again is; so it is what no other network takes.
    """
    networks = {name: sum(of.values()) for name, of in counter.get_flop_counts().items() if "." not in name}
    others = networks.keys() - {"Global", "UNet2DConditionModel"}
    return networks["Global"] - sum(networks[name] for name in others)


def measured(function: Callable[[], None], device: torch.device) -> tuple[float, int]:
    """Seconds and peak bytes above what was held before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        function()
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak: man 5 proc
    before, start = resident("VmRSS"), time.perf_counter()
    function()
    return time.perf_counter() - start, resident("VmHWM") - before


def resident(name: str) -> int:
    """Resident memory of this process in bytes: what it holds now (VmRSS), or the most it held (VmHWM)."""
    return 1024 * int(re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


class OneBatch(LightningDataModule):
    """The same prompt and the same seeds, again and again."""

    def __init__(self, images: int, batches: int) -> None:
        super().__init__()
        prompt = Prompt(PROMPT, "firefighter", "occupation")
        self.batch = PromptBatch(prompt=prompt, index=0, noise_set=0, seeds=torch.arange(images))
        self.batches = batches

    @override
    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.batch] * self.batches, batch_size=None)


def measure(
    scale: Scale,
    compared: dict[str, Way],
    options: argparse.Namespace,
    processes: int = 1,
    kind: type[Comparison] = Comparison,
) -> Comparison:
    """Fill in what the ways are measured to be, and return what took them."""
    batches = (options.rounds + 1) * len(compared)  # the first round warms up
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    with torch.device("cuda" if accelerator == "gpu" and scale.networks == "sd15" else "cpu"):
        arguments = parts(scale, options.weights, options.compile) | dict(sampler=Sampler(scale.steps))
        module = kind(scale, compared, not options.no_count, **arguments)
        module.configure_model()
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    precision = dict(precision=options.precision)
    if options.precision == "16-mixed":
        device = accelerator.replace("gpu", "cuda")
        scaler = torch.amp.GradScaler(device, init_scale=options.loss_scale)
        precision = dict(plugins=MixedPrecision("16-mixed", device, scaler))
    trainer = Trainer(
        accelerator=accelerator, devices=processes, strategy="auto" if processes == 1 else "ddp", max_epochs=1,
        limit_val_batches=0, use_distributed_sampler=False, **precision, **off,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no validation and few workers are meant
        trainer.fit(module, OneBatch(scale.images, batches))
    return module


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every measurement of steps."""
    parser.add_argument("--scale", choices=SCALES, default="miniature")
    parser.add_argument("--rounds", type=positive, default=5, help="timed ones, after one that is not")
    parser.add_argument("--precision", default="32-true", choices=PRECISIONS, help="of the trainer")
    parser.add_argument("--loss-scale", type=float, default=2.0**16, help="what 16-mixed multiplies the loss by")
    parser.add_argument("--weights", default="float32", choices=WEIGHTS, help="data type of the frozen generator")
    parser.add_argument("--compile", action="store_true", help="compile the U-Net's transformer blocks")


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Options for a part of a scale."""
    parser.add_argument("--images", type=positive, help="another N")
    parser.add_argument("--micro-batch", type=positive, help="another micro-batch")
    parser.add_argument("--steps", type=positive, help="another T")


def scale_of(options: argparse.Namespace) -> Scale:
    """The scale that was asked for, with what was given in its place."""
    given = {name: getattr(options, name) for name in ("images", "micro_batch", "steps")}
    return replace(SCALES[options.scale], **{name: value for name, value in given.items() if value})


def positive(text: str) -> int:
    """A number of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    add_sizes(parser)
    parser.add_argument("--no-count", action="store_true", help="do not count floating point operations")
    parser.add_argument("--ways", nargs="+", help="these ways alone, beside the authors'")
    parser.add_argument("--only", help="measure one way and print it as JSON")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    scale = scale_of(options)

    compared = ways(scale)
    if unknown := set(options.ways or ()) - compared.keys():
        parser.error(f"--ways: {', '.join(map(repr, sorted(unknown)))} is none of {', '.join(map(repr, compared))}")
    if options.ways and not options.only:
        compared = {name: way for name, way in compared.items() if name in ("authors", *options.ways)}
    if options.only and options.only not in compared:
        parser.error(f"--only: {options.only!r} is none of {', '.join(map(repr, compared))}")
    if options.output and not options.output.parent.is_dir():
        parser.error(f"--output: there is no folder {options.output.parent}")
    if options.only:
        compared, options.no_count = {options.only: compared[options.only]}, True
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.only:
        measure(scale, compared, options)
        print(json.dumps(compared[options.only].memory))
        return
    # Before this process takes memory itself.
    resident = {} if torch.cuda.is_available() else {name: resident_memory(name) for name in compared}
    measure(scale, compared, options)
    for name, memory in resident.items():
        compared[name].memory = memory
    show(
        compared,
        f"{options.scale}: {scale}, {options.precision}, weights in {options.weights}, {machine()}"
        + ", compiled" * options.compile,
    )
    if options.output:
        figures = {name: figures_of(way) for name, way in compared.items()}
        options.output.write_text(json.dumps({"machine": machine(), "scale": str(scale), "ways": figures}, indent=1))


def resident_memory(name: str) -> int:
    """Peak bytes of a way's step in a process of its own, above what it held before."""
    command = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:], "--only", name, "--rounds", "1"]
    # So that what is freed is given back, and the resident memory tells what is held.
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment = own | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return json.loads(printed_by(command, environment).splitlines()[-1])


def printed_by(command: list[str], environment: dict[str, str]) -> str:
    """What a child process printed; what it complained of, where it failed."""
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode:
        raise SystemExit(f"{child.stderr[-2000:]}\nstatus {child.returncode} of {' '.join(command)}")
    return child.stdout


def machine(threads: int | None = None) -> str:
    """What this was measured on, with so many CPU threads a process, by default this one's."""
    threads = threads or torch.get_num_threads()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{threads} CPU thread{'s'[: threads > 1]}"
    return f"{device}, torch {torch.__version__}"


def figures_of(way: Way) -> dict[str, float | list[float] | None]:
    """What was measured, for JSON."""
    names = ("seconds", "memory", "passes", "operations", "cosine", "difference")
    return {name: getattr(way, name) for name in names}


def show(compared: dict[str, Way], title: str) -> None:
    """Print all ways beside the authors'."""
    columns = "seconds", "spread", "of the authors'", "memory (MiB)", "of the authors'", "U-Net passes", "of everything"
    table = Table("way", *columns, "cosine", "difference", title=title)
    authors = compared["authors"]
    for name, way in compared.items():
        seconds = statistics.median(way.seconds)
        ratio = statistics.median(ours / theirs for ours, theirs in zip(way.seconds, authors.seconds, strict=True))
        spread = max(way.seconds) - min(way.seconds)
        values = f"{seconds:.3f}", f"{spread:.3f}", f"{ratio:.2f}", f"{way.memory / 2**20:.0f}"
        counted = ("-" if number is None else f"{number:.2f}" for number in (way.passes, way.operations))
        gradient = f"{way.cosine:.6f}", f"{way.difference:.1e}"
        table.add_row(name, *values, f"{way.memory / authors.memory:.2f}", *counted, *gradient)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
