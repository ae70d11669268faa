"""The command line: Lightning's CLI with this project's monitors, one line for every mistake, and one run folder."""

import logging
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

from fairness_dft.callbacks import (
    AdapterAverage,
    AdapterCheckpoint,
    BiasMonitor,
    ImageGrid,
    QualityMonitor,
    Throughput,
)
from fairness_dft.module import FairFinetuning
from fairness_dft.prompts import PromptModule

MONITORS = {
    "adapter_average": AdapterAverage,
    "bias_monitor": BiasMonitor,
    "quality_monitor": QualityMonitor,
    "image_grid": ImageGrid,
    "adapter_checkpoint": AdapterCheckpoint,
    "throughput": Throughput,
}
# How the parser words its messages: what is about its search alone, and the types that it tried.
SEARCH = re.compile(
    r"Does not validate|Subtypes: |Errors:$|Given value|Expected a <class 'NoneType'>|Expected a path but "
)
LEVEL = re.compile(r"(?:- )?(?:Parser key \".+?\"|Problem with given class_path '.+?'):")
TYPE = r"<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.+)\]|dot import path string"
EXPECTED = re.compile(rf"Expected a (?:{TYPE})(?:(?:\. Got value)?: (.*))?$")


class FairnessCLI(LightningCLI):
    """Builds module, prompts, monitors and trainer from YAML files and flags; later ones win.

    Raises:
        ValueError: in one line, for any mistake in configuration, before a model is loaded.
    """

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            FairFinetuning,
            PromptModule,
            subclass_mode_data=True,
            args=args,
            run=False,
            seed_everything_default=0,
            save_config_kwargs={"config_filename": "config.yaml"},
            parser_kwargs={
                "prog": "python -m fairness_dft.fit",
                "parser_mode": "omegaconf+",
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False},
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, callback in MONITORS.items():
            parser.add_lightning_class_args(callback, name)
        for seed in ("model.seed", "data.init_args.seed"):
            parser.link_arguments("seed_everything", seed, compute_fn=int)
        parser.add_argument("--name", type=str, default="run", help="Name of the experiment and of its folder.")
        parser.add_argument("--output", type=str, default="runs", help="Folder that receives all runs.")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Checkpoint to resume from.")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise ValueError(innermost(str(error))) from error

    @override
    def before_instantiate_classes(self) -> None:
        writable(Path(self.config.output))
        if self.config.ckpt_path is not None and not Path(self.config.ckpt_path).is_file():
            raise ValueError(
                f"--ckpt_path: there is no file {self.config.ckpt_path!r}; checkpoints lie in a run's "
                "checkpoints/ folder"
            )

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise ValueError(innermost(str(error), self.config)) from error

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        from lightning.pytorch.loggers import TensorBoardLogger

        if self._get(self.config_init, "trainer.logger") in (None, True):
            kwargs["logger"] = TensorBoardLogger(self.config.output, name=self.config.name)
        return super().instantiate_trainer(**kwargs)


def one_line(error: Exception) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split())


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
    allowed = " or ".join(match[1] or (f"one of {match[2]}" if match[2] else other) for match in types)
    return f"{where}must be {allowed}, but got {types[0][3] or given[1]}"


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


def run_main(main: Any) -> None:
    """Run a command; a ValueError becomes one line on standard error and exit status 2.

    FAIRNESS_DFT_TRACEBACK=1 shows the whole traceback, for who develops.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it advertises at every start
    warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated", category=FutureWarning)  # lightning's own
    try:
        main()
    except ValueError as error:
        if os.environ.get("FAIRNESS_DFT_TRACEBACK") == "1":
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
