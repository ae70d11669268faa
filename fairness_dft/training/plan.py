"""Estimate time and memory of a run from a few measured steps: `python -m fairness_dft.fit --config ... --plan`.

A step costs more when a prompt meets a set of noises for the first time, because the original images are sampled too
(cold); later they are cached (warm). Cold and warm steps are measured in turns, and everything else is counted.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from torch import Tensor
from typing_extensions import override

from fairness_dft.adapters.base import Name
from fairness_dft.prompts.batches import PromptBatch
from fairness_dft.prompts.datamodule import PromptModule
from fairness_dft.training.module import FairFinetuning
from fairness_dft.training.originals import Original, Originals

MEASURED = 3
BLOCK = 4096  # bytes
SETTINGS = [
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
]


class LastOriginal(Originals):
    """Caches the last original only, and returns it to steps that are measured warm."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Original | None = None
        self.warm = False

    @override
    def get(self, batch: PromptBatch, steps: int, device: torch.device) -> Original | None:
        return self.last if self.warm else None

    @override
    def put(self, batch: PromptBatch, steps: int, original: Original) -> None:
        self.last = original


@dataclass
class Stopwatch(Callback):
    """Times whole training steps of one process; the first cold and the first warm one are not counted.

    Attributes:
        cold: Seconds of each step that samples the original images too.
        warm: Seconds of each step with cached originals.
        looks: Seconds to sample and measure one image of a validation or test.
        original_bytes: Bytes that the cache holds of one image, in memory.
        file_bytes: Bytes of its file on disk, in blocks of 4 KiB.
        originals: The cache that the steps use.
    """

    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    looks: list[float] = field(default_factory=list)
    original_bytes: int = 0
    file_bytes: int = 0
    started: float = 0.0
    originals: LastOriginal = field(default_factory=LastOriginal)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.originals.warm = len(self.cold) > len(self.warm)
        cast(FairFinetuning, pl_module).originals = self.originals  # a folder is neither read nor written
        finish(pl_module)
        self.started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, *args: Any
    ) -> None:
        finish(pl_module)
        seconds = time.perf_counter() - self.started
        if self.originals.warm:
            self.warm.append(seconds)
            return
        self.cold.append(seconds)
        module = cast(FairFinetuning, pl_module)
        noise = module.generator.noise(batch.seeds)
        few = noise[: module.evaluation_sampler.images_at_once or len(noise)]
        with trainer.precision_plugin.forward_context():
            self.looks.append(timed(lambda: self.look(module, batch, few), module) / len(few))
        assert self.originals.last is not None  # a cold step has just put it
        tensors = self.originals.last.tensors()
        self.original_bytes = sum(values.nbytes for values in tensors.values()) // len(noise)
        file = len(save({name: values[0].cpu().clone() for name, values in tensors.items()}))
        self.file_bytes = -(-file // BLOCK) * BLOCK

    @torch.no_grad()
    def look(self, module: FairFinetuning, batch: PromptBatch, noise: Tensor) -> None:
        """Sample some images as a test does, and measure them as its monitors do."""
        sampler = module.evaluation_sampler
        images = module.generate("original", sampler, batch, noise, sampler.draw_steps(module.randomness()))
        module.judge(images)
        for network in module.features:
            sampler.map_chunks(network, images)


def finish(module: LightningModule) -> None:
    """Wait until a GPU has finished its work."""
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)


def timed(function: Callable[[], None], module: LightningModule) -> float:
    """Return the seconds that a call takes."""
    finish(module)
    started = time.perf_counter()
    function()
    finish(module)
    return time.perf_counter() - started


@dataclass(frozen=True)
class Plan:
    """The amount of work of a run.

    Attributes:
        steps: Optimizer steps.
        batches: Training batches, over all steps.
        images: N, the images of each batch.
        sets: Pairs of a prompt and a set of noises, whose originals are sampled once; as many as batches where noise is
            not repeated.
        validation: Images of all validations together, of all models.
        test: Images of the test, of all models.
    """

    steps: int
    batches: int
    images: int
    sets: int
    validation: int
    test: int


def plan(trainer: Trainer, data: PromptModule) -> Plan:
    """Count the work of a run.

    Args:
        trainer: The trainer of the run.
        data: Its prompts; those of training are set up.

    Raises:
        ValueError: If the run has no end, or an interval is 0.
    """
    if not trainer.val_check_interval:
        raise ValueError("--trainer.val_check_interval must be above 0; --trainer.limit_val_batches=0 never validates")
    loader, epochs = data.train_dataloader(), trainer.max_epochs or -1
    epoch = limited(len(loader), trainer.limit_train_batches)
    ends = [trainer.max_steps * trainer.accumulate_grad_batches] * (trainer.max_steps >= 0)
    ends += [epoch * epochs] * (epochs >= 0)
    if not ends:
        raise ValueError("--plan: this run has no end; give --trainer.max_steps")
    batches = min(ends)
    sets = batches
    if data.noise_pool:
        visits = batches / len(loader) * np.bincount(loader.slots)  # of each prompt, each with one set of noises
        expected = data.noise_pool * (1 - (1 - 1 / data.noise_pool) ** visits).sum()
        sets = min(batches, round(expected))
    every = trainer.val_check_interval
    every = every if isinstance(every, int) else int(epoch * every)
    if trainer.check_val_every_n_epoch is not None:
        every = max(every, epoch * trainer.check_val_every_n_epoch)
    validated = limited(len(data.prompts("validation")), trainer.limit_val_batches)
    validation = batches // max(1, every) * validated * data.validation_images_per_prompt * 3
    test = limited(len(data.prompts("test")), trainer.limit_test_batches) * data.test_images_per_prompt * 2
    steps = batches // trainer.accumulate_grad_batches
    return Plan(steps, batches, data.images_per_prompt, sets, validation, test)


def limited(batches: int, limit: int | float) -> int:
    """Return how many batches Lightning takes where the limit is a number or a share of them."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def print_plan(trainer: Trainer, settings: dict[str, Any], module: FairFinetuning, data: PromptModule) -> None:
    """Measure some steps, and print the estimate of the whole run; no file is written, and the module stays as it is.

    Args:
        trainer: The trainer of the run.
        settings: Its arguments, of which `SETTINGS` are used.
        module: What is trained; loaded.
        data: Its prompts.

    Raises:
        ValueError: If the run has no end.
    """
    todo, stopwatch = plan(trainer, data), Stopwatch()
    names = "logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"
    off: dict[str, Any] = dict.fromkeys(names, False)
    settings = {name: settings[name] for name in SETTINGS}
    few = Trainer(**settings, **off, max_steps=2 * (MEASURED + 1), limit_val_batches=0, callbacks=[stopwatch])
    with unchanged(module):
        sampler = module.sampler
        sampler.steps = sampler.steps_max = (sampler.steps + sampler.steps_max) // 2  # so that steps can be compared
        few.fit(module, data)
    if few.is_global_zero:
        show(todo, stopwatch, few)


@contextmanager
def unchanged(module: FairFinetuning) -> Iterator[None]:
    """Within, a module may take steps; afterwards its adapter, its sampler and its originals are as before."""
    adapters: dict[Name, dict[str, Tensor]] = {name: module.adapter.state_dict(name) for name in ("trained", "ema")}
    sampler, originals = module.sampler, module.originals
    module.sampler = copy(sampler)
    try:
        yield
    finally:
        module.sampler, module.originals = sampler, originals
        for name, state in adapters.items():
            module.adapter.load_state_dict(state, name)


def show(todo: Plan, measured: Stopwatch, trainer: Trainer) -> None:
    """Print the plan with its time and memory."""
    cold, warm, look = (sum(values[-MEASURED:]) / MEASURED for values in (measured.cold, measured.warm, measured.looks))
    training = todo.sets * cold + (todo.batches - todo.sets) * warm
    looks = look / trainer.world_size
    kept, on_disk = (todo.sets * todo.images * each for each in (measured.original_bytes, measured.file_bytes))
    if trainer.strategy.root_device.type == "cuda":
        memory, where = torch.cuda.max_memory_allocated(), "on each GPU"
    else:
        memory, where = peak_memory(), "of this process"
    table = Table("", "how much", "time", title=f"Estimate from {MEASURED} cold and {MEASURED} warm steps")
    table.add_row("one step", f"{todo.images} images", duration(cold))
    table.add_row("  with cached original images", "", duration(warm))
    table.add_row("training", f"{todo.steps} steps, {todo.batches * todo.images} images", duration(training))
    table.add_row("  cache of the original images", f"{todo.sets * todo.images} images, {size(kept)}", "")
    table.add_row("    on disk, with --model.originals_folder", size(on_disk), "")
    table.add_row("validation", f"{todo.validation} images", duration(todo.validation * looks))
    table.add_row("test", f"{todo.test} images", duration(todo.test * looks))
    table.add_row("all", "", duration(training + (todo.validation + todo.test) * looks))
    if memory:
        table.add_row(f"memory {where}", size(memory), "")
    Console().print(table)
    print("Nothing was written. Loading, image files and the independent classifier are not counted.")


def peak_memory() -> int:
    """Return the most memory that this process has held, in bytes; 0 where the system does not say, as on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def duration(seconds: float) -> str:
    """Format seconds for people."""
    if seconds < 100:
        return f"{seconds:.2f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Format bytes for people."""
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"
