"""The command line: Lightning's CLI with this project's monitors, one line for every mistake, and one run folder."""

import logging
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from pydoc import locate
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import distributed
from typing_extensions import override

from fairness_dft.callbacks import AdapterAverage, AdapterCheckpoint, StepBar, Throughput
from fairness_dft.dashboard import Dashboard
from fairness_dft.loading import one_line
from fairness_dft.memory import in_one_line
from fairness_dft.module import FairFinetuning
from fairness_dft.monitors import BiasMonitor, ImageGrid, QualityMonitor
from fairness_dft.prompts import PromptModule
from fairness_dft.stop import FiniteSteps, GracefulStop

Settings = TypeVar("Settings")

MONITORS = {
    "adapter_average": AdapterAverage,
    "bias_monitor": BiasMonitor,
    "quality_monitor": QualityMonitor,
    "image_grid": ImageGrid,
    "adapter_checkpoint": AdapterCheckpoint,
    "throughput": Throughput,
    "finite_steps": FiniteSteps,
}
# How the parser words its messages: what is about its search alone, and the types that it tried.
SEARCH = re.compile(
    r"Does not validate|Subtypes: |Errors:$|Given value|Expected a <class 'NoneType'>|Expected a path but "
)
CLASS = re.compile(r"Problem with given class_path '(.+?)':")
LEVEL = re.compile(rf"(?:- )?(?:Parser key \".+?\":|{CLASS.pattern})")
TYPE = r"<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.+)\]|dot import path string"
EXPECTED = re.compile(rf"Expected a (?:{TYPE})(?:(?:\. Got value)?: (.*))?$")


class OneLineCLI(LightningCLI):
    """Lightning's CLI, in which every mistake is one line, told before a model is loaded.

    Args:
        command: the name of the module that is run.
        module: the LightningModule that is built.
        data: the base class of the data that is built.
        args: of the command line; those of the process by default.
        example: arguments with which the command runs.
        trainer_defaults: what the trainer is made with unless the user says otherwise.

    Raises:
        ValueError: in one line, for any mistake in configuration.
    """

    def __init__(
        self,
        command: str,
        module: type[LightningModule],
        data: type[LightningDataModule],
        args: ArgsType = None,
        example: str = "",
        trainer_defaults: dict[str, Any] | None = None,
    ) -> None:
        self.command, self.example = command, example
        super().__init__(
            module,
            data,
            subclass_mode_data=True,
            args=args,
            run=False,
            seed_everything_default=0,
            save_config_kwargs={"config_filename": "config.yaml"},
            parser_kwargs={
                "prog": f"python -m fairness_dft.{command}",
                "parser_mode": "omegaconf+",
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False, **(trainer_defaults or {})},
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        try:
            with warnings.catch_warnings():  # commands that use another command's settings have arguments of their own
                warnings.filterwarnings("ignore", "LightningCLI's args parameter")
                super().parse_arguments(parser, args)
        except ArgumentError as error:
            out = way_out(str(error), parser.get_defaults().keys(), self.example)
            raise ValueError(innermost(str(error)) + out) from error

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise ValueError(innermost(str(error), self.config)) from error

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            hint = "where it is about the machine, leave accelerator and devices to auto"
            raise ValueError(f"--trainer: {one_line(error).rstrip('.!')}; {hint}") from error


class FairnessCLI(OneLineCLI):
    """Builds module, prompts, monitors and trainer from YAML files and flags; later ones win.

    Args:
        args: of the command line; those of the process by default.
        command: the name of the module that is run.
        module: what is built; with the settings of a finetuning.
        example: arguments with which the command runs.

    Raises:
        ValueError: in one line, for any mistake in configuration, before a model is loaded.
    """

    def __init__(
        self,
        args: ArgsType = None,
        command: str = "fit",
        module: type[FairFinetuning] = FairFinetuning,
        example: str = "--config experiments/quickstart.yaml",
    ) -> None:
        super().__init__(command, module, PromptModule, args, example, {"callbacks": [GracefulStop(), Dashboard()]})

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, callback in MONITORS.items():
            parser.add_lightning_class_args(callback, name)
        for seed in ("model.seed", "data.init_args.seed"):
            parser.link_arguments("seed_everything", seed, compute_fn=int)
        parser.add_argument("--name", type=str, default="run", help="Name of the experiment and of its folder.")
        parser.add_argument("--output", type=str, default="runs", help="Folder that receives all runs.")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Checkpoint to resume from.")
        parser.add_argument(
            "--plan", action="store_true", help="Measure a few steps, print what a fit takes, and stop."
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        if self.config.plan and self.command != "fit":
            raise ValueError(f"--plan is for fairness_dft.fit, not for fairness_dft.{self.command}: leave it out")

    @override
    def before_instantiate_classes(self) -> None:
        writable(Path(self.config.output))
        if self.config.ckpt_path is not None:
            resumable(Path(self.config.ckpt_path))

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        from lightning.pytorch.loggers import TensorBoardLogger

        tensorboard = TensorBoardLogger(self.config.output, name=self.config.name)
        logger = self._get(self.config_init, "trainer.logger")
        if logger in (None, True):
            kwargs["logger"] = tensorboard
        if logger or logger is None:
            self.trainer_defaults["callbacks"].append(LearningRateMonitor("step"))
        else:
            kwargs["default_root_dir"] = tensorboard.log_dir  # a run without curves has its own folder too
        if self._get(self.config_init, "trainer.enable_progress_bar") is not False and not self.own_progress_bar():
            self.trainer_defaults["callbacks"].append(StepBar())
        return super().instantiate_trainer(**kwargs)

    def own_progress_bar(self) -> bool:
        """Whether the user's configuration brings a progress bar of its own."""
        callbacks = self._get(self.config_init, "trainer.callbacks")
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        return any(isinstance(callback, ProgressBar) for callback in callbacks)


def parsed(
    kind: type[Settings], command: str, description: str | None, example: str, args: list[str] | None
) -> Settings:
    """The command line of a command that has no trainer: one flag for each field of a dataclass.

    Args:
        kind: the dataclass.
        command: the name of the module that is run.
        description: what it does.
        example: arguments with which it runs.
        args: of the command line; those of the process by default.

    Raises:
        ValueError: in one line, for any mistake.
    """
    parser = ArgumentParser(
        prog=f"python -m fairness_dft.{command}", description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_class_arguments(kind)
    try:
        return kind(**vars(parser.parse_args(args)))
    except ArgumentError as error:
        out = way_out(str(error), parser.get_defaults().keys(), example)
        raise ValueError(innermost(str(error)) + out) from error


def innermost(message: str, config: Namespace | None = None) -> str:
    """What the parser found wrong, with its key, without all that the value could have been instead.

    Args:
        message: the parser's, in which every level of nesting has lines of its own.
        config: what was parsed, to look the key up where the message has none.
    """
    keys = re.findall(r'Parser key "(.+?)":', message)
    given = re.search(r"Given value: (.*)", message)  # the first is the innermost
    if config and given:
        keys = [key for key, value in config.items(branches=True) if str(value) == given[1]][:1]
    where = f"--{'.'.join(keys)}: " if keys else ""
    lines = [line.strip().removeprefix("- ") for line in LEVEL.sub("", message).splitlines()]
    lines = [line for line in lines if line and not SEARCH.match(line)]
    types = [match for line in lines if (match := EXPECTED.match(line))]
    reasons = [line for line in lines if not EXPECTED.match(line)]
    if reasons or not types:
        return where + " ".join(reasons[:1] if given else reasons)
    types = [match for match in types if match[3]] or types
    other = "values in braces or a class by its import path"
    allowed = sorted(match[1] or (f"one of {match[2]}" if match[2] else other) for match in types)
    return f"{where}must be {' or '.join(allowed)}, but got {types[0][3] or given[1]}"


def way_out(message: str, options: Iterable[str], example: str) -> str:
    """What to do about a mistake that the parser only names; nothing, if it does more.

    Args:
        message: the parser's.
        options: all that the command line knows, without dashes.
        example: arguments with which the command runs.
    """
    if "arguments are required" in message:
        return f"; give them, for example {example}"
    unknown = re.search(r"unrecognized arguments: -*([^ =]+)|(?:Group '(.+)' .+ o|O)ption '(.+?)'", message)
    if not unknown:
        return ""
    name, dashes, options = ".".join(filter(None, unknown.groups())), "--", set(options)
    more = "--print_config" if "config" in options else "--help"
    if name.endswith((".yaml", ".yml")):
        return f"; write --config {name}"
    if classes := CLASS.findall(message):
        parents = getattr(locate(classes[-1]), "__mro__", ())
        options, dashes = {option for parent in parents for option in signature(parent.__init__).parameters}, ""
    close = get_close_matches(name, options - {name}, n=1)
    if close:
        return f"; did you mean {dashes}{close[0]}?"
    return f"; {more} shows what there is"


def resumable(file: Path) -> None:
    """Refuse a file that is no checkpoint of a run.

    Raises:
        ValueError: if it is not there or holds something else.
    """
    where = "checkpoints lie in a run's checkpoints/ folder"
    if not file.is_file():
        raise ValueError(f"--ckpt_path: there is no file {str(file)!r}; {where}")
    try:
        known = {"state_dict", "loops"} <= torch.load(file, map_location="cpu", weights_only=True, mmap=True).keys()
    except Exception:  # whatever the bytes of another file make of the unpickler
        known = False
    if not known:
        raise ValueError(f"--ckpt_path: {str(file)!r} is no checkpoint of a run; {where}")


def writable(folder: Path) -> None:
    """Refuse an output folder that cannot be written.

    Raises:
        ValueError: if it cannot be made or holds no new file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"--output: cannot write to {str(folder)!r} ({error.strerror}); choose another folder"
        ) from None


def new_folder(folder: Path) -> None:
    """Make a folder for results.

    Raises:
        ValueError: if it holds something already, or cannot be written.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--output: {str(folder)!r} is there already; choose another name, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: cannot write {str(folder)!r} ({error.strerror}); choose another place") from None


def run_main(main: Any) -> None:
    """Run a command; a mistake becomes one line on standard error and exit status 2, a stop is no success.

    FAIRNESS_DFT_TRACEBACK=1 shows the whole traceback, for who develops.
    """
    for talker in ("lightning.pytorch", "lightning.fabric.utilities.distributed"):  # they tell every start and process
        logging.getLogger(talker).setLevel(logging.WARNING)
    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)  # it tells what it does without
    for own in (".*LeafSpec.*deprecated", ".*all_gather is deprecated"):  # calls that lightning makes
        warnings.filterwarnings("ignore", message=own, category=FutureWarning)
    warnings.filterwarnings("ignore", message="The dirpath has changed")  # a resumed run has a folder of its own
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists")  # a resumed classifier has its old one
    try:
        with in_one_line():
            main()
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()  # whose threads would else die with the process, and say so
    except (ValueError, MisconfigurationException) as error:
        if os.environ.get("FAIRNESS_DFT_TRACEBACK") == "1":
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, SIGTERMException) as stop:  # where Lightning ends with status 0, or is not at work
        sys.exit(128 + (signal.SIGTERM if isinstance(stop, SIGTERMException) else signal.SIGINT))
