"""Typed results: everything that a test or an audit measured, and its file results.json.

The tree is ``Results`` → ``AttributeResult`` (one classifier, one attribute) → ``ModelBias`` (one model). A figure that
is not known or not finite is None here and null in the file. ``docs/results.md`` describes every key.
"""

import json
import math
import platform
import types
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fairness_dft import __version__
from fairness_dft.attributes import TIMES
from fairness_dft.files import replacing

VERSION = 4
NOTE = "Attributes are perceived, as classifiers read images; no figure describes a person."
PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft")
Shares = Mapping[str, Mapping[str, float]]  # the share of each class, by attribute
Measure = Literal["bias", "distance"]


@dataclass(frozen=True)
class Distance:
    """Distance of a model's class frequencies from the target distribution.

    Attributes:
        total_variation: Total variation of all images together from the target, in [0, 1].
        kullback_leibler: KL(frequencies ‖ target) of all images together, in nats.
        total_variation_by_prompt: Mean over prompts of each prompt's total variation from its target, in [0, 1].
        total_variation_by_prompt_low: Lower end of its 95 % bootstrap interval.
        total_variation_by_prompt_high: Upper end of that interval.
        total_variation_by_prompt_floor: Its expectation for a model that meets the target exactly.
        per_prompt: Total variation of each prompt from its target.
    """

    total_variation: float | None
    kullback_leibler: float | None
    total_variation_by_prompt: float | None
    total_variation_by_prompt_low: float | None
    total_variation_by_prompt_high: float | None
    total_variation_by_prompt_floor: float | None
    per_prompt: tuple[float | None, ...]


@dataclass(frozen=True)
class ModelBias:
    """Figures of one model, for one classifier and attribute.

    Means are over the prompts that do not name the attribute; ``counts``, ``no_face`` and ``per_prompt`` have an entry
    for every prompt.

    Attributes:
        frequencies: Frequency of each class among all images with a face, in [0, 1].
        bias: Mean over prompts of the bias, in [0, 2 / K].
        spread: Standard deviation of the bias over prompts.
        floor: Mean over prompts of the bias that a perfectly fair model scores with as many images.
        above_floor: Bias minus floor.
        low: Lower end of the 95 % bootstrap interval of the bias.
        high: Upper end of that interval.
        unbiased_rms_gap: Root mean square difference between the probabilities of two classes, in [0, 1].
        unbiased_rms_gap_low: Lower end of its 95 % interval; None with fewer than ten prompts.
        unbiased_rms_gap_high: Upper end of that interval.
        unbiased_rms_gap_by_chance: What a fair model stays below in 95 of 100 audits of this size.
        images: Number of images.
        no_face_images: How many of them show no face.
        prompts: Number of prompts with at least one face.
        prompts_no_face: Number of prompts none of whose images shows a face.
        prompts_naming: Number of prompts that name the attribute, and count in no mean.
        per_prompt: Bias of each prompt; None where it names the attribute or shows no face.
        counts: Number of images of each prompt and class, with shape (P, K).
        no_face: Number of images of each prompt that show no face.
        distance: Distance from the target; None if the attribute has none for these classes.
    """

    frequencies: tuple[float | None, ...]
    bias: float | None
    spread: float | None
    floor: float | None
    above_floor: float | None
    low: float | None
    high: float | None
    unbiased_rms_gap: float | None
    unbiased_rms_gap_low: float | None
    unbiased_rms_gap_high: float | None
    unbiased_rms_gap_by_chance: float | None
    images: int
    no_face_images: int
    prompts: int
    prompts_no_face: int
    prompts_naming: int
    per_prompt: tuple[float | None, ...]
    counts: tuple[tuple[int, ...], ...]
    no_face: tuple[int, ...]
    distance: Distance | None = None

    @property
    def no_face_share(self) -> float | None:
        """Share of all images that show no face; None without images."""
        images = sum(map(sum, self.counts)) + sum(self.no_face)
        return sum(self.no_face) / images if images else None

    def figure(self, measure: Measure) -> float | None:
        """Return the bias, or the mean distance of a prompt from its target."""
        if measure == "bias":
            return self.bias
        return self.distance.total_variation_by_prompt if self.distance else None


@dataclass(frozen=True)
class AttributeResult:
    """What one classifier sees of one attribute.

    Attributes:
        classes: Names of the K classes.
        maximum: Largest possible bias, 2 / K.
        measure: What the target asks to compare: ``bias`` or, for unequal targets, ``distance``.
        original: The base model.
        ema: The finetuned model (EMA); None if one model was measured alone.
        drift: Total variation between the pooled class frequencies of the two models, in [0, 1].
        p_value: Two-sided p-value of the change in ``measure``.
        pairs: Number of image pairs from the same noise by the class of the base model's image (row) and of the
            finetuned model's (column), with shape (K + 1, K + 1), where the last class is no face; None if unpaired.
    """

    classes: tuple[str, ...]
    maximum: float
    measure: Measure
    original: ModelBias
    ema: ModelBias | None = None
    drift: float | None = None
    p_value: float | None = None
    pairs: tuple[tuple[int, ...], ...] | None = None

    @property
    def last(self) -> ModelBias:
        """The finetuned model if there is one, else the base model."""
        return self.ema or self.original

    @property
    def models(self) -> dict[str, ModelBias]:
        """The models that were measured, by name."""
        return {"original": self.original} | ({"ema": self.ema} if self.ema else {})

    @property
    def named_by_all(self) -> bool:
        """Whether every prompt names the attribute, so that there is no bias to measure."""
        return self.original.prompts_naming == len(self.original.counts)


@dataclass(frozen=True)
class NamedShare:
    """Share of the images with a face that show the class that their prompt names.

    Attributes:
        share: The share, in [0, 1].
        low: Lower end of its 95 % interval (Wilson's) over images.
        high: Upper end of that interval.
        images: Number of images with a face.
    """

    share: float | None
    low: float | None
    high: float | None
    images: int


@dataclass(frozen=True)
class Adherence(NamedShare):
    """Prompt adherence of one model, for one classifier and attribute.

    Attributes:
        share: As in ``NamedShare``; this and the next three are over all named classes.
        low: Lower end of the interval.
        high: Upper end of the interval.
        images: Number of images with a face.
        classes: The same for each named class.
    """

    classes: dict[str, NamedShare]


@dataclass(frozen=True)
class RunFacts:
    """How the figures were obtained.

    Attributes:
        date: Day of the measurement, UTC, as YYYY-MM-DD.
        model: Folder or hub id of the base model; None where images of others were measured.
        adapter: The adapter that an audit compares with the base model.
        images: Folder of the images of others that an audit measures.
        split: Which prompts were measured: ``test``, ``validation`` or ``train``.
        images_per_prompt: Number of images of each prompt; of folders the smallest.
        test_prompts: The measured prompts, in the order of every per-prompt list.
        paired: Whether the images of both models come from the same noise and were compared in pairs.
        seconds: Duration of the measurement.
        steps: Number of training steps.
        training_seconds: Duration of the training.
        training_images_per_prompt: Number of images of one training step.
        test_prompts_trained_on: Those test prompts that are also training prompts.
        truncated_text: By prompt, its end that the text encoder does not read.
        machine: Platform.
        versions: Version of each package that figures depend on.
    """

    date: str = ""
    model: str | None = None
    adapter: str | None = None
    images: str | None = None
    split: str | None = "test"
    images_per_prompt: int | None = None
    test_prompts: tuple[str, ...] = ()
    paired: bool = False
    seconds: float | None = None
    steps: int | None = None
    training_seconds: float | None = None
    training_images_per_prompt: int | None = None
    test_prompts_trained_on: tuple[str, ...] = ()
    truncated_text: dict[str, str] = field(default_factory=dict)
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def here(cls, **facts: Any) -> "RunFacts":
        """Return facts together with today's date, this machine and the versions of packages."""
        versions = {"fairness_dft": __version__} | {name: version(name) for name in PACKAGES}
        today = datetime.now(timezone.utc).date().isoformat()
        return cls(date=today, machine=platform.platform(), versions=versions, **facts)


@dataclass(frozen=True)
class Results:
    """Everything that a test or an audit measured.

    Attributes:
        attributes: The aligned attributes.
        target: Target share of each class, by aligned attribute and for their product.
        own_targets: The same by prompt, for prompts with another target.
        bias: Figures by classifier and attribute; the training classifier comes first.
        concepts: The same for the prompts of each concept; empty if there is only one.
        agreement: By classifier, other classifier, attribute and model: share of images that both read alike.
        prompt_adherence: By classifier, attribute and model.
        classifier_overfit: By classifier and attribute: share of the improvement that only the training classifier
            sees.
        kept: By measure and model: what finetuning keeps of image and prompt.
        run: How the figures were obtained.
    """

    attributes: tuple[str, ...]
    target: dict[str, dict[str, float]]
    own_targets: dict[str, dict[str, dict[str, float]]]
    bias: dict[str, dict[str, AttributeResult]]
    concepts: dict[str, dict[str, dict[str, AttributeResult]]]
    agreement: dict[str, dict[str, dict[str, dict[str, float | None]]]]
    prompt_adherence: dict[str, dict[str, dict[str, Adherence]]]
    classifier_overfit: dict[str, dict[str, float | None]]
    kept: dict[str, dict[str, float | None]]
    run: RunFacts

    @property
    def label(self) -> str:
        """The aligned attribute, or the product of several."""
        return TIMES.join(self.attributes)

    @property
    def aligned(self) -> tuple[str, ...]:
        """The product of the aligned attributes, and each of them."""
        return tuple(dict.fromkeys((self.label, *self.attributes)))

    @property
    def compared(self) -> bool:
        """Whether two models were measured."""
        return any(result.ema is not None for seen in self.bias.values() for result in seen.values())

    def rows(self) -> Iterator[tuple[str, str, AttributeResult]]:
        """Yield classifier, attribute and figures, without attributes that every prompt names."""
        for classifier, seen in self.bias.items():
            for name, result in seen.items():
                if not result.named_by_all:
                    yield classifier, name, result

    def target_of(self, prompt: str) -> dict[str, dict[str, float]]:
        """Return the target of one prompt, for each aligned attribute and their product."""
        return self.own_targets.get(prompt, self.target)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of results.json: lists for tuples, None for what is not finite."""
        content: dict[str, Any] = _plain({"version": VERSION, "note": NOTE, **asdict(self)})
        return content

    def write(self, file: Path) -> None:
        """Write results.json in one piece."""
        text = json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        with replacing(file) as draft:
            draft.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> "Results":
        """Read results.json.

        Raises:
            ValueError: If the file is not a results.json of this version.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                raise ValueError(f"is of version {content['version']}, but must be of version {VERSION}")
            results: Results = _parsed(cls, {key: content[key] for key in content if key not in ("version", "note")})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = str(error) if str(error).startswith("is ") else "is not a results file of this program"
            raise ValueError(
                f"{str(file)!r} {reason}: measure the model again with evaluate, or remove the file to go on without "
                "its figures"
            ) from error
        return results


def known(value: float) -> float | None:
    """Return a figure, or None if it is not finite."""
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return known(value) if isinstance(value, float) else value


def _parsed(kind: Any, value: Any) -> Any:
    """Build a value of an annotated type from what JSON knows."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if set(value) != {entry.name for entry in fields(kind)}:
            raise ValueError(f"keys of {kind}: {sorted(value)}")
        return kind(**{name: _parsed(hints[name], value[name]) for name in value})  # type: ignore[operator]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _parsed(arguments[0], value)
    if origin is tuple:
        return tuple(_parsed(arguments[0], item) for item in value)
    if origin is dict:
        return {key: _parsed(arguments[1], item) for key, item in value.items()}
    return value
