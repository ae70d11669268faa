"""What fairness is measured on: attributes, their classes and the distribution that is wanted of them.

An attribute is *perceived*: a classifier's reading of a picture (gender presentation, skin tone or perceived
race, apparent age), never a fact about a person. Its classes are the classifier's own; D, the target
distribution over them, is the user's.

Several attributes are aligned jointly, over the product of their classes: D has one share for "woman, dark,
old". Such a product is named like a product, "gender×race×age", wherever one attribute could be.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TIMES = "×"
Shares = str | list[float] | dict[str, float]
Target = Shares | dict[str, Shares]


@dataclass(frozen=True)
class Attribute:
    """What to align, one attribute or several jointly, with the settings that the losses take from it.

    A number may be given for each attribute by name, such as `semantics_factor: {gender: 0.2, race: 0.6}`.

    Args:
        name: head of the classifier that reads it, such as gender, race or age; several for their product.
        target: D, as "uniform", as one number a class in the classifier's order, or by class name. Of several
            attributes: each one's own by its name, where those left out are uniform and all are independent, or
            the whole table, such as {"woman, old": 0.1, "woman, young": 0.4, "man, young": 0.5}.
        targets: other targets than that, by prompt, subject or concept, the most particular first; attributes that one
            leaves out keep their shares of `target`. A training prompt that names a class of these attributes is
            trained towards that, given the target of its subject or concept; a target of the very prompt stands.
        confidence: C, the confidence that a dynamic target must reach to be used, in [0, 1]; a draw between
            classes is never used.
        semantics_factor: weight of the image-semantics loss where the target differs from the original image's class
            or there is no target, in [0, 1] (paper: gender 0.2, race 0.6, age 0.6; of several, the smallest).
        face_gradient_factor: scale of that loss's gradient inside the face region in the same cases, in [0, 1]
            (paper: gender 0.2, race 0.3, age 0.3; of several, the smallest).
        rescale_cost: whether the transport sees each probability relative to its target share, so that an
            unequal target does not dominate the joint cost; see `fairness_dft.alignment.transport.relative_to_target`.

    Raises:
        ValueError: if a number is out of its range, or a name is missing or unknown.
    """

    name: str | list[str] = "gender"
    target: Target = "uniform"
    targets: dict[str, Target] = field(default_factory=dict)
    confidence: float | dict[str, float] = 0.8
    semantics_factor: float | dict[str, float] = 0.2
    face_gradient_factor: float | dict[str, float] = 0.2
    rescale_cost: bool = False

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"attribute.name must be one attribute or several different ones, but got {self.name}")
        for setting in ("confidence", "semantics_factor", "face_gradient_factor"):
            value = getattr(self, setting)
            numbers = value if isinstance(value, Mapping) else dict.fromkeys(self.names, value)
            if set(numbers) != set(self.names):
                wanted = f"must be one number, or one for each of {', '.join(self.names)}"
                raise ValueError(f"attribute.{setting} {wanted}, but got {value}")
            if not all(0 <= number <= 1 for number in numbers.values()):
                raise ValueError(f"attribute.{setting} must be between 0 and 1, but got {value}")

    @property
    def names(self) -> tuple[str, ...]:
        """The attributes that are aligned jointly."""
        listed = [self.name] if isinstance(self.name, str) else self.name
        return tuple(name for label in listed for name in attributes_of(label))

    @property
    def label(self) -> str:
        """Their product's name."""
        return TIMES.join(self.names)

    def setting(self, setting: str, name: str) -> float:
        """One attribute's `confidence`, `semantics_factor` or `face_gradient_factor`."""
        value = getattr(self, setting)
        number: float = value[name] if isinstance(value, Mapping) else value
        return number

    def distributions(self, classes: Mapping[str, Sequence[str]]) -> dict[str | None, "TargetDistribution"]:
        """Return the target distributions D over the classifier's classes, in its order.

        Args:
            classes: The class names of each attribute.

        Returns:
            `target` by None and each of `targets` by its key.

        Raises:
            ValueError: If a target does not fit the classes, is negative or does not sum to one.
        """
        axes = {name: tuple(classes[name]) for name in self.names}
        general = self._distribution(None, self.target, axes, dict.fromkeys(axes, "uniform"))
        rest: dict[str, Shares] = {name: general.marginal(name).tolist() for name in axes}
        return {
            None: general,
            **{key: self._distribution(key, target, axes, rest) for key, target in self.targets.items()},
        }

    def _distribution(
        self, key: str | None, target: Target, classes: Mapping[str, tuple[str, ...]], rest: Mapping[str, Shares]
    ) -> "TargetDistribution":
        """Return one target; an attribute that it leaves out has its shares from `rest`."""
        where = f"attribute.target of {self.label!r}" if key is None else f"attribute.targets of {key!r}"
        if isinstance(target, Mapping) and target and set(target) <= set(classes):
            parts = [(f"{where}, {name}", target.get(name, rest[name]), classes[name]) for name in classes]
        elif target == "uniform":
            parts = [(where, "uniform", names) for names in classes.values()]
        else:
            table = [", ".join(names) for names in product(*classes.values())]
            joint = shares(where, cast(Shares, target), table)
            return TargetDistribution(joint.reshape([len(names) for names in classes.values()]), classes)
        joint = torch.ones((), dtype=torch.float64)
        for place, shares_given, names in parts:
            joint = joint[..., None] * shares(place, cast(Shares, shares_given), names)
        return TargetDistribution(joint, classes)


@dataclass(frozen=True, eq=False)
class TargetDistribution:
    """A target distribution D over the product of the classes of several attributes, with named axes.

    Args:
        joint: The share of each combination of classes, float64 with shape (K_1, ..., K_A), summing to one.
        classes: The class names of each attribute, in the order of the axes.

    Raises:
        ValueError: If the shape of `joint` is not that of the classes.

    Example:
        >>> axes = {"gender": ("man", "woman"), "age": ("young", "old")}
        >>> target = TargetDistribution(torch.tensor([[0.4, 0.1], [0.3, 0.2]], dtype=torch.float64), axes)
        >>> target.marginal("age").tolist()
        [0.7, 0.30000000000000004]
        >>> target.given({"gender": "woman"}).joint.tolist()
        [[0.0, 0.0], [0.6, 0.4]]
    """

    joint: Tensor
    classes: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        expected = tuple(len(names) for names in self.classes.values())
        if tuple(self.joint.shape) != expected:
            raise ValueError(
                f"`joint` must have the shape of the classes, {expected}, but got {tuple(self.joint.shape)}"
            )

    @property
    def label(self) -> str:
        """The name of the product of its attributes."""
        return TIMES.join(self.classes)

    def marginal(self, name: str) -> Tensor:
        """Return the distribution of one attribute alone, float64 with shape (K,)."""
        return marginal(self.joint, list(self.classes).index(name))

    def shares(self) -> dict[str, dict[str, float]]:
        """Return the share of each class by its name: of the product first, then of each attribute."""
        combinations = [", ".join(names) for names in product(*self.classes.values())]
        tables = {self.label: dict(zip(combinations, self.joint.flatten().tolist(), strict=True))}
        for name, names in self.classes.items():
            tables[name] = dict(zip(names, self.marginal(name).tolist(), strict=True))
        return tables

    def given(self, named: Mapping[str, str]) -> "TargetDistribution":
        """Return the distribution where the classes of some attributes are named, D(· | named).

        Where D excludes what is named, the other attributes keep the shares that they have over all of D.

        Args:
            named: The class of each named attribute.

        Returns:
            The distribution, with the axes of D: zero wherever a class differs from the named one.
        """
        index = {axis: self.classes[name].index(named[name]) for axis, name in enumerate(self.classes) if name in named}
        place = tuple(
            slice(index[axis], index[axis] + 1) if axis in index else slice(None) for axis in range(self.joint.ndim)
        )
        part = self.joint[place]
        if named and not part.any():
            part = self.joint.sum(list(index), keepdim=True)
        conditional = torch.zeros_like(self.joint)
        conditional[place] = part / part.sum()
        return TargetDistribution(conditional, self.classes)


Array = TypeVar("Array", Tensor, NDArray[np.float64])


def marginal(joint: Array, *kept: int) -> Array:
    """Sum an array over all axes but the kept ones.

    Args:
        joint: Any array or tensor.
        kept: The axes that stay, in their order.

    Example:
        >>> marginal(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1).tolist()
        [4.0, 6.0]
    """
    others = tuple(axis for axis in range(joint.ndim) if axis not in kept)
    return joint.sum(others) if others else joint


def shares(where: str, target: Shares, classes: Sequence[str]) -> Tensor:
    """One distribution over named classes, float64 with shape (K,).

    Args:
        where: which setting it is, for messages.
        target: "uniform", numbers in the order of the classes, or numbers by class name.
        classes: the names of the K classes.

    Raises:
        ValueError: if the target does not fit the classes, is negative or does not sum to one.
    """
    if target == "uniform":
        return torch.full((len(classes),), 1 / len(classes), dtype=torch.float64)
    if isinstance(target, str):
        raise ValueError(f"{where} must be 'uniform', numbers or class names with numbers, but got {target!r}")
    if isinstance(target, Mapping):
        unknown = sorted(map(str, set(target) - set(classes)))
        if unknown:
            quote = (
                ""
                if all(isinstance(name, str) for name in target)
                else " (quote names that YAML reads as others: 'yes')"
            )
            raise ValueError(f"{where} names {', '.join(unknown)}, but the classifier has {'; '.join(classes)}{quote}")
        target = [target.get(name, 0.0) for name in classes]
    if len(target) != len(classes) or not all(isinstance(share, int | float) for share in target):
        raise ValueError(f"{where} must be {len(classes)} numbers, for {'; '.join(classes)}, but got {target}")
    if not min(target) >= 0 or not math.isclose(sum(target), 1, abs_tol=1e-6):
        raise ValueError(f"{where} must be non-negative and sum to one, but got {target}")
    return torch.tensor(target, dtype=torch.float64)


def attributes_of(label: str) -> tuple[str, ...]:
    """Return the attributes of a product: gender and race of "gender×race", gender alone of "gender"."""
    return tuple(label.split(TIMES))
