"""Export a finetuned model: `python -m fairness_dft.export --run runs/gender/version_0 --output fair`.

The folder holds the adapter as plain diffusers loads it, a copy for ComfyUI and AUTOMATIC1111, a model card and, on
request, the whole pipeline with the adapter merged into its weights.
"""

if __name__ == "__main__":  # answers before the imports, which take seconds
    from fairness_dft.cli.help import answer_help

    answer_help("export")

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fairness_dft.adapters.base import Adapter
from fairness_dft.adapters.lora import LoRA
from fairness_dft.adapters.prompt_prefix import PromptPrefix
from fairness_dft.cli.commands import new_folder, parsed, run_main
from fairness_dft.cli.finished_run import build, load_adapter
from fairness_dft.faces.detectors import InsightFace
from fairness_dft.faces.finders import DetectedFaces
from fairness_dft.files import on_hub, one_line, quiet, resolve
from fairness_dft.reports.adapter_card import CardFacts, adapter_card
from fairness_dft.reports.results import Results
from fairness_dft.training.finished_run import Average, FinishedRun
from fairness_dft.training.module import FairFinetuning

KOHYA_FILE = "kohya.safetensors"
KOHYA = {"text_encoder": "lora_te", "unet": "lora_unet"}  # names of the networks of Stable Diffusion 1.x and 2.x


@dataclass(frozen=True)
class Settings:
    """Settings of the command.

    Args:
        run: Folder of a run, with its config.yaml and adapters/.
        output: Folder to write; it must be new or empty.
        step: Training step of the adapter; the last one by default.
        adapter: `ema`, the average over the training steps, or `trained`, the last adapter itself.
        scale: Strength of the adapter, relative to that in the test of the run.
        merge: Whether to write the whole pipeline too, with the adapter merged into it.
        push: Name of a new repository on the Hugging Face hub, OWNER/NAME, that receives the folder.
        private: Whether that repository is private.
    """

    run: str
    output: str
    step: int | None = None
    adapter: Average = "ema"
    scale: float = 1.0
    merge: bool = False
    push: str | None = None
    private: bool = True


def main(args: list[str] | None = None) -> None:
    """Export from the command line.

    Raises:
        ValueError: In one line, for every mistake of the user.
    """
    settings = parsed(Settings, "export", __doc__, "--run runs/gender/version_0 --output fair", args)
    run = FinishedRun(settings.run)
    folder = run.adapter(settings.step, settings.adapter)
    results = run.results()
    if settings.push:
        check_token()
    output = Path(settings.output)
    new_folder(output)
    with tempfile.TemporaryDirectory(dir=output.parent) as draft:  # a failure leaves no incomplete folder
        fill(Path(draft), build(run, draft).model, folder, results, settings)
        for file in Path(draft).iterdir():
            shutil.move(file, output)
    print(f"Exported: {output}")
    if settings.push:
        upload(output, settings.push, settings.private)


def fill(output: Path, module: FairFinetuning, folder: Path, results: Results | None, settings: Settings) -> None:
    """Write everything that is exported into a folder."""
    load_adapter(module, folder, settings.adapter, settings.scale)
    adapter = module.adapter
    adapter.save(output, settings.adapter)
    if weights := kohya(adapter, settings.adapter):
        save_file(weights, output / KOHYA_FILE, metadata={"ss_network_module": "networks.lora"})
    if settings.merge:
        merge(str(getattr(module.generator, "path", "")), output, adapter)
    card = adapter_card(card_facts(module), results, folder, settings.scale, merged=settings.merge)
    (output / "README.md").write_text(card, encoding="utf-8")


def card_facts(module: FairFinetuning) -> CardFacts:
    """Return what the model card says about a run in addition to its figures."""
    faces = module.judge.faces
    networks = [getattr(network, "path", None) for network in (module.judge.classifier, *module.features)]
    return CardFacts(
        base=str(getattr(module.generator, "path", type(module.generator).__name__)),
        attributes=module.attribute.names,
        adapter=module.adapter,
        learned_from=[path for path in networks if path],
        compares_faces=module.face_realism is not None,
        uses_insightface=isinstance(faces, DetectedFaces)
        and any(isinstance(detector, InsightFace) for detector in faces.detectors),
    )


def kohya(adapter: Adapter, name: Average) -> dict[str, Tensor]:
    """Return the LoRA parts of an adapter under the names of kohya-ss, which ComfyUI and AUTOMATIC1111 read.

    Args:
        adapter: The adapter, attached to a model.
        name: Which of its tensors.

    Returns:
        For each layer its factors, `….lora_down.weight` with shape (rank, inputs) and `….lora_up.weight` with shape
        (outputs, rank), and the scalar `….alpha`; nothing without LoRA.
    """
    weights: dict[str, Tensor] = {}
    for part in adapter.parts:
        if not isinstance(part, LoRA):
            continue
        for key, tensor in part.state_dict(name).items():
            for factor, side in zip(part.factors, ("lora_down", "lora_up"), strict=True):
                if key.endswith(f".{factor}.weight"):
                    path = key.removesuffix(f".{factor}.weight").removeprefix(f"{part.component}.")
                    layer = f"{KOHYA[part.component]}_{path.replace('.', '_')}"
                    weights[f"{layer}.{side}.weight"] = tensor
                    weights[f"{layer}.alpha"] = torch.tensor(float(part.alpha_of(name)))
    return weights


def merge(path: str, output: Path, adapter: Adapter) -> None:
    """Write the base pipeline with an exported adapter merged into it, into the subfolder `merged`.

    Args:
        path: Folder or hub id of the base model.
        output: Folder of the exported adapter.
        adapter: The adapter; the words of a prompt prefix become part of the vocabulary.

    Raises:
        ValueError: If diffusers cannot load the base model.
    """
    from diffusers import StableDiffusionPipeline

    folder = resolve(path)
    try:
        with quiet():
            pipeline = StableDiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
                str(folder) if folder.is_dir() else path,
                use_safetensors=True,
                local_files_only=folder.is_dir() or not on_hub(path),
            )
    except Exception as error:  # each file format raises its own
        raise ValueError(f"--merge: {path!r} could not be loaded by diffusers: {one_line(error)}") from error
    if any(isinstance(part, LoRA) for part in adapter.parts):
        pipeline.load_lora_weights(output, weight_name=LoRA.file)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    if any(isinstance(part, PromptPrefix) for part in adapter.parts):
        pipeline.load_textual_inversion(str(output), weight_name=PromptPrefix.file)
    pipeline.save_pretrained(output / "merged", safe_serialization=True)


def check_token() -> None:
    """Refuse to push without a token.

    Raises:
        ValueError: If there is none.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise ValueError("--push: there is no Hugging Face token; run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, repository: str, private: bool) -> None:
    """Upload a folder to the hub, into a new repository.

    Raises:
        ValueError: If the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        url = HfApi().create_repo(repository, private=private)
        HfApi().upload_folder(folder_path=folder, repo_id=repository)
    except Exception as error:  # from the hub, the network or the name
        raise ValueError(
            f"--push: {repository!r} could not be uploaded ({one_line(error)}); {str(folder)!r} is complete: "
            f"upload it with `hf upload {repository} {folder}`"
        ) from error
    print(f"Uploaded: {url}")


if __name__ == "__main__":
    run_main(main)
