"""What everything that loads shares: where a path is, whether the hub is within reach, and loaders that keep quiet."""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}  # suffixes of files that may be pictures


def shipped(path: str | Path) -> Path:
    """Return the path of a file that ships with the package.

    An installed package carries `data/` and `experiments/` among its modules; a repository has them at its root.

    Args:
        path: relative to either place.

    Returns:
        The path where the file is, or where it would be in a repository.
    """
    package = Path(__file__).resolve().parent
    return package / path if (package / path).exists() else package.parent / path


def resolve(path: str | Path) -> Path:
    """Find a file from the current directory or, if it is not there, among those that ship with the package.

    Args:
        path: an absolute path, or one relative to either place.

    Returns:
        The path where the file is, or the path as given if it is in neither place.
    """
    given = Path(path).expanduser()
    return shipped(given) if not given.exists() and shipped(given).exists() else given


def file_or_hub(path: str) -> Path:
    """Finds one file, on this machine or on the Hugging Face hub.

    Args:
        path: of a local file, or owner/repository/file on the hub, where `file` may lie in a folder.

    Returns:
        The path of the file on this machine.

    Raises:
        ValueError: If it is in neither place.
    """
    from huggingface_hub import hf_hub_download

    local = resolve(path)
    if local.is_file():
        return local
    owner, repository, file = (*str(path).split("/", 2), "", "", "")[:3]
    name = f"{owner}/{repository}"
    try:
        if not file or owner in ("", "~", ".", ".."):
            raise FileNotFoundError(path)  # a path of this machine, which is nobody else's business
        return Path(hf_hub_download(name, file, local_files_only=not on_hub(name)))
    except Exception as error:  # not a name, no such file, no access, no network
        raise ValueError(
            f"the file {path!r} could not be found: give a local file, or owner/repository/file on the Hugging Face hub"
        ) from error


def weights_or_hub(path: str) -> Path:
    """Finds a safetensors file, or a folder of such, on this machine or on the Hugging Face hub.

    Args:
        path: of a local file or folder, or owner/repository or owner/repository/file on the hub.

    Returns:
        Its path on this machine, or the path as given if it is in no place.
    """
    from huggingface_hub import snapshot_download

    local = resolve(path)
    if local.exists():
        return local
    try:
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            return Path(snapshot_download(path, allow_patterns="*.safetensors", local_files_only=not on_hub(path)))
        return file_or_hub(path)
    except Exception:  # not a name, no such repository, no access, no network
        return local


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Replace a file in one piece: no reader, and no crash, ever leaves half of it under its name.

    Args:
        file: what is written or replaced; its folder is made.

    Yields:
        A temporary path beside it with the same suffix. At the end it is flushed to disk and renamed; on an error it is
        removed, and what was there before stays.

    Example:
        >>> with replacing(Path("results.json")) as draft:  # doctest: +SKIP
        ...     draft.write_text("{}")
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{uuid4().hex}{file.suffix}")
    try:
        yield draft
        with draft.open("r+b") as written:
            os.fsync(written.fileno())
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def on_hub(path: str) -> bool:
    """Asks the Hugging Face hub for a model, once, without the retries that make a missing network slow."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(path, timeout=5)
    except Exception:  # not a name, no such model, no access, no network: what is cached may still load
        return False
    return True


def one_line(error: Exception) -> str:
    """Returns the message of an error without its line breaks."""
    return " ".join(str(error).split())


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the loaders of transformers and diffusers, whose complaints end up in the error anyway."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    bar = transformers_logging.is_progress_bar_enabled()
    for library, _ in before:
        library.set_verbosity(library.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
