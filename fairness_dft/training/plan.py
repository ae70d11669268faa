"""What a run will take, from a few measured steps: `python -m fairness_dft.fit --config ... --plan`.

A step costs more the first time that a prompt meets a set of noises, when the frozen model's images are sampled too. So
steps of either kind are measured in turns, and every other number follows from counting.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from torch import Tensor
from typing_extensions import override

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
    """Remembers what was met last, and lets a step have it if it is to be measured with its originals known."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Original | None = None
        self.known_now = False

    @override
    def get(self, batch: PromptBatch, steps: int, device: torch.device) -> Original | None:
        return self.last if self.known_now else None

    @override
    def put(self, batch: PromptBatch, steps: int, original: Original) -> None:
        self.last = original


@dataclass
class Stopwatch(Callback):
    """Times whole training steps, on one process; the first of either kind only warms up.

    Attributes:
        cold: seconds of each step in which the frozen model's images were sampled too.
        warm: seconds of each step that knew what it needs of them.
        looks: seconds to sample and look at one image of a test or validation.
        original_bytes: what is remembered of one image, in memory.
        file_bytes: what its file would take on disk, in blocks of 4 KiB.
        originals: what the steps find remembered.
    """

    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    looks: list[float] = field(default_factory=list)
    original_bytes: int = 0
    file_bytes: int = 0
    started: float = 0.0
    originals: LastOriginal = field(default_factory=LastOriginal)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: FairFinetuning, *args: Any) -> None:
        self.originals.known_now = len(self.cold) > len(self.warm)
        pl_module.originals = self.originals  # a folder is neither read nor written
        finish(pl_module)
        self.started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: FairFinetuning, outputs: Any, batch: PromptBatch, *args: Any
    ) -> None:
        finish(pl_module)
        seconds = time.perf_counter() - self.started
        if self.originals.known_now:
            self.warm.append(seconds)
            return
        self.cold.append(seconds)
        noise = pl_module.generator.noise(batch.seeds)
        few = noise[: pl_module.evaluation_sampler.images_at_once or len(noise)]
        with trainer.precision_plugin.forward_context():
            self.looks.append(timed(lambda: self.look(pl_module, batch, few), pl_module) / len(few))
        tensors = self.originals.last.tensors()
        self.original_bytes = sum(values.nbytes for values in tensors.values()) // len(noise)
        file = len(save({name: values[0].cpu().clone() for name, values in tensors.items()}))
        self.file_bytes = -(-file // BLOCK) * BLOCK

    @torch.no_grad()
    def look(self, module: FairFinetuning, batch: PromptBatch, noise: Tensor) -> None:
        """Sample some images as a test does, and look at them as its monitors do."""
        sampler = module.evaluation_sampler
        images = module.generate("original", sampler, batch, noise, sampler.draw_steps(module.randomness()))
        module.judge(images)
        for network in module.features:
            sampler.map_chunks(network, images)


def finish(module: LightningModule) -> None:
    """Wait until a GPU has done what it was asked for."""
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)


def timed(function: Callable[[], None], module: LightningModule) -> float:
    """Seconds that a call took."""
    finish(module)
    started = time.perf_counter()
    function()
    finish(module)
    return time.perf_counter() - started


@dataclass(frozen=True)
class Plan:
    """How much a run has to do.

    Attributes:
        steps: optimizer steps.
        batches: batches of training, over all steps.
        images: N of each.
        sets: how many prompts with how many sets of noise it meets, whose originals are sampled once; as many as
            batches where noise does not recur.
        validation: images of all validations together, of all models.
        test: images of the test, of all models.
    """

    steps: int
    batches: int
    images: int
    sets: int
    validation: int
    test: int


def plan(trainer: Trainer, data: PromptModule) -> Plan:
    """Count what `trainer` will do with `data`, whose training prompts are set up.

    Raises:
        ValueError: if the run has no end, or an interval is 0.
    """
    if not trainer.val_check_interval:
        raise ValueError("--trainer.val_check_interval must be above 0; --trainer.limit_val_batches 0 validates never")
    loader, epochs = data.train_dataloader(), trainer.max_epochs or -1
    epoch = limited(len(loader), trainer.limit_train_batches)
    ends = [trainer.max_steps * trainer.accumulate_grad_batches] * (trainer.max_steps >= 0)
    ends += [epoch * epochs] * (epochs >= 0)
    if not ends:
        raise ValueError("--plan: this run has no end; give --trainer.max_steps")
    batches = min(ends)
    sets = batches
    if data.noise_pool:
        visits = batches / len(loader) * np.bincount(loader.slots)  # of each prompt, each with one of its sets
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
    """How many of the batches Lightning takes: so many, or such a share."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def print_plan(trainer: Trainer, settings: dict[str, Any], module: FairFinetuning, data: PromptModule) -> None:
    """Measure some steps, print what the whole run will take, and write nothing.

    Args:
        trainer: of the run.
        settings: what it was made with, of which `SETTINGS` are used.
        module: what is trained; loaded.
        data: its prompts.

    Raises:
        ValueError: if the run has no end.
    """
    stopwatch, sampler = Stopwatch(), module.sampler
    sampler.steps = sampler.steps_max = (sampler.steps + sampler.steps_max) // 2  # so that steps can be compared
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings = {name: settings[name] for name in SETTINGS}
    few = Trainer(**settings, **off, max_steps=2 * (MEASURED + 1), limit_val_batches=0, callbacks=[stopwatch])
    few.fit(module, data)
    todo = plan(trainer, data)
    if few.is_global_zero:
        show(todo, stopwatch, few)


def show(todo: Plan, measured: Stopwatch, trainer: Trainer) -> None:
    """Print the plan and what it will take."""
    cold, warm, look = (sum(values[-MEASURED:]) / MEASURED for values in (measured.cold, measured.warm, measured.looks))
    training = todo.sets * cold + (todo.batches - todo.sets) * warm
    looks = look / trainer.world_size
    kept, on_disk = (todo.sets * todo.images * each for each in (measured.original_bytes, measured.file_bytes))
    if trainer.strategy.root_device.type == "cuda":
        memory, where = torch.cuda.max_memory_allocated(), "on each GPU"
    else:
        memory, where = peak_memory(), "of this process"
    table = Table("", "how much", "time", title=f"Plan, from {MEASURED} measured steps of either kind")
    table.add_row("one step", f"{todo.images} images", duration(cold))
    table.add_row("  where the frozen model's are remembered", "", duration(warm))
    table.add_row("training", f"{todo.steps} steps, {todo.batches * todo.images} images", duration(training))
    table.add_row("  remembered of the frozen model", f"{todo.sets * todo.images} images, {size(kept)}", "")
    table.add_row("    as files, where there is a folder for them", size(on_disk), "")
    table.add_row("validation", f"{todo.validation} images", duration(todo.validation * looks))
    table.add_row("test", f"{todo.test} images", duration(todo.test * looks))
    table.add_row("all", "", duration(training + (todo.validation + todo.test) * looks))
    if memory:
        table.add_row(f"memory {where}", size(memory), "")
    Console().print(table)
    print("Nothing was written. Loading, pictures and the independent classifier's look are not counted.")


def peak_memory() -> int:
    """Return the most memory that this process has held, in bytes; 0 where the system does not say, as on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def duration(seconds: float) -> str:
    """Seconds in words that a person reads."""
    if seconds < 100:
        return f"{seconds:.2f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes in words that a person reads."""
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"
