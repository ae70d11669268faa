"""Images of an audit on disk: one that was stopped goes on where it was, and images that others made are looked at.

A folder has one folder for each model (`original`, `finetuned`), in it one for each prompt, and in it the images.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fairness_dft.files import PICTURES, one_line

TEXT = "prompt.txt"  # beside the images of a prompt, its exact text
HIDDEN = (".", "@", "__MACOSX")  # how names of what a system leaves in folders begin
FOLDERS = {"original": "original", "ema": "finetuned"}


class ImageStore:
    """Images that are made once: what is there is read, and what is made is written.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def images(self, model: str, prompt: str, seeds: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Images of one prompt, in steps of 1/255 whether they were read or made.

        Args:
            model: `original` or `ema`.
            prompt: the text.
            seeds: of their noise, with shape (n,).
            make: makes the images of all these seeds, with shape (n, 3, H, W), in [0, 1]. It is asked for all where
                one is missing: beside fewer images, rounding would make others.

        Returns:
            Images with shape (n, 3, H, W), in [0, 1], on the device of the seeds.
        """
        folder = self.folder / FOLDERS[model] / directory(prompt)
        files = [folder / f"{seed}.png" for seed in seeds.tolist()]
        found = {file: read(file) for file in files if file.is_file()}
        missing = [i for i, file in enumerate(files) if file not in found]
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TEXT).write_text(prompt, encoding="utf-8")
            made = (make(seeds).float() * 255).round().byte().cpu()
            for i in missing:
                found[files[i]] = pixels = made[i]
                draft = files[i].with_suffix(".part")
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(draft, format="png")
                draft.replace(files[i])
        return torch.stack([found[file] for file in files]).to(seeds.device).float() / 255


def directory(prompt: str) -> str:
    """The folder of a prompt: its words, and a hash that tells it from others that begin alike."""
    words = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60]
    return f"{words}_{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


@contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """A picture, of which only the head is read yet.

    Raises:
        ValueError: if it, or what is asked of it, cannot be read.
    """
    try:
        with Image.open(file) as picture:
            yield picture
    except Exception as error:  # each format raises its own
        raise ValueError(
            f"the picture {str(file)!r} cannot be read: {one_line(error)}; remove or replace it"
        ) from error


def read(file: Path) -> Tensor:
    """A picture, uint8 with shape (3, H, W).

    Raises:
        ValueError: if it cannot be read.
    """
    with opened(file) as picture:
        pixels = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def check_sizes(prompt: str, files: Iterable[Path]) -> None:
    """Look at the heads of a prompt's pictures.

    Raises:
        ValueError: if one cannot be read, or they are not all of one size.
    """
    sizes = set()
    for file in files:
        with opened(file) as picture:
            sizes.add(tuple(sorted(picture.size)))  # which side is up is told elsewhere
    if len(sizes) > 1:
        raise ValueError(f"--images: the pictures of {prompt!r} must all have the same size")


class ImageFolder:
    """Images that others made: a folder for each prompt, in it any pictures, all of one size.

    Before and after are two such folders, `original` and `finetuned`, in one.

    Args:
        folder: where they lie; a prompt is the text of prompt.txt in its folder or, without, the folder's name, with
            spaces or with underscores for them.

    Attributes:
        models: which models made them, `original` alone or with `ema`.
        prompts: their texts.

    Raises:
        ValueError: if there are no images, one cannot be read, those of a prompt differ in size, two folders are of one
            prompt, or the two models have not the same prompts with images of the same names.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"--images: there is no folder {str(folder)!r}")
        roots = {model: folder / name for model, name in FOLDERS.items() if (folder / name).is_dir()}
        if "original" not in roots or any(
            path.is_dir() and path not in roots.values() and not path.name.startswith(HIDDEN)
            for path in folder.iterdir()
        ):
            roots = {"original": folder}
        self.files = {model: picture_files(root) for model, root in roots.items()}
        self.models = list(self.files)
        if not self.files["original"]:
            raise ValueError(
                f"--images: {str(folder)!r} has no pictures: it must hold a folder for each prompt, with pictures in it"
            )
        names = [{prompt: [file.stem for file in files] for prompt, files in of.items()} for of in self.files.values()]
        if names[0] != names[-1]:
            odd = sorted(
                prompt for prompt in {**names[0], **names[-1]} if names[0].get(prompt) != names[-1].get(prompt)
            )
            raise ValueError(
                "--images: before and after must have pictures of the same names for each prompt, from the same noise, "
                f"but those of {odd[0]!r} differ"
            )
        self.prompts = list(self.files["original"])
        for of in self.files.values():
            for prompt, files in of.items():
                check_sizes(prompt, files)

    def images(self, model: str, prompt: str, numbers: Tensor) -> Tensor:
        """Some images of a prompt by their numbers, with shape (n, 3, H, W), in [0, 1].

        Raises:
            ValueError: if one cannot be read, or they are not all of one size.
        """
        pictures = [read(self.files[model][prompt][number]) for number in numbers.tolist()]
        if len({picture.shape for picture in pictures}) > 1:
            raise ValueError(f"--images: the pictures of {prompt!r} must all have the same size")
        return torch.stack(pictures).to(numbers.device).float() / 255


def picture_files(root: Path) -> dict[str, list[Path]]:
    """The pictures of each prompt's folder, sorted; folders that a system hides or adds (.git, @eaDir) are none.

    Raises:
        ValueError: if two folders are of one prompt.
    """
    found: dict[str, list[Path]] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(HIDDEN)):
        pictures = (file for file in folder.iterdir() if not file.name.startswith(HIDDEN))
        files = sorted(file for file in pictures if file.suffix.lower() in PICTURES)
        text = folder / TEXT
        prompt = text.read_text(encoding="utf-8").strip() if text.is_file() else folder.name.replace("_", " ")
        if files and prompt in found:
            raise ValueError(f"--images: two folders of {str(root)!r} are of the prompt {prompt!r}; make them one")
        if files:
            found[prompt] = files
    return found
