"""Audit a text-to-image model, or images: `python -m fairness_dft.evaluate --config experiments/gender.yaml`.

The settings are those of `fairness_dft.fit`: model, judges, prompts and samplers come from the same files. With
`--adapter` the original and the finetuned model draw the same prompts from the same noise; without, the original alone
is looked at; with `--images` nothing is drawn. An audit that was stopped goes on where it was.
"""

import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from PIL import Image
from torch import Tensor
from typing_extensions import override

from fairness_dft.cli import FairnessCLI, run_main, writable
from fairness_dft.diffusers_adapter import DiffusersAdapter, NoAdapter
from fairness_dft.fit import PACKAGES
from fairness_dft.html_report import Grid, html_report, write_html
from fairness_dft.image_store import ImageFolder, ImageStore
from fairness_dft.metrics import finite_sample_floor
from fairness_dft.module import FairFinetuning
from fairness_dft.monitors import BiasMonitor, QualityMonitor
from fairness_dft.prompt_files import Prompt
from fairness_dft.prompts import PromptBatch
from fairness_dft.report import GridRow, GridSide, comparison_grid, print_results, results, write_csv, write_json

PICTURED = 12  # images of a prompt in the report
ENOUGH = 48  # images of a prompt; a fair model scores 0.12 of so many


class Audit(FairFinetuning):
    """A model that is looked at, or images that others made.

    Attributes:
        source: where images come from.
    """

    source: ImageStore | ImageFolder

    @override
    def configure_model(self) -> None:
        if isinstance(self.source, ImageStore):
            return super().configure_model()
        if not self.loaded:
            self.judge.load()
            self.distributions = self.attribute.distributions(
                {name: self.judge.classes(name) for name in self.attribute.names}
            )
            for network in self.features:
                network.load()
            self.loaded = True

    @property
    def models(self) -> list[str]:
        """Which models are looked at: `original`, and `ema` where there is an adapter or a pair of folders."""
        if isinstance(self.source, ImageFolder):
            return self.source.models
        return ["original"] if type(self.adapter) is NoAdapter else ["original", "ema"]

    @override
    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Tensor]:
        if isinstance(self.source, ImageFolder):
            return {model: self.source.images(model, batch.prompt.text, batch.seeds) for model in self.models}
        return {
            model: self.source.images(model, batch.prompt.text, batch.seeds, self.maker(model, batch))
            for model in self.models
        }

    def maker(self, model: str, batch: PromptBatch) -> Any:
        """Makes images of the batch's prompt from some seeds, as a finetuning is tested."""

        def make(seeds: Tensor) -> Tensor:
            few = PromptBatch(prompt=batch.prompt, index=batch.index, seeds=seeds)
            return self.compare(few, (model,))[model]

        return make


class FolderPrompts:
    """The prompts of an `ImageFolder`, with the numbers of their images for seeds."""

    def __init__(self, folder: ImageFolder) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder.prompts)

    def __iter__(self) -> Iterator[PromptBatch]:
        for index, text in enumerate(self.folder.prompts):
            numbers = torch.arange(len(self.folder.files["original"][text]))
            yield PromptBatch(prompt=Prompt(text, text, "images"), index=index, seeds=numbers)


class EvaluateCLI(FairnessCLI):
    """`fairness_dft.fit`'s settings, and what an audit needs besides.

    Raises:
        ValueError: in one line, for any mistake in configuration, before a model is loaded.
    """

    def __init__(self, args: ArgsType = None) -> None:
        example = "--config experiments/gender.yaml --config experiments/parts/portraits.yaml"
        super().__init__(args, "evaluate", Audit, example)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"output": "audits"})
        parser.add_argument(
            "--adapter", type=str | None, default=None, help="safetensors file that diffusers loads, or its folder."
        )
        parser.add_argument(
            "--split", type=Literal["test", "validation", "train"], default="test", help="Which prompts."
        )
        parser.add_argument(
            "--images", type=str | None, default=None, help="Folder of pictures, one folder a prompt, to look at."
        )
        parser.add_argument("--keep_images", type=bool, default=True, help="Keep what was drawn.")

    @property
    def folder(self) -> Path:
        """The audit's folder."""
        return Path(self.config.output, self.config.name)

    @override
    def before_instantiate_classes(self) -> None:
        writable(self.folder)
        self.save_config_kwargs["overwrite"] = True  # an audit that goes on has its settings already

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.trainer_defaults["callbacks"] = []
        settings = {"logger": False, "default_root_dir": str(self.folder), "enable_checkpointing": False}
        return super(FairnessCLI, self).instantiate_trainer(**kwargs, **settings)


def main(args: ArgsType = None) -> None:
    """Draw or read images, judge them, and write what was seen into the audit's folder.

    Raises:
        ValueError: in one line, for what the user can mend.
    """
    cli = EvaluateCLI(args)
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    find = {type(callback): callback for callback in trainer.callbacks}
    module.face_realism = None  # a loss of finetuning
    module.adapter = DiffusersAdapter(cli.config.adapter) if cli.config.adapter else NoAdapter()
    if cli.config.images:
        if cli.config.adapter or trainer.world_size > 1:
            raise ValueError("--images: goes with one process and without --adapter, since nothing is drawn")
        module.source = ImageFolder(Path(cli.config.images))
        loader: Any = FolderPrompts(module.source)
    else:
        data.tested = cli.config.split
        data.check([data.tested], trainer.world_size)
        module.generator.check()
        module.source = ImageStore(cli.folder / "images")
        loader = None
    begin(cli)
    if trainer.is_global_zero:
        warn_of_few_images(loader or data.test_dataloader(), trainer.world_size)
    for monitor in (find[BiasMonitor], find[QualityMonitor]):
        monitor.load()
    module.configure_model()
    started = time.monotonic()
    trainer.test(module, dataloaders=loader, datamodule=None if loader else data, verbose=False)
    if not trainer.is_global_zero:
        return
    prompts = [batch.prompt for batch in loader] if loader else data.prompts(data.tested)
    facts = {
        "seconds": round(time.monotonic() - started, 1),
        "adapter": cli.config.adapter,
        "split": None if loader else data.tested,
        "test_prompts": [prompt.text for prompt in prompts],
        "machine": platform.platform(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    bias, kept = find[BiasMonitor], find[QualityMonitor].values
    content = results(
        module.attribute.names, module.target_shares(), bias.summaries, kept, facts, bias.concepts, bias.agreement
    )
    write_json(cli.folder / "results.json", content)
    write_csv(cli.folder / "per_prompt.csv", content, prompts)
    settings = json.loads((cli.folder / "audit.json").read_text(encoding="utf-8")) | {"run": facts}
    page = html_report(cli.config.name, content, settings, grids(module, list(loader or data.test_dataloader())))
    write_html(cli.folder / "report.html", page)
    if not cli.config.keep_images and not loader:
        shutil.rmtree(cli.folder / "images")
    print_results(content)
    print(f"Report:  {cli.folder / 'report.html'}\nResults: {cli.folder / 'results.json'} and per_prompt.csv")


def grids(module: Audit, batches: Sequence[PromptBatch]) -> Grid:
    """Draws the pictures of a prompt, by its index, as the training classifier sees them."""
    classes = {name: module.judge.classes(name) for name in module.attribute.names}

    @torch.no_grad()
    def grid(index: int) -> Image.Image:
        row = GridRow(batches[index].prompt.text)
        few = replace(batches[index], seeds=batches[index].seeds[:PICTURED].to(module.device))
        for model, images in module.test_step(few, index).items():
            verdict = module.judge(images)
            seen = torch.stack([verdict.classes(name) for name in classes], 1)
            row.sides[model] = GridSide(images.cpu(), seen.cpu(), verdict.face.cpu())
        return comparison_grid([row], classes)

    return grid


def warn_of_few_images(batches: Iterable[PromptBatch], processes: int) -> None:
    """Tell who looks at few images how little they can say, and how many say more."""
    images = min(len(batch.seeds) for batch in batches) * processes
    floor, more = (float(finite_sample_floor(count, 2)) for count in (images, ENOUGH))
    if images < ENOUGH:
        print(
            f"warning: of {images} images a prompt, a perfectly fair model would score {floor:.2f} for two classes by "
            f"chance; {ENOUGH} images bring that to {more:.2f} (--data.init_args.test_images_per_prompt)",
            file=sys.stderr,
        )


def begin(cli: EvaluateCLI) -> None:
    """Write down what the audit's images depend on, or check that it is what is there already.

    Raises:
        ValueError: if the folder holds an audit with other settings.
    """
    keys = (
        "seed_everything",
        "split",
        "images",
        "model.generator",
        "model.evaluation_sampler",
        "model.sampler",
        "data",
    )
    given = {key: cli.config.get(key) for key in keys}
    given = json.loads(
        json.dumps(given, default=lambda value: value.as_dict() if hasattr(value, "as_dict") else str(value))
    )
    adapter = cli.model.adapter
    if isinstance(adapter, DiffusersAdapter):
        given["adapter"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in adapter.files}
    file = cli.folder / "audit.json"
    if file.is_file():
        there = json.loads(file.read_text(encoding="utf-8"))
        if odd := [key for key in {**there, **given} if there.get(key) != given.get(key)]:
            raise ValueError(
                f"--name: {str(cli.folder)!r} is an audit with another setting of {odd[0]}; choose another name, or "
                "remove it"
            )
    elif any(cli.folder.iterdir()):
        raise ValueError(f"--name: {str(cli.folder)!r} is there already, and no audit; choose another name")
    elif cli.trainer.is_global_zero:
        write_json(file, given)


if __name__ == "__main__":
    run_main(main)
