"""What all commands share: parse settings, check folders, and end with one line on a mistake."""

import logging
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import distributed

from fairness_dft.cli.help import answer_help, program
from fairness_dft.cli.memory import in_one_line
from fairness_dft.cli.messages import innermost, way_out
from fairness_dft.files import one_line

Settings = TypeVar("Settings")


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
    args = answer_help(command, args)
    parser = ArgumentParser(prog=program(command), description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(kind)
    try:
        return kind(**vars(parser.parse_args(args)))
    except ArgumentError as error:
        out = way_out(str(error), parser.get_defaults().keys(), example)
        raise ValueError(innermost(str(error)) + out) from error


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
