"""Embed the faces of a folder of pictures for face realism: `python -m fairness_dft.face_bank --images FOLDER`."""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from fairness_dft.cli import innermost, run_main, way_out
from fairness_dft.faces import DetectedFaces
from fairness_dft.features import FaceEmbedding

BATCH = 64


def main(args: list[str] | None = None) -> None:
    """Build a bank from the command line.

    Raises:
        ValueError: in one line, for what the user can mend.
    """
    parser = ArgumentParser(
        prog="python -m fairness_dft.face_bank", description=__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--images", type=str, required=True, help="Folder of pictures, searched with its subfolders.")
    parser.add_argument("--output", type=str, default="face_bank.safetensors", help="File to write.")
    parser.add_class_arguments(FaceEmbedding, "embedding")
    parser.add_class_arguments(DetectedFaces, "faces", skip={"margin", "size"})
    try:
        config = parser.parse_args(args)
    except ArgumentError as error:
        out = way_out(str(error), parser.get_defaults().keys(), "--images FOLDER")
        raise ValueError(innermost(str(error)) + out) from error
    files = picture_files(Path(config.images))
    output = new_file(Path(config.output))
    objects = parser.instantiate_classes(config)
    objects.faces.load()
    objects.embedding.load()
    embeddings, skipped = embed(files, objects.faces, objects.embedding)
    if not len(embeddings):
        raise ValueError(f"--images: no face was found in the {len(files)} files of {config.images!r}")
    save_file({"embeddings": embeddings}, output, metadata={"format": "pt"})
    print(f"{len(embeddings)} faces in {output}; {skipped} of {len(files)} files show none or are no pictures")


def picture_files(folder: Path) -> list[Path]:
    """All files of a folder and its subfolders that may be pictures, sorted.

    Raises:
        ValueError: if there are none.
    """
    if not folder.is_dir():
        raise ValueError(f"--images: there is no folder {str(folder)!r}")
    known = Image.registered_extensions()
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in known and file.is_file())
    if not files:
        raise ValueError(f"--images: the folder {str(folder)!r} holds no pictures, such as .jpg or .png")
    return files


def new_file(file: Path) -> Path:
    """A file that can be written, and is not there yet.

    Raises:
        ValueError: if it is there, or cannot be written.
    """
    if file.exists():
        raise ValueError(f"--output: {str(file)!r} is there already; choose another name, or remove it")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        file.unlink()
    except OSError as error:
        raise ValueError(f"--output: cannot write {str(file)!r} ({error.strerror}); choose another place") from None
    return file


@torch.no_grad()
def embed(files: list[Path], finder: DetectedFaces, embedding: FaceEmbedding) -> tuple[Tensor, int]:
    """Embeddings of the largest face of each picture.

    Args:
        files: the pictures.
        finder: a loaded face finder.
        embedding: a loaded face network.

    Returns:
        Embeddings of unit length, float32 with shape (M, D), and how many files show no face or are no pictures.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    embedding.to(device)
    faces, embeddings = aligned(files, finder, embedding), []
    while batch := list(islice(faces, BATCH)):
        embeddings.append(embedding(torch.cat(batch).to(device)).cpu())
    found = torch.cat(embeddings) if embeddings else torch.zeros(0, 1)
    return found, len(files) - len(found)


def aligned(files: list[Path], finder: DetectedFaces, embedding: FaceEmbedding) -> Iterator[Tensor]:
    """The aligned largest face of each picture that shows one, with shape (1, 3, size, size)."""
    for file in track(files, description="finding faces", disable=not sys.stderr.isatty()):
        try:
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB"))
        except (OSError, ValueError):  # what is no picture in spite of its name
            continue
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        _, landmarks, mask = finder.detect(image)
        if mask.item():
            yield embedding.align(image, landmarks)


if __name__ == "__main__":
    run_main(main)
