"""Audit a text-to-image model, or images: `python -m fairness_dft.evaluate --config experiments/gender.yaml`.

The settings are those of `fairness_dft.fit`: model, judges, prompts and samplers come from the same files. With
`--adapter` the original and the finetuned model draw the same prompts from the same noise; without, the original alone
is looked at; with `--images` nothing is drawn. An audit that was stopped goes on where it was.
"""

if __name__ == "__main__":  # answers before the imports, which take seconds
    from fairness_dft.cli.help import answer_help

    answer_help("evaluate")

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from lightning import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from typing_extensions import override

from fairness_dft.adapters.external import DiffusersAdapter, NoAdapter
from fairness_dft.audits.audit import Audit, FolderPrompts, grids
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
from fairness_dft.prompts.files import Prompt, normalise
from fairness_dft.reports.csv_tables import write_per_prompt
from fairness_dft.reports.html import html_report, shown_classifier, write_html
from fairness_dft.reports.results import Results, RunFacts
from fairness_dft.reports.tables import print_results
from fairness_dft.training.bias_monitor import BiasMonitor
from fairness_dft.training.originals import content_of
from fairness_dft.training.quality_monitor import QualityMonitor, model_name, results_of_test

# Settings that an audit's images, and then its figures, depend on.
DECIDING = ("seed_everything", "split", "images", "trainer.precision", "model.generator", "model.evaluation_sampler")
DECIDING += (
    "model.sampler",
    "data",
    "model.judge",
    "model.attribute",
    "model.features",
    "bias_monitor",
    "quality_monitor",
)
FREE = ("model.judge", "model.attribute", "model.features", "bias_monitor", "quality_monitor")
FREE += ("data.init_args.test_prompts", "data.init_args.test_images_per_prompt", "content", "networks.judges")
LOADED = "networks."  # begins the names of what is known once networks are loaded


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
            "--adapter",
            type=str | None,
            default=None,
            help="safetensors file that diffusers loads, its folder, or a hub id.",
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
        if self.config.ckpt_path is not None:
            raise ValueError(
                "--ckpt_path: an audit looks at adapters: give --adapter runs/NAME/version_N/adapters/…/ema"
            )
        if self.config.trainer.limit_test_batches not in (None, 1.0):
            raise ValueError("--trainer.limit_test_batches: use --data.init_args.test_prompts for fewer prompts")
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
    module.adapter = DiffusersAdapter(cli.config.adapter) if cli.config.adapter else NoAdapter()
    data.tested = cli.config.split
    loader, prompts, images = judged_images(cli) if cli.config.images else drawn_images(cli)
    if images < 2:
        raise ValueError("1 image a prompt cannot show a bias: give at least 2, and better 24 for each class")
    if trainer.is_global_zero:
        depends_on = begin(cli, prompts)
    load(cli, prompts)
    cut = {} if loader else truncated_text(module, prompts)
    if trainer.is_global_zero:
        depends_on |= contents(cli)
        refuse_change(cli, depends_on)
        with replacing(cli.folder / "audit.json") as draft:
            draft.write_text(json.dumps(depends_on, indent=1) + "\n", encoding="utf-8")
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
    """Makes the module look at the images of `--images`.

    A folder of a prompt that the chosen split knows is of that prompt's subject and concept, and names what it names.

    Returns:
        Their loader, their prompts, and the smallest number of images of one.

    Raises:
        ValueError: if they cannot be looked at.
    """
    if cli.config.adapter or cli.trainer.world_size > 1:
        raise ValueError("--images: goes without --adapter, and with --trainer.devices=1, since nothing is drawn")
    source = ImageFolder(Path(cli.config.images))
    known = {normalise(prompt.text): prompt for prompt in cli.datamodule.prompts(cli.config.split)}
    prompts = [known.get(normalise(text), Prompt(text, text, "images")) for text in source.prompts]
    cli.model.source = source
    few = min(len(files) for files in source.files["original"].values())
    return FolderPrompts(source, prompts), prompts, few


def drawn_images(cli: EvaluateCLI) -> tuple[None, list[Prompt], int]:
    """Makes the module draw the prompts of the chosen split, as far as their images are not there yet.

    Returns:
        No loader but the data's own, the prompts, and the number of images of one.

    Raises:
        ValueError: if they cannot be drawn.
    """
    data, split = cli.datamodule, cli.config.split
    data.check([split], cli.trainer.world_size)
    cli.model.generator.check()
    cli.model.source = ImageStore(cli.folder / "images")
    return None, data.prompts(split), data.test_images_per_prompt


def load(cli: EvaluateCLI, prompts: Sequence[Prompt]) -> None:
    """Load every network, small ones first."""
    find = {type(callback): callback for callback in cli.trainer.callbacks}
    for monitor in (find[BiasMonitor], find[QualityMonitor]):
        monitor.load()
    find[BiasMonitor].check_names(prompts, cli.model.judge)
    cli.model.configure_model()
    if cli.trainer.is_global_zero:
        warn_of_what_is_not_read(cli.model, find[BiasMonitor])


def write(cli: EvaluateCLI, results: Results, prompts: Sequence[Prompt], loader: Iterable[PromptBatch]) -> None:
    """Write the files of an audit, and print where they are."""
    module, folder = cli.model, cli.folder
    results.write(folder / "results.json")
    write_per_prompt(folder / "per_prompt.csv", results, prompts)
    bias = next(callback for callback in cli.trainer.callbacks if isinstance(callback, BiasMonitor))
    shown = dict(bias.judges(module))[shown_classifier(results)]
    made = {key: getattr(results.run, key) for key in ("adapter", "images", "split", "machine", "versions")}
    settings = json.dumps(made, indent=1) + "\n\n" + (folder / "config.yaml").read_text(encoding="utf-8")
    page = html_report(cli.config.name, results, settings, method(cli), grids(module, shown, loader))
    write_html(folder / "report.html", page)
    if not cli.config.keep_images and isinstance(module.source, ImageStore):
        shutil.rmtree(folder / "images")
    print_results(results)
    print(f"Report:  {folder / 'report.html'}\nResults: {folder / 'results.json'} and per_prompt.csv")


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
    every = next(callback for callback in cli.trainer.callbacks if isinstance(callback, BiasMonitor)).every_face
    told.append("Each face of an image counts." if every else "Of several faces in an image the largest counts.")
    judges = {"training": config.model.judge, "independent": config.bias_monitor.independent_judge}
    judges |= config.bias_monitor.other_judges or {}
    paths = {name: judge.classifier.get("init_args", {}).get("path") for name, judge in judges.items() if judge}
    told += [f"The classifier “{name}” is {path}." for name, path in paths.items() if path]
    return told


def begin(cli: EvaluateCLI, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What the audit depends on, checked to be what is there already.

    Of an audit without results, more prompts or images may be asked for, and other judges.

    Returns:
        What `audit.json` is to say once everything is loaded: a mistake in an adapter must not use up a name.

    Raises:
        ValueError: if the folder holds an audit with other settings, or something else.
    """
    given = dict(flat(json.loads(json.dumps({key: cli.config.get(key) for key in DECIDING}, default=plain))))
    content = hashlib.sha256("\n".join(prompt.text for prompt in prompts).encode())
    for of in cli.model.source.files.values() if cli.config.images else ():
        for file in chain.from_iterable(of.values()):
            content.update(file.read_bytes())
    given["content"] = content.hexdigest()  # of prompts and pictures, whose files may change under the same name
    if isinstance(cli.model.adapter, DiffusersAdapter):
        given |= {f"adapter.{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in cli.model.adapter.files}
    if not (cli.folder / "audit.json").is_file() and any(
        path.name != "config.yaml" and not path.name.startswith(".") for path in cli.folder.iterdir()
    ):
        raise ValueError(f"--name: {str(cli.folder)!r} is there already, and no audit; choose another name")
    refuse_change(cli, given)
    return given


def refuse_change(cli: EvaluateCLI, given: Mapping[str, Any]) -> None:
    """Compare what an audit depends on with what it did before, if it did.

    Raises:
        ValueError: if one of the given differs.
    """
    file = cli.folder / "audit.json"
    if not file.is_file():
        return
    there = json.loads(file.read_text(encoding="utf-8"))
    finished = (cli.folder / "results.json").is_file()
    loaded = any(key.startswith(LOADED) for key in given)  # the networks are not known before
    keys = [key for key in {**there, **given} if loaded or not key.startswith(LOADED)]
    odd = [key for key in keys if there.get(key) != given.get(key) and (finished or not key.startswith(FREE))]
    if odd:
        raise ValueError(
            f"--name: {str(cli.folder)!r} is an audit with {odd[0]} {there.get(odd[0])!r}, not "
            f"{given.get(odd[0])!r}; choose another name, or remove it"
        )


def contents(cli: EvaluateCLI) -> dict[str, str]:
    """What the loaded networks compute: they may change under the same path."""
    bias = next(callback for callback in cli.trainer.callbacks if isinstance(callback, BiasMonitor))
    judges = cli.model.judge, *bias.others.values(), *cli.model.features
    found = {f"{LOADED}judges": content_of(*judges)}
    if not cli.config.images:
        found[f"{LOADED}generator"] = content_of(*cli.model.generator.children())
    return found


def plain(value: Any) -> Any:
    """What JSON does not know, as what it knows."""
    return value.as_dict() if hasattr(value, "as_dict") else str(value)


def flat(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested settings, by their keys with dots."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flat(value, f"{name}.{key}" if name else key)
    else:
        yield name, tree


if __name__ == "__main__":
    run_main(main)
