"""Functions of all commands: parse settings, check folders, and turn a mistake into one line."""

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
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

from fairness_dft.cli.help import answer_help, program
from fairness_dft.cli.memory import in_one_line
from fairness_dft.cli.messages import innermost, way_out
from fairness_dft.files import one_line

Settings = TypeVar("Settings")


def parsed(
    settings: type[Settings], command: str, description: str | None, example: str, args: list[str] | None
) -> Settings:
    """Parse the command line of a command without a trainer: one flag for each field of a dataclass.

    Args:
        settings: The dataclass.
        command: Name of its module.
        description: What the command does.
        example: Arguments of a call.
        args: Arguments of the command line; those of the process by default.

    Raises:
        ValueError: In one line, for every mistake.
    """
    args = answer_help(command, args)
    parser = ArgumentParser(prog=program(command), description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(settings)
    try:
        return settings(**vars(parser.parse_args(args)))
    except ArgumentError as error:
        out = way_out(str(error), parser.get_defaults().keys(), example)
        raise ValueError(innermost(str(error)) + out) from error


def resumable(file: Path) -> None:
    """Refuse a file that is not a checkpoint of a run.

    Raises:
        ValueError: If it does not exist or holds something else.
    """
    where = "checkpoints are in the checkpoints/ folder of a run"
    if not file.is_file():
        raise ValueError(f"--ckpt_path: there is no file {str(file)!r}; {where}")
    try:
        is_checkpoint = {"state_dict", "loops"} <= torch.load(
            file, map_location="cpu", weights_only=True, mmap=True
        ).keys()
    except Exception:  # another file makes the unpickler raise any error
        is_checkpoint = False
    if not is_checkpoint:
        raise ValueError(f"--ckpt_path: {str(file)!r} is not a checkpoint of a run; {where}")


def writable(folder: Path) -> None:
    """Refuse an output folder that cannot be written.

    Raises:
        ValueError: If it cannot be created, or no file can be created in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"--output: cannot write to {str(folder)!r} ({error.strerror}); choose another folder"
        ) from None


def new_folder(folder: Path) -> None:
    """Create a folder for results.

    Raises:
        ValueError: If it already holds something, or cannot be written.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--output: {str(folder)!r} already exists; choose another name, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: cannot write {str(folder)!r} ({error.strerror}); choose another place") from None


def run_main(main: Any) -> None:
    """Run a command; a mistake becomes one line on standard error and exit status 2, and a stop is not a success.

    FAIRNESS_DFT_TRACEBACK=1 shows the whole traceback, for developers.
    """
    for talker in (
        "lightning.pytorch",
        "lightning.fabric.utilities.distributed",
    ):  # they report every start and process
        logging.getLogger(talker).setLevel(logging.WARNING)
    logging.getLogger("transformers.utils.import_utils").setLevel(
        logging.ERROR
    )  # it reports optional packages that are missing
    for own in (".*LeafSpec.*deprecated", ".*all_gather is deprecated"):  # calls of lightning
        warnings.filterwarnings("ignore", message=own, category=FutureWarning)
    warnings.filterwarnings("ignore", message="The dirpath has changed")  # a resumed run has a folder of its own
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists")  # a resumed classifier has its old one
    try:
        with in_one_line():
            main()
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()  # its threads would print an error when the process ends
    except (ValueError, MisconfigurationException) as error:
        if os.environ.get("FAIRNESS_DFT_TRACEBACK") == "1":
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, SIGTERMException) as stop:  # Lightning would exit with status 0
        sys.exit(128 + (signal.SIGTERM if isinstance(stop, SIGTERMException) else signal.SIGINT))
