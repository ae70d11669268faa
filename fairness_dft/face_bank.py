"""Embed the faces of a folder of images for face realism: `python -m fairness_dft.face_bank --images FOLDER`."""

if __name__ == "__main__":  # answers before the imports, which take seconds
    from fairness_dft.cli.help import answer_help

    answer_help("face_bank")

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fairness_dft.cli.commands import run_main, writable
from fairness_dft.cli.messages import innermost, way_out
from fairness_dft.faces.finders import DetectedFaces, threads
from fairness_dft.faces.realism import NETWORK, FaceEmbedding
from fairness_dft.files import PICTURES, one_line, replacing

BATCH = 64


def main(args: list[str] | None = None) -> None:
    """Build a bank from the command line.

    Raises:
        ValueError: In one line, for what the user can fix.
    """
    parser = ArgumentParser(
        prog="python -m fairness_dft.face_bank", description=__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--images", type=str, required=True, help="Folder of images, searched with its subfolders.")
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
    objects.faces.load()  # first, since its package contains the face network
    objects.embedding.load()
    embeddings = embed(files, objects.faces, objects.embedding)
    if not len(embeddings):
        raise ValueError(f"--images: no face was detected in the {len(files)} files of {config.images!r}")
    metadata = {"format": "pt", NETWORK: objects.embedding.digest}
    try:
        with replacing(output) as draft:
            save_file({"embeddings": embeddings}, draft, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--output: {str(output)!r} could not be written: {one_line(error)}") from error
    no_face = len(files) - len(embeddings)
    print(f"{len(embeddings)} faces in {output}; {no_face} of {len(files)} files show no face or are not images")


def picture_files(folder: Path) -> list[Path]:
    """Return all files of a folder and its subfolders that may be images, sorted.

    Raises:
        ValueError: If there are none.
    """
    if not folder.is_dir():
        raise ValueError(f"--images: there is no folder {str(folder)!r}")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
    if not files:
        raise ValueError(f"--images: the folder {str(folder)!r} contains no images, such as .jpg or .png")
    return files


def new_file(file: Path) -> Path:
    """Return the path of a file that can be written and does not exist yet.

    Raises:
        ValueError: If it exists, or cannot be written.
    """
    if file.exists():
        raise ValueError(f"--output: {str(file)!r} already exists; choose another name, or remove it")
    writable(file.parent)
    return file


@torch.no_grad()
def embed(files: list[Path], finder: DetectedFaces, embedding: FaceEmbedding) -> Tensor:
    """Return embeddings of the largest face of each image that shows a face.

    Args:
        files: The images.
        finder: a loaded face finder.
        embedding: a loaded face network.

    Returns:
        Embeddings of unit length, float32 with shape (M, D).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    embedding.to(device)
    batches = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
    embeddings = [torch.zeros(0, embedding.width)]
    with ThreadPoolExecutor(threads()) as pool:
        for batch in track(batches, "finding faces", console=Console(stderr=True)):
            crops = pool.map(lambda file: aligned(file, finder, embedding), batch)
            if faces := [face for face in crops if face is not None]:
                embeddings.append(embedding(torch.cat(faces).to(device)).cpu())
    return torch.cat(embeddings)


def aligned(file: Path, finder: DetectedFaces, embedding: FaceEmbedding) -> Tensor | None:
    """Return the aligned largest face of an image, with shape (1, 3, size, size); None if it shows no face."""
    try:
        with Image.open(file) as opened:
            pixels = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    except Exception:  # not an image in spite of its name; each format raises its own
        return None
    faces = finder.find(np.ascontiguousarray(pixels[..., ::-1]))
    if not faces:
        return None
    _, landmarks = faces[0]
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    return embedding.align(image, torch.from_numpy(landmarks)[None].float())


if __name__ == "__main__":
    run_main(main)
