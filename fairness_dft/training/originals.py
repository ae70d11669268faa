"""A cache of what training needs of the original images.

The image o of the original model, from the same prompt and noise as the trained model's x, never changes, and training
needs a few kilobytes of it: embeddings, class, box. In memory the cache lasts for a run. In a folder it lasts for all
runs that sample the same images and measure them with the same networks: the name of an image's file hashes everything
that it depends on, including the content of the networks. Files are complete or missing, even if several processes
share the folder and one of them dies.
"""

import hashlib
import inspect
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fairness_dft.classifiers.judge import Verdict
from fairness_dft.faces.detectors import FaceDetector
from fairness_dft.files import replacing
from fairness_dft.prompts.batches import PromptBatch

FORMAT = 1  # of a file; increase it when its content is computed in another way
PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.Size)


@dataclass(frozen=True)
class Original:
    """What training needs of N original images o: a few kilobytes per image, not its pixels.

    Attributes:
        verdict: What the classifier sees in them.
        features: The embeddings by each feature network, with shapes (N, D).
        faces: The embeddings of the aligned faces, with shape (N, D); None without face realism.
    """

    verdict: Verdict
    features: list[Tensor]
    faces: Tensor | None = None

    def to(self, device: torch.device) -> "Original":
        """Return a copy on another device."""
        return Original.from_tensors({name: values.to(device) for name, values in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, each with one row per image."""
        tensors = {f"logits.{name}": values for name, values in self.verdict.logits.items()}
        tensors |= {"face": self.verdict.has_face, "boxes": self.verdict.boxes}
        tensors |= {f"features.{place}": values for place, values in enumerate(self.features)}
        optional = {"landmarks": self.verdict.landmarks, "faces": self.faces}
        return tensors | {name: values for name, values in optional.items() if values is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Original":
        """Build the original from what `tensors` returned."""
        logits = {name.removeprefix("logits."): tensors[name] for name in tensors if name.startswith("logits.")}
        verdict = Verdict(logits, tensors["face"], tensors["boxes"], tensors.get("landmarks"))
        places = range(sum(name.startswith("features.") for name in tensors))
        return cls(verdict, [tensors[f"features.{place}"] for place in places], tensors.get("faces"))


class OriginalStore:
    """Originals on disk, one file per image.

    Args:
        folder: Where the files are; `prepare` creates it.
        depends_on: Everything that an original depends on, except prompt, noise and number of steps, as one text.
    """

    def __init__(self, folder: Path, depends_on: str) -> None:
        self.folder, self.depends_on = folder, depends_on

    def files(self, prompt: str, seeds: Sequence[int], steps: int) -> list[Path]:
        """Return the file of each image, whether it exists or not."""
        keys = [json.dumps([FORMAT, self.depends_on, prompt, steps, seed]) for seed in seeds]
        names = [hashlib.blake2b(key.encode(), digest_size=20).hexdigest() for key in keys]
        return [self.folder / name[:2] / f"{name[2:]}.safetensors" for name in names]

    def read(self, prompt: str, seeds: Sequence[int], steps: int, device: torch.device) -> Original | None:
        """Return the originals of all seeds, in their order; None if one is missing or cannot be read."""
        try:
            rows = [load_file(file) for file in self.files(prompt, seeds, steps)]
            stacked = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
            return Original.from_tensors(stacked)
        except (OSError, SafetensorError, KeyError):
            return None

    def check(self) -> None:
        """Refuse a folder that cannot be written, or made where it is missing; nothing is left in it.

        Raises:
            ValueError: If it cannot.
        """
        nearest = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        try:
            with TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            raise self.refusal(error) from None

    def prepare(self) -> None:
        """Make the folder, and remove temporary files that are older than a day, whose writers died.

        Raises:
            ValueError: If it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for draft in self.folder.glob("*/.*.safetensors"):
                if time.time() - draft.stat().st_mtime > 24 * 3600:
                    draft.unlink(missing_ok=True)
        except OSError as error:
            raise self.refusal(error) from None

    def refusal(self, error: Exception) -> ValueError:
        """Return an error, in one line, about a folder that cannot be written."""
        reason = str(error).partition("\n")[0]
        return ValueError(
            f"--model.originals_folder: cannot write {str(self.folder)!r} ({reason}); choose another folder, or leave "
            "the setting out to cache the original images for one run only"
        )

    def write(self, prompt: str, seeds: Sequence[int], steps: int, original: Original) -> None:
        """Write the originals, one file for each seed.

        Raises:
            ValueError: If the folder cannot be written.
        """
        tensors = {name: values.detach().cpu() for name, values in original.tensors().items()}
        try:
            for row, file in enumerate(self.files(prompt, seeds, steps)):
                with replacing(file) as draft:
                    save_file({name: values[row].clone() for name, values in tensors.items()}, draft)
        except (OSError, SafetensorError) as error:
            raise self.refusal(error) from None


class Originals:
    """The cache of originals: in memory for a run, and on disk for all runs if there is a store.

    Attributes:
        cached: The originals of this run, on the CPU, because they would fill a GPU.
        store: The originals on disk.
    """

    def __init__(self) -> None:
        self.cached: dict[tuple[str, tuple[int, ...], int], Original] = {}
        self.store: OriginalStore | None = None

    def get(self, batch: PromptBatch, steps: int, device: torch.device) -> Original | None:
        """Return the originals of this prompt, noise and number of steps; None if they are not cached."""
        key = self.key(batch, steps)
        original = self.cached.get(key)
        if original is None and self.store and batch.is_repeated:
            original = self.store.read(*key, torch.device("cpu"))
            if original is not None:
                self.cached[key] = original
        return None if original is None else original.to(device)

    def put(self, batch: PromptBatch, steps: int, original: Original) -> None:
        """Cache the originals, if the same noise is repeated.

        Raises:
            ValueError: If the folder of the store cannot be written.
        """
        if not batch.is_repeated:
            return
        key = self.key(batch, steps)
        self.cached[key] = original.to(torch.device("cpu"))
        if self.store:
            self.store.write(*key, self.cached[key])

    def key(self, batch: PromptBatch, steps: int) -> tuple[str, tuple[int, ...], int]:
        """Return what the images depend on, in addition to the networks."""
        return batch.prompt.text, tuple(batch.seeds.tolist()), steps


def content_of(*parts: Any) -> str:
    """Hash networks by what they compute: classes, settings, weights, and the files of face detectors.

    Args:
        parts: Loaded networks, or settings. All public attributes count for objects of this project; all attributes
            and the source for classes that are derived from them elsewhere; configuration and weights for objects of
            transformers and diffusers; the class alone for anything else.

    Returns:
        A hexadecimal digest.
    """
    digest = hashlib.blake2b(digest_size=20)
    seen: set[int] = set()
    for part in parts:
        for chunk in _pieces(part, seen):
            digest.update(chunk)
    return digest.hexdigest()


def _pieces(value: Any, seen: set[int]) -> Iterator[bytes]:
    """Yield bytes that differ between different values."""
    if isinstance(value, PLAIN):
        yield f"{type(value).__name__}:{value!r};".encode()
    elif isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield from _pieces(torch.from_numpy(value), seen)
    elif isinstance(value, Path):
        yield value.read_bytes()
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from (*_pieces(str(key), seen), *_pieces(value[key], seen))
    elif isinstance(value, (list, tuple)):
        yield f"[{len(value)}]".encode()
        for item in value:
            yield from _pieces(item, seen)
    elif id(value) not in seen:
        seen.add(id(value))
        derived = [cls for cls in type(value).__mro__ if cls.__module__.partition(".")[0] == "fairness_dft"]
        yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
        if isinstance(value, nn.Module):
            yield from _pieces(dict(value._parameters) | dict(value._buffers) | dict(value._modules), seen)
        if isinstance(value, FaceDetector):
            yield from _pieces(value.files, seen)
        if hasattr(value, "to_json_string"):  # a scheduler
            yield value.to_json_string().encode()
        elif hasattr(value, "get_vocab"):
            yield from _pieces(value.get_vocab(), seen)
        elif derived:
            foreign = type(value) is not derived[0]
            yield _source(type(value)) if foreign else b""
            own = {name: held for name, held in vars(value).items() if foreign or not name.startswith("_")}
            yield from _pieces({name: held for name, held in own.items() if name not in vars(nn.Module())}, seen)
        elif isinstance(value, nn.Module) and hasattr(value, "config"):
            config: Any = value.config
            yield from _pieces(config.to_dict() if hasattr(config, "to_dict") else dict(config), seen)


def _source(cls: type) -> bytes:
    """Return the source of a class; empty if it is not in a file."""
    try:
        return inspect.getsource(cls).encode()
    except (OSError, TypeError):
        return b""
