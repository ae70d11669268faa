"""What an audit depends on, and whether an audit that was stopped may continue.

audit.json holds the settings, prompts, images, adapter and networks that an audit's figures depend on. An audit
continues only where they are the same. Until it is finished, it may ask for more prompts or images of each, and for
other classifiers, since the images that it has already drawn stay valid.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from torch import nn

from fairness_dft.diffusion.text_to_image import TextToImage
from fairness_dft.prompts.files import Prompt
from fairness_dft.training.originals import content_of

# Settings that an audit's images, and so its figures, depend on.
DECIDING = (
    "seed_everything",
    "split",
    "images",
    "trainer.precision",
    "model.generator",
    "model.evaluation_sampler",
    "model.sampler",
    "data",
    "model.judge",
    "model.attribute",
    "model.features",
    "bias_monitor",
    "quality_monitor",
)
# Those that may change until the audit is finished.
FREE = (
    "model.judge",
    "model.attribute",
    "model.features",
    "bias_monitor",
    "quality_monitor",
    "data.init_args.test_prompts",
    "data.init_args.test_images_per_prompt",
    "content",
    "networks.judges",
)
NETWORKS = "networks."  # starts the names of what is known once networks are loaded


def audit_identity(
    settings: Namespace | Mapping[str, Any],
    prompts: Sequence[Prompt],
    images: Iterable[Path] = (),
    adapter: Iterable[Path] = (),
) -> dict[str, Any]:
    """Return what an audit depends on, as far as it is known before a network is loaded.

    Args:
        settings: All settings of the command, by their keys with dots.
        prompts: The prompts of the images.
        images: The files of images that others made.
        adapter: The files of the adapter.
    """
    deciding = {key: settings.get(key) for key in DECIDING}
    identity = dict(flat(json.loads(json.dumps(deciding, default=plain))))
    content = hashlib.sha256("\n".join(prompt.text for prompt in prompts).encode())
    for file in images:
        content.update(file.read_bytes())
    identity["content"] = content.hexdigest()  # prompts and images may change under the same name
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in adapter}
    return identity | {f"adapter.{name}": digest for name, digest in digests.items()}


def network_identity(classifiers: Iterable[nn.Module], generator: TextToImage | None) -> dict[str, str]:
    """Return hashes of what the loaded networks compute: they may change under the same path.

    Args:
        classifiers: Everything that looks at images, feature networks included.
        generator: The text-to-image model; None where others made the images.
    """
    identity = {f"{NETWORKS}judges": content_of(*classifiers)}
    if generator is not None:
        identity[f"{NETWORKS}generator"] = content_of(*generator.children())
    return identity


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something other than an audit.

    Raises:
        ValueError: If it does.
    """
    started = {"audit.part", "config.yaml"}
    if (folder / "audit.json").is_file() or not folder.is_dir():
        return
    if any(path.name not in started and not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"--name: {str(folder)!r} already exists and is not an audit; choose another name")


def check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to continue an audit that depends on something else.

    Args:
        folder: The audit's folder; a new audit has no audit.json in it yet.
        identity: What the audit depends on now; without the networks, if they are not loaded yet.

    Raises:
        ValueError: If something differs that may not change.
    """
    file = folder / "audit.json"
    if not file.is_file():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    finished = (folder / "results.json").is_file()
    loaded = any(key.startswith(NETWORKS) for key in identity)
    for key in {**before, **identity}:
        known = loaded or not key.startswith(NETWORKS)
        fixed = finished or not key.startswith(FREE)
        if known and fixed and before.get(key) != identity.get(key):
            raise ValueError(
                f"--name: {str(folder)!r} is an audit with {key} {before.get(key)!r}, not {identity.get(key)!r}; "
                "choose another name, or remove it"
            )


def plain(value: Any) -> Any:
    """Return a value that JSON does not know as one that it knows."""
    return value.as_dict() if hasattr(value, "as_dict") else str(value)


def flat(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested settings, with their keys joined by dots."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flat(value, f"{name}.{key}" if name else key)
    else:
        yield name, tree
