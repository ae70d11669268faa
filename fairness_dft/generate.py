"""Generate images of your own prompts, before and after: `python -m fairness_dft.generate --run runs/gender/version_0`.

The base model and the finetuned model sample each prompt from the same noise, as in the test of the run.
"""

if __name__ == "__main__":  # answers before the imports, which take seconds
    from fairness_dft.cli.help import answer_help

    answer_help("generate")

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import interpolate

from fairness_dft.adapters.base import Name
from fairness_dft.cli.commands import new_folder, parsed, run_main
from fairness_dft.cli.finished_run import build, load_adapter
from fairness_dft.prompts.files import lines
from fairness_dft.reports.grid import TILE, GridRow, GridSide, comparison_grid
from fairness_dft.training.finished_run import Average, FinishedRun
from fairness_dft.training.module import FairFinetuning

BATCH = 8  # images that are sampled at once
GRID, ROWS = 12, 20  # the largest numbers of images per prompt, and of prompts, in the overview


@dataclass(frozen=True)
class Settings:
    """Settings of the command.

    Args:
        run: Folder of a run, with its config.yaml and adapters/.
        prompts: A prompt, or a list of prompts in brackets.
        file: Text file with one prompt per line, in addition to `prompts` or instead of it.
        images: Number of images per prompt and model.
        seed: Seed of the first image; the next images have the next seeds, whatever their number.
        step: Training step of the adapter; the last one by default.
        adapter: `ema`, the average over the training steps, or `trained`, the last adapter itself.
        scale: Strength of the adapter: 0 is the base model, 1 the finetuned model.
        output: Folder to write; it must be new or empty.
    """

    run: str
    prompts: list[str] | str = ""
    file: str | None = None
    images: int = 8
    seed: int = 0
    step: int | None = None
    adapter: Average = "ema"
    scale: float = 1.0
    output: str = "generated"

    def __post_init__(self) -> None:
        if self.images < 1 or self.seed < 0:
            raise ValueError(
                f"--images must be positive and --seed not negative, but got {self.images} and {self.seed}"
            )


def main(args: list[str] | None = None) -> None:
    """Generate from the command line.

    Raises:
        ValueError: In one line, for every mistake of the user.
    """
    settings = parsed(Settings, "generate", __doc__, "--run runs/gender/version_0", args)
    given = [settings.prompts] if isinstance(settings.prompts, str) else settings.prompts
    prompts = [prompt for prompt in given if prompt] + (lines(Path(settings.file)) if settings.file else [])
    if not prompts:
        raise ValueError('no prompt was given: use --prompts "a photo of a chef" or --file prompts.txt')
    run = FinishedRun(settings.run)
    folder = run.adapter(settings.step, settings.adapter)
    new_folder(Path(settings.output))
    cli = build(run, settings.output)
    module = load_adapter(cli.model, folder, settings.adapter, settings.scale)
    attributes = load_judge(module)
    module.to(cli.trainer.strategy.root_device).eval()
    rows = []
    with torch.no_grad(), cli.trainer.precision_plugin.forward_context():
        for number, prompt in enumerate(track(prompts, "generating", console=Console(stderr=True))):
            drawn = draw(module, prompt, settings, Path(settings.output, f"{number + 1:03d}_{slug(prompt)}"), folder)
            if number < ROWS:
                rows.append(
                    GridRow(prompt, {model: side(module, images, attributes) for model, images in drawn.items()})
                )
    overview = Path(settings.output, "grid.png")
    comparison_grid(rows, {name: module.judge.classes(name) for name in attributes}).save(overview)
    print(f"Overview: {overview}\nImages:   {settings.output}/*/, each with its prompt, seed and settings inside")


def load_judge(module: FairFinetuning) -> list[str]:
    """Load the run's classifier, which colors the overview, and return its attributes; none on failure."""
    try:
        module.judge.load()
    except ValueError as error:
        print(f"warning: the overview has no colors: {error}", file=sys.stderr)
        return []
    return list(module.attribute.names)


def draw(module: FairFinetuning, prompt: str, settings: Settings, output: Path, folder: Path) -> dict[str, Tensor]:
    """Sample the images of one prompt by the base model and the finetuned model, and write them into a folder.

    Returns:
        For each model its images with shape (n, 3, H, W), in [0, 1].
    """
    seeds = torch.arange(settings.seed, settings.seed + settings.images)
    sampler, generator = module.evaluation_sampler, module.generator
    steps = sampler.draw_steps(torch.Generator().manual_seed(module.seed))  # as the run tests
    recipe = {"base_model": getattr(generator, "path", type(generator).__name__), "steps": steps}
    recipe |= {"guidance_scale": sampler.guidance_scale, "scheduler": type(generator.scheduler).__name__}
    drawn: dict[str, Tensor] = {}
    models: tuple[tuple[Name, str], ...] = (("original", "original"), (settings.adapter, "finetuned"))
    for model, name in models:
        with module.adapter.using(model):
            if truncated_text := generator.truncated_text(prompt):
                message = f"the text encoder of the {name} model does not read the end of a prompt: {truncated_text!r}"
                print(f"warning: {message}", file=sys.stderr)
            chunks = [sampler(generator, prompt, generator.noise(chunk), steps) for chunk in torch.split(seeds, BATCH)]
        drawn[model] = torch.cat(chunks).float()
        facts = {"prompt": prompt, "model": name, **recipe}
        if name == "finetuned":
            facts |= {"adapter": str(folder), "scale": settings.scale}
        save(drawn[model], seeds, output, facts)
    return drawn


def side(module: FairFinetuning, images: Tensor, attributes: Sequence[str]) -> GridSide:
    """Return the first images, reduced, with the classes that the classifier reads in them."""
    first = images[:GRID]
    small = interpolate(first, TILE, mode="area").cpu()
    if not attributes:
        return GridSide(small, torch.zeros(len(small), 0, dtype=torch.long), torch.ones(len(small), dtype=torch.bool))
    verdict = module.judge(first)
    classes = torch.stack([verdict.classes(name) for name in attributes], 1)
    return GridSide(small, classes.cpu(), verdict.has_face.cpu())


def save(images: Tensor, seeds: Tensor, folder: Path, facts: dict[str, object]) -> None:
    """Write a PNG file for each image, with its settings inside, as JSON under the key `fairness_dft`."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for pixels, seed in zip(arrays, seeds.tolist(), strict=True):
        text = PngInfo()
        text.add_text("fairness_dft", json.dumps({**facts, "seed": seed}))
        Image.fromarray(pixels).save(folder / f"{seed}_{facts['model']}.png", pnginfo=text)


def slug(prompt: str) -> str:
    """Return a prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60] or "prompt"


if __name__ == "__main__":
    run_main(main)
