"""Images of an audit on disk: those that an audit draws, and those that others made.

A folder has one folder for each model (`original`, `finetuned`), which has one for each prompt, which has the images.
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

from fairness_dft.files import PICTURES, one_line, replacing

TEXT = "prompt.txt"  # beside the images of a prompt, its exact text
HIDDEN = (".", "@", "__MACOSX")  # starts of the names that operating systems add to folders
FOLDERS = {"original": "original", "ema": "finetuned"}


class ImageStore:
    """Images that are made once and then read, so that an audit that was stopped continues where it stopped.

    Args:
        folder: Where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def images(self, model: str, prompt: str, seeds: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Return images of one prompt, in steps of 1/255, whether they are read or made.

        Args:
            model: `original` or `ema`.
            prompt: The text.
            seeds: Seeds of their noise, with shape (n,).
            make: Makes the images of these seeds, with shape (n, 3, H, W), in [0, 1]. Where one image is missing it
                makes all of them, because rounding depends on the number of images.

        Returns:
            Images with shape (n, 3, H, W), in [0, 1], on the device of the seeds.
        """
        files = [self.file(model, prompt, seed) for seed in seeds.tolist()]
        folder = self.folder / FOLDERS[model] / directory(prompt)
        images = {file: read(file) for file in files if file.is_file()}
        missing = [i for i, file in enumerate(files) if file not in images]
        if missing:
            with replacing(folder / TEXT) as draft:
                draft.write_text(prompt, encoding="utf-8")
            made = (make(seeds).float() * 255).round().byte().cpu()
            for i in missing:
                images[files[i]] = made[i]
                with replacing(files[i]) as draft:
                    Image.fromarray(made[i].permute(1, 2, 0).numpy()).save(draft, format="png")
        return torch.stack([images[file] for file in files]).to(seeds.device).float() / 255

    def file(self, model: str, prompt: str, seed: int) -> Path:
        """Return where an image lies."""
        return self.folder / FOLDERS[model] / directory(prompt) / f"{seed}.png"


def directory(prompt: str) -> str:
    """Return the name of a prompt's folder: its words, and a hash in case other prompts start with the same words."""
    words = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60]
    return f"{words}_{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


@contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """Open an image file; its pixels are not read yet.

    Raises:
        ValueError: If it cannot be opened, or not be read within the context.
    """
    try:
        with Image.open(file) as picture:
            yield picture
    except Exception as error:  # each format raises its own
        raise ValueError(f"the image {str(file)!r} cannot be read: {one_line(error)}; remove or replace it") from error


def read(file: Path) -> Tensor:
    """Return an image, uint8 with shape (3, H, W).

    Raises:
        ValueError: If it cannot be read.
    """
    with opened(file) as picture:
        pixels = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def check_sizes(prompt: str, files: Iterable[Path]) -> None:
    """Refuse images of a prompt that differ in size, from the headers of their files.

    Raises:
        ValueError: If one cannot be read, or they do not all have the same size.
    """
    sizes = set()
    for file in files:
        with opened(file) as picture:
            sizes.add(tuple(sorted(picture.size)))  # an EXIF tag may still turn it
    if len(sizes) > 1:
        raise ValueError(f"--images: the images of {prompt!r} must all have the same size")


class ImageFolder:
    """Images that others made: a folder for each prompt, with images of the same size.

    Images of two models are in two such folders, `original` and `finetuned`, in one folder.

    Args:
        folder: Where the images are. A prompt is the text of prompt.txt in its folder or, without that file, the name
            of the folder, with spaces or underscores between words.

    Attributes:
        models: The models that made the images, `original` alone or with `ema`.
        prompts: The texts of the prompts.

    Raises:
        ValueError: If there are no images, one cannot be read, those of a prompt differ in size, two folders have the
            same prompt, or the images of two models differ in their prompts or names.
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
                f"--images: {str(folder)!r} has no images: it must hold a folder for each prompt, with images in it"
            )
        self._check_pairs()
        self.prompts = list(self.files["original"])
        for prompts in self.files.values():
            for prompt, files in prompts.items():
                check_sizes(prompt, files)

    def _check_pairs(self) -> None:
        """Refuse images of two models that differ in their prompts or names."""
        first, last = (
            {prompt: [file.stem for file in files] for prompt, files in self.files[model].items()}
            for model in (self.models[0], self.models[-1])
        )
        if different := sorted(prompt for prompt in {**first, **last} if first.get(prompt) != last.get(prompt)):
            raise ValueError(
                "--images: original and finetuned must have images of the same names for each prompt, from the same "
                f"noise, but those of {different[0]!r} differ"
            )

    def file(self, model: str, prompt: str, number: int) -> Path:
        """Return where an image lies."""
        return self.files[model][prompt][number]

    def images(self, model: str, prompt: str, numbers: Tensor) -> Tensor:
        """Return images of a prompt by their numbers, with shape (n, 3, H, W), in [0, 1].

        Raises:
            ValueError: If one cannot be read, or they do not all have the same size.
        """
        images = [read(self.files[model][prompt][number]) for number in numbers.tolist()]
        if len({image.shape for image in images}) > 1:
            raise ValueError(f"--images: the images of {prompt!r} must all have the same size")
        return torch.stack(images).to(numbers.device).float() / 255


def picture_files(root: Path) -> dict[str, list[Path]]:
    """Return the images of each prompt's folder, sorted, without folders that a system hides or adds (.git, @eaDir).

    Raises:
        ValueError: If two folders have the same prompt.
    """
    prompts: dict[str, list[Path]] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(HIDDEN)):
        pictures = (file for file in folder.iterdir() if not file.name.startswith(HIDDEN))
        files = sorted(file for file in pictures if file.suffix.lower() in PICTURES)
        text = folder / TEXT
        prompt = text.read_text(encoding="utf-8").strip() if text.is_file() else folder.name.replace("_", " ")
        if files and prompt in prompts:
            raise ValueError(f"--images: two folders of {str(root)!r} have the prompt {prompt!r}; make them one")
        if files:
            prompts[prompt] = files
    return prompts
