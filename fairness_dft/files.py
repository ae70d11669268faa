"""What all reading and writing shares: find a path, ask the hub, replace a file in one piece, keep loaders quiet."""

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}  # suffixes of files that may be images


def shipped(path: str | Path) -> Path:
    """Return the path of a file that ships with the package.

    An installed package carries `data/` and `experiments/` among its modules; a repository has them at its root.

    Args:
        path: Relative to either place.

    Returns:
        The path where the file is, or where it would be in a repository.
    """
    package = Path(__file__).resolve().parent
    return package / path if (package / path).exists() else package.parent / path


def resolve(path: str | Path) -> Path:
    """Find a path from the current directory or, if it is not there, among the files that ship with the package.

    Args:
        path: An absolute path, or one relative to either place.

    Returns:
        The path where it exists, or the path as given if it exists in neither place.
    """
    given = Path(path).expanduser()
    return shipped(given) if not given.exists() and shipped(given).exists() else given


@dataclass(frozen=True)
class Location:
    """Where the files of a network are: in a local folder, or in a repository of the Hugging Face hub.

    Attributes:
        source: What the loaders of transformers and diffusers take: a local folder, or a hub id.
        folder: The local folder; None for a repository of the hub.
        reachable: Whether the folder exists, or the hub answers for the repository; what is cached of a repository that
            is out of reach may still load.
        name: The name of the file, where the path is that of one file.
    """

    source: str
    folder: Path | None
    reachable: bool
    name: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Options for `from_pretrained` of transformers and diffusers, which keep them off a hub out of reach."""
        return {"local_files_only": self.folder is not None or not self.reachable}

    @property
    def missing(self) -> str:
        """Why nothing can be found here, for errors."""
        if self.folder is not None:
            return f"there is no {'file' if self.name else 'folder'} of this name"
        return f"no such {'file' if self.name else 'folder'}, and not within reach on the Hugging Face hub"

    def holds(self, name: str) -> bool:
        """Return whether a file exists, without downloading it.

        Args:
            name: Its path in the folder or the repository.
        """
        from huggingface_hub import HfApi, try_to_load_from_cache

        if self.folder is not None:
            return bool(name) and (self.folder / name).is_file()
        try:
            if self.reachable:
                return bool(name) and HfApi().file_exists(self.source, name)
            return bool(name) and isinstance(try_to_load_from_cache(self.source, name), str)
        except Exception:  # not a name, no access, no network
            return False

    def file(self, name: str = "") -> Path:
        """Return the local path of a file, downloading it from the hub where it is not cached.

        Args:
            name: Its path in the folder or the repository; by default the one file of the path.

        Raises:
            OSError: If it does not exist or cannot be downloaded.
        """
        from huggingface_hub import hf_hub_download

        if self.folder is None:
            return Path(hf_hub_download(self.source, name or self.name, **self.options))
        file = self.folder / (name or self.name)
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {str(file)!r}")
        return file


def locate(path: str | Path, single_file: bool = False, local_only: bool = False) -> Location:
    """Return where a network or file is: here, beside the package, or on the Hugging Face hub; download nothing.

    Args:
        path: A local folder or the hub id owner/repository; of one file a local path, or owner/repository/file, where
            `file` may lie in a folder.
        single_file: Whether the path is that of one file.
        local_only: Whether it must be on this machine.

    Returns:
        Its place; `Location.reachable` is false where nothing can be found.
    """
    local = resolve(path)
    if single_file:
        owner, repository, file = (*str(path).split("/", 2), "", "", "")[:3]
        if local.is_file() or local_only or not file or owner in ("", "~", ".", ".."):
            return Location(str(local.parent), local.parent, local.is_file(), local.name)
        return Location(f"{owner}/{repository}", None, on_hub(f"{owner}/{repository}"), file)
    if local.is_dir() or local_only:
        return Location(str(local), local, local.is_dir())
    return Location(str(path), None, on_hub(str(path)))


def file_or_hub(path: str) -> Path:
    """Return the local path of one file, downloading it from the Hugging Face hub where it is not cached.

    Args:
        path: A local file, or owner/repository/file on the hub, where `file` may lie in a folder.

    Raises:
        ValueError: If it exists in neither place.
    """
    try:
        return locate(path, single_file=True).file()
    except Exception as error:  # not a name, no such file, no access, no network
        raise ValueError(
            f"the file {path!r} could not be found: give a local file, or owner/repository/file on the Hugging Face hub"
        ) from error


def weights_or_hub(path: str) -> Path:
    """Return the local path of a safetensors file or a folder of them, downloading from the hub what is not cached.

    Args:
        path: A local file or folder, or owner/repository or owner/repository/file on the Hugging Face hub.

    Returns:
        Its path on this machine, or the path as given if it exists in no place.
    """
    from huggingface_hub import snapshot_download

    local = resolve(path)
    if local.exists():
        return local
    try:
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            return Path(snapshot_download(path, allow_patterns="*.safetensors", **locate(path).options))
        return file_or_hub(path)
    except Exception:  # not a name, no such repository, no access, no network
        return local


def on_hub(path: str) -> bool:
    """Return whether the Hugging Face hub answers for a model.

    It asks once, without the retries that make a missing network slow.

    Args:
        path: A hub id, owner/repository.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(path, timeout=5)
    except Exception:  # not a name, no such model, no access, no network: what is cached may still load
        return False
    return True


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Replace a file in one piece: no reader and no crash ever leaves half of it under its name.

    Args:
        file: The file to write or replace; its folder is made.

    Yields:
        A temporary path beside it with the same suffix. At the end it is flushed to disk and renamed; on an error it is
        removed, and the old file stays.

    Example:
        >>> from tempfile import mkdtemp
        >>> file = Path(mkdtemp()) / "results.json"
        >>> with replacing(file) as draft:
        ...     _ = draft.write_text("{}")
        >>> file.read_text()
        '{}'
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{uuid4().hex}{file.suffix}")
    try:
        yield draft
        _flush(draft)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Fill a folder with files, each in one piece, and none before all are written.

    The folder may exist and hold other files, which stay. Files are renamed in the order of their names, configuration
    files last: a network is complete once its config.json is there.

    Args:
        folder: The folder to fill; it is made.

    Yields:
        A temporary folder inside it. At the end its files are flushed to disk and moved to the same places in `folder`;
        on an error it is removed, and nothing else changes.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp()) / "classifier"
        >>> with filling(folder) as draft:
        ...     _ = (draft / "config.json").write_text("{}")
        >>> [file.name for file in folder.iterdir()]
        ['config.json']
    """
    draft = folder / f".{uuid4().hex}"
    draft.mkdir(parents=True)
    try:
        yield draft
        files = sorted((file for file in draft.rglob("*") if file.is_file()), key=lambda f: (f.suffix == ".json", f))
        for file in files:
            _flush(file)
        for file in files:
            final = folder / file.relative_to(draft)
            final.parent.mkdir(parents=True, exist_ok=True)
            file.replace(final)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _flush(file: Path) -> None:
    """Write a file's buffers to disk, so that a rename never outruns its content."""
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())


def one_line(error: Exception) -> str:
    """Return the message of an error without its line breaks."""
    return " ".join(str(error).split())


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the loaders of transformers and diffusers, whose complaints are part of the error in any case."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    bar = transformers_logging.is_progress_bar_enabled()
    for library, _ in before:
        library.set_verbosity(library.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
