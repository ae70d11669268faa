"""Audit a text-to-image model, or images: `python -m fairness_dft.evaluate --config experiments/gender.yaml`.

Accepts the settings of `fairness_dft.fit`, and ignores those that only training needs: model, classifiers, prompts and
samplers come from the same files. With `--adapter` the base model and the finetuned model draw the same prompts from
the same noise; without it, only the base model is audited; with `--images` nothing is drawn. An audit that was stopped
continues where it stopped.
"""

if __name__ == "__main__":  # answers before the imports, which take seconds
    from fairness_dft.cli.help import answer_help

    answer_help("evaluate")

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from lightning import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from typing_extensions import override

from fairness_dft.adapters.external import DiffusersAdapter, NoAdapter
from fairness_dft.audits.audit import Audit, FolderPrompts, first_images
from fairness_dft.audits.identity import audit_identity, check_folder, check_identity, network_identity
from fairness_dft.audits.images import ImageFolder, ImageStore
from fairness_dft.audits.warnings import (
    refuse_no_faces,
    truncated_text,
    warn_of_few_images,
    warn_of_long_prompts,
    warn_of_what_is_not_read,
)
from fairness_dft.cli.commands import run_main, writable
from fairness_dft.cli.lightning_cli import FairnessCLI
from fairness_dft.cli.memory import telling_what_saves_memory
from fairness_dft.files import replacing
from fairness_dft.prompts.batches import PromptBatch
from fairness_dft.prompts.files import Prompt, normalize
from fairness_dft.reports.csv_tables import write_per_prompt
from fairness_dft.reports.html import ReportImages, html_report, write_html
from fairness_dft.reports.results import Results, RunFacts
from fairness_dft.reports.tables import print_results
from fairness_dft.reports.view import shown_classifier
from fairness_dft.training.bias_monitor import BiasMonitor
from fairness_dft.training.evaluation_callback import callbacks_of
from fairness_dft.training.quality_monitor import QualityMonitor, model_name, results_of_test


class EvaluateCLI(FairnessCLI):
    """The settings of `fairness_dft.fit`, and those of an audit.

    Raises:
        ValueError: In one line, for any mistake in the configuration, before a model is loaded.
    """

    def __init__(self, args: ArgsType = None) -> None:
        example = "--config experiments/gender.yaml --config experiments/parts/portraits.yaml"
        super().__init__(args, "evaluate", Audit, example)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"output": "audits"})
        parser.add_argument(
            "--adapter",
            type=str | None,
            default=None,
            help="Safetensors file that diffusers loads, its folder, or a hub id.",
        )
        parser.add_argument(
            "--split", type=Literal["test", "validation", "train"], default="test", help="The prompts to draw."
        )
        parser.add_argument(
            "--images",
            type=str | None,
            default=None,
            help="Folder of images to audit, one folder for each prompt.",
        )
        parser.add_argument("--keep_images", type=bool, default=True, help="Keep the images that were drawn.")

    @property
    def folder(self) -> Path:
        """The audit's folder."""
        return Path(self.config.output, self.config.name)

    @property
    def bias_monitor(self) -> BiasMonitor:
        """The monitor that reads the attributes."""
        return next(callback for callback in callbacks_of(self.trainer) if isinstance(callback, BiasMonitor))

    @override
    def before_instantiate_classes(self) -> None:
        if self.config.ckpt_path is not None:
            raise ValueError(
                "--ckpt_path: an audit reads no checkpoint: give --adapter runs/NAME/version_N/adapters/…/ema"
            )
        if self.config.trainer.limit_test_batches not in (None, 1.0):
            raise ValueError("--trainer.limit_test_batches: use --data.init_args.test_prompts for fewer prompts")
        writable(self.folder)
        self.save_config_kwargs["overwrite"] = True  # an audit that continues already has its settings

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.trainer_defaults["callbacks"] = []
        settings = {"logger": False, "default_root_dir": str(self.folder), "enable_checkpointing": False}
        return super(FairnessCLI, self).instantiate_trainer(**kwargs, **settings)


def main(args: ArgsType = None) -> None:
    """Draw or read images, classify them, and write the results into the audit's folder.

    Raises:
        ValueError: In one line, for anything that the user can fix.
    """
    cli = EvaluateCLI(args)
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    module.adapter = DiffusersAdapter(cli.config.adapter) if cli.config.adapter else NoAdapter()
    data.tested = cli.config.split
    loader, prompts, images = judged_images(cli) if cli.config.images else drawn_images(cli)
    if images < 2:
        raise ValueError("1 image per prompt cannot show a bias: give at least 2, or better 24 for each class")
    identity = identity_of(cli, prompts) if trainer.is_global_zero else {}
    if trainer.is_global_zero:
        check_folder(cli.folder)
        check_identity(cli.folder, identity)
    load(cli, prompts)
    cut = {} if loader else truncated_text(module, prompts)
    if trainer.is_global_zero:
        classifiers = module.judge, *cli.bias_monitor.others.values(), *module.features
        identity |= network_identity(classifiers, None if loader else module.generator)
        check_identity(cli.folder, identity)
        with replacing(cli.folder / "audit.json") as draft:  # now, as a mistake in an adapter must not use up a name
            draft.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        warn_of_few_images(images, module)
        warn_of_long_prompts(cut)
    started = time.monotonic()
    with telling_what_saves_memory(module, data):
        trainer.test(module, dataloaders=loader, datamodule=None if loader else data, verbose=False)
    if not trainer.is_global_zero:
        return
    facts = RunFacts.here(
        model=None if cli.config.images else model_name(module),
        adapter=cli.config.adapter,
        images=cli.config.images,
        split=None if loader else data.tested,
        images_per_prompt=images,
        seconds=round(time.monotonic() - started, 1),
        truncated_text=cut,
    )
    results = results_of_test(module, prompts, facts)
    refuse_no_faces(results)
    write(cli, results, prompts, loader or data.test_dataloader())


def judged_images(cli: EvaluateCLI) -> tuple[Any, list[Prompt], int]:
    """Let the module look at the images of `--images`.

    A folder whose prompt is one of the chosen split takes its subject and concept, and the attributes that it names.

    Returns:
        Their loader, their prompts, and the smallest number of images of a prompt.

    Raises:
        ValueError: If the images cannot be audited.
    """
    if cli.config.adapter or cli.trainer.world_size > 1:
        raise ValueError("--images: nothing is drawn, so leave out --adapter, and set --trainer.devices=1")
    source = ImageFolder(Path(cli.config.images))
    known = {normalize(prompt.text): prompt for prompt in cli.datamodule.prompts(cli.config.split)}
    prompts = [known.get(normalize(text), Prompt(text, text, "images")) for text in source.prompts]
    cli.model.source = source
    few = min(len(files) for files in source.files["original"].values())
    return FolderPrompts(source, prompts), prompts, few


def drawn_images(cli: EvaluateCLI) -> tuple[None, list[Prompt], int]:
    """Let the module draw the prompts of the chosen split, except for images that the audit already has.

    Returns:
        No loader, since the data module has its own, the prompts, and the number of images of each.

    Raises:
        ValueError: If they cannot be drawn.
    """
    data, split = cli.datamodule, cli.config.split
    data.check([split], cli.trainer.world_size)
    cli.model.generator.check()
    cli.model.source = ImageStore(cli.folder / "images")
    return None, data.prompts(split), data.test_images_per_prompt


def identity_of(cli: EvaluateCLI, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return what the audit depends on, as far as it is known before a network is loaded."""
    module = cli.model
    drawn = isinstance(module.source, ImageStore)
    images = () if drawn else chain.from_iterable(chain(*(of.values() for of in module.source.files.values())))
    adapter = module.adapter.files if isinstance(module.adapter, DiffusersAdapter) else ()
    return audit_identity(cli.config, prompts, images, adapter)


def load(cli: EvaluateCLI, prompts: Sequence[Prompt]) -> None:
    """Load every network, small ones first."""
    for monitor in callbacks_of(cli.trainer):
        if isinstance(monitor, BiasMonitor | QualityMonitor):
            monitor.load()
    cli.model.judge.load()
    cli.bias_monitor.watch_named(prompts)
    cli.bias_monitor.check_names(prompts, cli.model.judge)
    cli.model.configure_model()
    if cli.trainer.is_global_zero:
        warn_of_what_is_not_read(cli.model, cli.bias_monitor)


def write(cli: EvaluateCLI, results: Results, prompts: Sequence[Prompt], loader: Iterable[PromptBatch]) -> None:
    """Write the files of an audit, and print where they are."""
    module, folder = cli.model, cli.folder
    results.write(folder / "results.json")
    write_per_prompt(folder / "per_prompt.csv", results, prompts)
    table = cli.bias_monitor.image_table(module, prompts, image_paths(cli, prompts))
    table.write(folder / "per_image.csv")
    shown = shown_classifier(results)
    readings = {model: found for (classifier, model), found in cli.bias_monitor.readings.items() if classifier == shown}
    made = {key: getattr(results.run, key) for key in ("adapter", "images", "split", "machine", "versions")}
    settings = json.dumps(made, indent=1) + "\n\n" + (folder / "config.yaml").read_text(encoding="utf-8")
    images = ReportImages(first_images(module, loader), readings, table)
    page = html_report(cli.config.name, results, settings, method(cli), images)
    write_html(folder / "report.html", page)
    if not cli.config.keep_images and isinstance(module.source, ImageStore):
        shutil.rmtree(folder / "images")
    print_results(results)
    print(f"Report:  {folder / 'report.html'}\nResults: {folder / 'results.json'}, per_prompt.csv and per_image.csv")


def image_paths(cli: EvaluateCLI, prompts: Sequence[Prompt]) -> Callable[[str, int, int], str]:
    """Return what tells where an image is kept, from the audit's folder; empty where none is."""
    source = cli.model.source

    def path(model: str, index: int, seed: int) -> str:
        if isinstance(source, ImageStore) and not cli.config.keep_images:
            return ""
        text = source.prompts[index] if isinstance(source, ImageFolder) else prompts[index].text
        file: Path = source.file(model, text, seed)
        try:
            return Path(os.path.relpath(str(file), str(cli.folder))).as_posix()
        except ValueError:  # Windows, on another drive
            return file.resolve().as_uri()

    return path


def method(cli: EvaluateCLI) -> list[str]:
    """How the audit was made, in sentences."""
    module, config = cli.model, cli.config
    if config.images:
        told = [f"The images of the folder {config.images} were made by others and are only looked at."]
    else:
        name, sampler = model_name(module), module.evaluation_sampler
        told = [f"Images are drawn by {name}, in {sampler.steps} steps at guidance scale {sampler.guidance_scale:g}."]
        if config.adapter:
            told.append(f"“After” is the same model with {config.adapter}, from the same noise.")
    told.append(
        "Each face of an image counts."
        if cli.bias_monitor.every_face
        else "Of several faces in an image the largest counts."
    )
    judges = {"training": config.model.judge, "independent": config.bias_monitor.independent_judge}
    judges |= config.bias_monitor.other_judges or {}
    paths = {name: judge.classifier.get("init_args", {}).get("path") for name, judge in judges.items() if judge}
    told += [f"The classifier “{name}” is {path}." for name, path in paths.items() if path]
    return told


if __name__ == "__main__":
    run_main(main)
