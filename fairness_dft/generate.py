"""Pictures of your own prompts, before and after: `python -m fairness_dft.generate --run runs/gender/version_0`.

The original and the finetuned model draw each prompt from the same noise, as the run tests them.
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

from fairness_dft.cli.commands import new_folder, parsed, run_main
from fairness_dft.cli.finished_run import build, load_adapter
from fairness_dft.prompts.files import lines
from fairness_dft.reports.grid import TILE, GridRow, GridSide, comparison_grid
from fairness_dft.training.finished_run import Average, FinishedRun
from fairness_dft.training.module import FairFinetuning

BATCH = 8  # images sampled at a time
GRID, ROWS = 12, 20  # images of a prompt, and prompts, that the overview shows at most


@dataclass(frozen=True)
class Settings:
    """What pictures are made with.

    Args:
        run: folder of a run, with its config.yaml and adapters/.
        prompts: a prompt, or a list of them in brackets.
        file: a text file of prompts, one a line, beside or instead of `prompts`.
        images: pictures of each prompt, by each model.
        seed: of the first picture; the others follow, and each is the same in any number of pictures.
        step: of the adapter; the last one by default.
        adapter: `ema`, the average, or `trained`, the last adapter as it is.
        scale: how strongly the adapter is applied: 0 is the original model, 1 the finetuned one.
        output: folder to write; it must be new.
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
        ValueError: in one line, for what the user can mend.
    """
    settings = parsed(Settings, "generate", __doc__, "--run runs/gender/version_0", args)
    given = [settings.prompts] if isinstance(settings.prompts, str) else settings.prompts
    prompts = [prompt for prompt in given if prompt] + (lines(Path(settings.file)) if settings.file else [])
    if not prompts:
        raise ValueError('there is nothing to draw: give --prompts "a photo of a chef" or --file prompts.txt')
    run = FinishedRun(settings.run)
    folder = run.adapter(settings.step, settings.adapter)
    new_folder(Path(settings.output))
    cli = build(run, settings.output)
    module = load_adapter(cli.model, folder, settings.adapter, settings.scale)
    judged = load_judge(module)
    module.to(cli.trainer.strategy.root_device).eval()
    rows = []
    with torch.no_grad(), cli.trainer.precision_plugin.forward_context():
        for number, prompt in enumerate(track(prompts, "generating", console=Console(stderr=True))):
            drawn = draw(module, prompt, settings, Path(settings.output, f"{number + 1:03d}_{slug(prompt)}"), folder)
            if number < ROWS:
                rows.append(GridRow(prompt, {model: side(module, images, judged) for model, images in drawn.items()}))
    picture = Path(settings.output, "grid.png")
    comparison_grid(rows, {name: module.judge.classes(name) for name in judged}).save(picture)
    print(f"Picture: {picture}\nImages:  {settings.output}/*/, each with prompt, seed and settings inside")


def load_judge(module: FairFinetuning) -> list[str]:
    """Load the run's judge, which colours the overview, and return the attributes that it is asked for."""
    try:
        module.judge.load()
    except ValueError as error:
        print(f"warning: the overview has no colours, since {error}", file=sys.stderr)
        return []
    return list(module.attribute.names)


def draw(module: FairFinetuning, prompt: str, settings: Settings, output: Path, folder: Path) -> dict[str, Tensor]:
    """Images of one prompt by the original and the finetuned model, written into a folder.

    Returns:
        For each model images with shape (n, 3, H, W), in [0, 1].
    """
    seeds = torch.arange(settings.seed, settings.seed + settings.images)
    sampler, generator = module.evaluation_sampler, module.generator
    steps = sampler.draw_steps(torch.Generator().manual_seed(module.seed))  # as the run tests
    made = {"base_model": getattr(generator, "path", type(generator).__name__), "steps": steps}
    made |= {"guidance_scale": sampler.guidance_scale, "scheduler": type(generator.scheduler).__name__}
    drawn = {}
    for model, name in (("original", "original"), (settings.adapter, "finetuned")):
        with module.adapter.using(model):
            if truncated_text := generator.truncated_text(prompt):
                told = f"the text encoder of the {name} model does not read the end of a prompt: {truncated_text!r}"
                print(f"warning: {told}", file=sys.stderr)
            chunks = [sampler(generator, prompt, generator.noise(chunk), steps) for chunk in seeds.split(BATCH)]
        drawn[model] = torch.cat(chunks).float()
        facts = {"prompt": prompt, "model": name, **made}
        if name == "finetuned":
            facts |= {"adapter": str(folder), "scale": settings.scale}
        save(drawn[model], seeds, output, facts)
    return drawn


def side(module: FairFinetuning, images: Tensor, attributes: Sequence[str]) -> GridSide:
    """The first images, small, with what the judge sees in them."""
    shown = images[:GRID]
    small = interpolate(shown, TILE, mode="area").cpu()
    if not attributes:
        return GridSide(small, torch.zeros(len(small), 0, dtype=torch.long), torch.ones(len(small), dtype=torch.bool))
    verdict = module.judge(shown)
    classes = torch.stack([verdict.classes(name) for name in attributes], 1)
    return GridSide(small, classes.cpu(), verdict.has_face.cpu())


def save(images: Tensor, seeds: Tensor, folder: Path, facts: dict[str, object]) -> None:
    """Write a PNG file for each image, and what it was made with into it, as JSON under the key `fairness_dft`."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for pixels, seed in zip(pictures, seeds.tolist(), strict=True):
        text = PngInfo()
        text.add_text("fairness_dft", json.dumps({**facts, "seed": seed}))
        Image.fromarray(pixels).save(folder / f"{seed}_{facts['model']}.png", pnginfo=text)


def slug(prompt: str) -> str:
    """A prompt as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60] or "prompt"


if __name__ == "__main__":
    run_main(main)
