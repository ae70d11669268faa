"""The names of older versions, so that their runs, configurations and flags still open."""

import re
import sys

from yaml import MappingNode, Node, ScalarNode, SequenceNode

# Classes that YAML may name, without the leading `fairness_dft.`: 0.1 had one module each, 0.2 has rooms.
CLASSES = {
    "any_pipeline.AnyPipeline": "diffusion.AnyPipeline",
    "callbacks.AdapterAverage": "training.callbacks.AdapterAverage",
    "callbacks.AdapterCheckpoint": "training.callbacks.AdapterCheckpoint",
    "callbacks.StepBar": "training.callbacks.StepBar",
    "callbacks.Throughput": "training.callbacks.Throughput",
    "dashboard.Dashboard": "training.dashboard.Dashboard",
    "detectors.InsightFace": "faces.InsightFace",
    "detectors.YuNet": "faces.YuNet",
    "diffusers_adapter.DiffusersAdapter": "adapters.DiffusersAdapter",
    "diffusers_adapter.NoAdapter": "adapters.NoAdapter",
    "face_datasets.CelebA": "datasets.CelebA",
    "face_datasets.FairFace": "datasets.FairFace",
    "face_datasets.UTKFace": "datasets.UTKFace",
    "features.FaceEmbedding": "faces.FaceEmbedding",
    "features.FaceRealism": "faces.FaceRealism",
    "fidelity.Inception": "metrics.Inception",
    "gradients.GradientPath": "sampling.GradientPath",
    "labelled_faces.LabelledFolder": "datasets.LabelledFolder",
    "monitors.BiasMonitor": "training.bias_monitor.BiasMonitor",
    "monitors.ImageGrid": "training.image_grid.ImageGrid",
    "monitors.QualityMonitor": "training.quality_monitor.QualityMonitor",
    "prompt_prefix.PromptPrefix": "adapters.PromptPrefix",
    "sampler.Sampler": "sampling.Sampler",
    "stop.FiniteSteps": "training.interruption.SkipNonFiniteSteps",
    "stop.GracefulStop": "training.interruption.GracefulStop",
}
# Settings, each by its whole key.
KEYS = {
    "finite_steps": "skip_non_finite_steps",
    "model.attribute.factor1": "model.attribute.semantics_factor",
    "model.attribute.factor2": "model.attribute.face_gradient_factor",
}
# Shipped files, by their place in experiments/.
FILES = {"obedient": "prompt_adherence", "parts/obedient": "parts/prompt_adherence"}

_CLASS = re.compile(r"fairness_dft\.(\w+\.\w+)(?![\w.])")


def current_class(text: str) -> str:
    """Replace every class path of an older version in a text.

    Args:
        text: a value on the command line or in a YAML file.

    Example:
        >>> current_class("fairness_dft.detectors.YuNet")
        'fairness_dft.faces.YuNet'
    """
    return _CLASS.sub(lambda match: f"fairness_dft.{CLASSES.get(match[1], match[1])}", text)


def current_key(key: str) -> str:
    """Return the name that a setting has now, and print a notice if it had another one.

    Args:
        key: the whole key of a setting, with dots, as a flag has it.

    Example:
        >>> current_key("model.attribute.name")
        'model.attribute.name'
    """
    for old, new in KEYS.items():
        if key == old or key.startswith(f"{old}."):
            print(f"notice: {old} is now called {new}; the old name still works", file=sys.stderr)
            return new + key.removeprefix(old)
    return key


def current_flag(argument: str) -> str:
    """Return a command-line argument with the names of today.

    Args:
        argument: a flag with or without its value, or a value.
    """
    flag, equals, value = argument.partition("=")
    if not flag.startswith("--"):
        return current_class(argument)
    return f"--{current_key(flag[2:])}{equals}{current_class(value)}"


def rename(node: Node, key: str = "") -> bool:
    """Replace the names of older versions in a parsed YAML file.

    Args:
        node: the file or a part of it; changed in place.
        key: where the part is, with dots.

    Returns:
        Whether anything was replaced.
    """
    if isinstance(node, ScalarNode):
        before, node.value = node.value, current_class(node.value)
        return bool(before != node.value)
    if isinstance(node, SequenceNode):
        return any([rename(part, key) for part in node.value])
    return isinstance(node, MappingNode) and any([_rename_pair(name, part, key) for name, part in node.value])


def _rename_pair(name: Node, value: Node, key: str) -> bool:
    """Replace the name of one setting, and the names in its value."""
    if not isinstance(name, ScalarNode):
        return rename(value, key)
    old = f"{key}.{name.value}" if key else name.value
    new = current_key(old)
    name.value = new[len(key) + 1 :] if key else new
    return any([new != old, rename(value, new)])
