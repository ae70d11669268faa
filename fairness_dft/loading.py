"""What everything that loads shares: where a path is, whether the hub is within reach, and loaders that keep quiet."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def resolve(path: str | Path) -> Path:
    """Finds a file from the current directory or, if it is not there, from the root of the repository.

    Args:
        path: an absolute path, or one relative to either place.

    Returns:
        The path where the file is, or the path as given if it is in neither place.
    """
    given = Path(path).expanduser()
    shipped = Path(__file__).resolve().parent.parent / given
    return shipped if shipped.exists() and not given.exists() else given


def on_hub(path: str) -> bool:
    """Asks the Hugging Face hub for a model, once, without the retries that make a missing network slow."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(path, timeout=5)
    except Exception:  # not a name, no such model, no access, no network: what is cached may still load
        return False
    return True


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
