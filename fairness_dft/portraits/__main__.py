"""Draw the portrait world and train everything that ships in data/portraits: `python -m fairness_dft.portraits`.

The stages run in the order of `STAGES`; each writes its part and its figures (manifest.json), and reads from disk
what the earlier ones wrote, so that a single stage can be run again with `--only`.
"""

import argparse
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from transformers import CLIPTokenizer
from transformers.utils import logging

from fairness_dft.cli.commands import run_main, writable
from fairness_dft.portraits.base import base_bias
from fairness_dft.portraits.classifiers import train_classifier
from fairness_dft.portraits.detector import train_detector
from fairness_dft.portraits.features import train_clip, train_dino
from fairness_dft.portraits.text_to_image import save_pipeline, train_autoencoder, train_generator
from fairness_dft.portraits.training import draw_portraits, save_half
from fairness_dft.portraits.world import DATA, training_subjects


def vae_of(folder: Path) -> AutoencoderKL:
    """Load the trained autoencoder."""
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(folder / "pipeline" / "vae", torch_dtype=torch.float32).eval()
    return vae


def autoencoder(folder: Path, scale: float) -> Mapping[str, object]:
    """Train the variational autoencoder."""
    model, figures = train_autoencoder(draw_portraits(int(20_000 * scale), seed=1), int(2_200 * scale), seed=1)
    save_half(model, folder / "pipeline" / "vae")
    return figures


def generator(folder: Path, scale: float) -> Mapping[str, object]:
    """Train text encoder and U-Net, and save the whole pipeline."""
    portraits = draw_portraits(int(60_000 * scale), seed=2)
    pipeline, figures = train_generator(vae_of(folder), portraits, int(14_000 * scale), seed=2)
    save_pipeline(pipeline, folder / "pipeline")
    return figures


def training_classifier(folder: Path, scale: float) -> Mapping[str, object]:
    """Train the classifier that finetuning learns from."""
    return train_classifier("training", vae_of(folder), folder / "classifier_training", scale)


def evaluation_classifier(folder: Path, scale: float) -> Mapping[str, object]:
    """Train the classifier that only evaluates; it also names the subject."""
    return train_classifier("evaluation", vae_of(folder), folder / "classifier_evaluation", scale)


def detector(folder: Path, scale: float) -> Mapping[str, object]:
    """Train the face detector."""
    return train_detector(vae_of(folder), folder, scale)


def clip(folder: Path, scale: float) -> Mapping[str, object]:
    """Train the CLIP model (CLIP-T, CLIP-I)."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "pipeline" / "tokenizer")
    return train_clip(vae_of(folder), tokenizer, folder / "clip", scale)


def dino(folder: Path, scale: float) -> Mapping[str, object]:
    """Train the DINO stand-in."""
    return train_dino(vae_of(folder), folder / "dino", scale)


def bias(folder: Path, scale: float) -> Mapping[str, object]:
    """Measure the bias of what was trained, before any finetuning."""
    return base_bias(folder, max(4, int(48 * scale)))


STAGES: dict[str, Callable[[Path, float], Mapping[str, object]]] = {
    "autoencoder": autoencoder,
    "generator": generator,
    "training_classifier": training_classifier,
    "evaluation_classifier": evaluation_classifier,
    "detector": detector,
    "clip": clip,
    "dino": dino,
    "base_bias": bias,
}


def main() -> None:
    """Parse the command line and run the stages."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    parser = argparse.ArgumentParser(prog="python -m fairness_dft.portraits", description=__doc__)
    parser.add_argument("--output", type=Path, default=DATA, help="folder to write (default: data/portraits)")
    parser.add_argument("--only", choices=STAGES, action="append", help="run this stage alone (repeatable)")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of data and steps, for a quick trial")
    arguments = parser.parse_args()
    if not arguments.scale > 0:
        parser.error(f"--scale must be positive, but is {arguments.scale:g}")
    if arguments.scale != 1 and arguments.output == DATA:
        parser.error("--scale: a trial needs an --output of its own, so that the shipped networks stay")
    manifest_file = arguments.output / "manifest.json"
    writable(arguments.output)
    what = "# What the drawn world knows of the training splits of data/prompts: occupations, sports, descriptors."
    allowed = "\n".join((what, *training_subjects()))
    (arguments.output / "training_subjects.txt").write_text(allowed + "\n", encoding="utf-8")
    for name in arguments.only or STAGES:
        figures = STAGES[name](arguments.output, arguments.scale)
        manifest = json.loads(manifest_file.read_text()) if manifest_file.exists() else {}
        manifest |= {name: figures, "torch": torch.__version__, "python": platform.python_version()}
        manifest_file.write_text(json.dumps(manifest, indent=1) + "\n")
        print(f"{name}: done")


if __name__ == "__main__":
    run_main(main)
