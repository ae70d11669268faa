"""Pictures of your own prompts, before and after: `python -m fairness_dft.generate --run runs/gender/version_0`.

The original and the finetuned model draw each prompt from the same noise, as the run tests them.
"""

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

from fairness_dft.adapters import Name
from fairness_dft.cli import new_folder, parsed, run_main
from fairness_dft.finished_run import Average, FinishedRun
from fairness_dft.module import FairFinetuning
from fairness_dft.prompt_files import lines
from fairness_dft.report import GridRow, GridSide, comparison_grid

BATCH = 8  # images sampled at a time
GRID = 12  # images of a prompt that the overview shows, at most


@dataclass(frozen=True)
class Settings:
    """What pictures are made with.

    Args:
        run: folder of a run, with its config.yaml and adapters/.
        prompts: the prompts.
        file: a text file of prompts, one a line, beside or instead of `prompts`.
        images: pictures of each prompt, by each model.
        seed: of the first picture; the others follow, and each is the same in any number of pictures.
        step: of the adapter; the last one by default.
        adapter: `ema`, the average, or `trained`, the last adapter as it is.
        scale: how strongly the adapter is applied: 0 is the original model, 1 the finetuned one.
        output: folder to write; it must be new.
    """

    run: str
    prompts: Sequence[str] = ()
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
    prompts = [*settings.prompts, *(lines(Path(settings.file)) if settings.file else ())]
    if not prompts:
        raise ValueError("""there is nothing to draw: give --prompts '["a photo of a chef"]' or --file prompts.txt""")
    run = FinishedRun(settings.run)
    folder = run.adapter(settings.step, settings.adapter)
    new_folder(Path(settings.output))
    cli = run.build(settings.output)
    module = cli.model
    module.features, module.face_realism = torch.nn.ModuleList(), None  # nothing is trained
    module.configure_model()
    module.adapter.load(folder, settings.adapter)
    module.adapter.rescale(settings.scale, settings.adapter)
    module.to(cli.trainer.strategy.root_device).eval()
    for prompt in prompts:
        if unread := module.generator.unread(prompt):
            print(f"warning: the text encoder does not read the end of a prompt: {unread!r}", file=sys.stderr)
    rows = []
    for number, prompt in enumerate(track(prompts, "generating", console=Console(stderr=True))):
        seeds = torch.arange(settings.seed, settings.seed + settings.images)
        row = GridRow(prompt)
        for model in ("original", settings.adapter):
            images = sample(module, model, prompt, seeds)
            facts = {"prompt": prompt, "model": "original" if model == "original" else "finetuned"}
            if model != "original":
                facts |= {"adapter": str(folder), "scale": settings.scale}
            save(images, seeds, Path(settings.output, f"{number + 1:03d}_{slug(prompt)}"), module, facts)
            shown = images[:GRID]
            verdict = module.judge(shown)
            classes = torch.stack([verdict.classes(name) for name in module.attribute.names], 1)
            row.sides[model] = GridSide(shown.cpu(), classes.cpu(), verdict.face.cpu())
        rows.append(row)
    picture = Path(settings.output, "grid.png")
    comparison_grid(rows, {name: module.judge.classes(name) for name in module.attribute.names}).save(picture)
    print(f"Picture: {picture}\nImages:  {settings.output}/*/, each with prompt, seed and settings inside")


@torch.no_grad()
def sample(module: FairFinetuning, name: Name, prompt: str, seeds: Tensor) -> Tensor:
    """Images of one prompt as the run tests them, with shape (n, 3, H, W), in [0, 1]."""
    sampler = module.evaluation_sampler
    steps = sampler.draw_steps(torch.Generator().manual_seed(module.seed))
    with module.adapter.using(name):
        chunks = [
            sampler(module.generator, prompt, module.generator.noise(chunk), steps) for chunk in seeds.split(BATCH)
        ]
    return torch.cat(chunks).float()


def save(images: Tensor, seeds: Tensor, folder: Path, module: FairFinetuning, facts: dict[str, object]) -> None:
    """Write a PNG file for each image, and what it was made with into it, as JSON under the key `fairness_dft`."""
    folder.mkdir(parents=True, exist_ok=True)
    sampler, generator = module.evaluation_sampler, module.generator
    made = {"base_model": getattr(generator, "path", type(generator).__name__), "steps": sampler.steps}
    made |= {"guidance_scale": sampler.guidance_scale, "scheduler": type(generator.scheduler).__name__}
    pictures = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for pixels, seed in zip(pictures, seeds.tolist(), strict=True):
        text = PngInfo()
        text.add_text("fairness_dft", json.dumps({**facts, "seed": seed, **made}))
        Image.fromarray(pixels).save(folder / f"{seed}_{facts['model']}.png", pnginfo=text)


def slug(prompt: str) -> str:
    """A prompt as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60] or "prompt"


if __name__ == "__main__":
    run_main(main)
