"""What fairness is measured on: an attribute, its classes and the distribution that is wanted of it.

An attribute is *perceived*: a classifier's reading of a picture (gender presentation, skin tone or perceived
race, apparent age), never a fact about a person. Its classes are the classifier's own; D, the target
distribution over them, is the user's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Target = str | dict[str, float] | list[float]


@dataclass(frozen=True)
class Attribute:
    """An attribute to align, with the settings that the losses take from it.

    Args:
        name: head of the classifier that reads it, such as gender, race or age.
        target: D, as "uniform", as one number a class in the classifier's order, or by class name.
        confidence: C, the confidence that a dynamic target must reach to be used, in [0, 1]; a draw between
            classes is never used.
        factor1: weight of the image-semantics loss where the target differs from the original image's class
            or there is no target, in [0, 1] (paper: gender 0.2, race 0.6, age 0.6).
        factor2: scale of that loss's gradient inside the face region in the same cases, in [0, 1]
            (paper: gender 0.2, race 0.3, age 0.3).

    Raises:
        ValueError: if a number is out of its range.
    """

    name: str = "gender"
    target: Target = "uniform"
    confidence: float = 0.8
    factor1: float = 0.2
    factor2: float = 0.2

    def __post_init__(self) -> None:
        for field in ("confidence", "factor1", "factor2"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"attribute.{field} must be between 0 and 1, but got {getattr(self, field)}")

    def distribution(self, classes: Sequence[str]) -> Tensor:
        """The target distribution D in the order of the classifier's classes, float64 with shape (K,).

        Raises:
            ValueError: if the target does not fit the classes, is negative or does not sum to one.
        """
        where = f"attribute.target of {self.name!r}"
        if self.target == "uniform":
            return torch.full((len(classes),), 1 / len(classes), dtype=torch.float64)
        if isinstance(self.target, str):
            raise ValueError(f"{where} must be 'uniform', numbers or class names with numbers, but got {self.target!r}")
        if isinstance(self.target, Mapping):
            unknown = sorted(set(self.target) - set(classes))
            if unknown:
                raise ValueError(f"{where} names {', '.join(unknown)}, but the classifier has {', '.join(classes)}")
            shares = [float(self.target.get(name, 0.0)) for name in classes]
        else:
            shares = [float(share) for share in self.target]
        if len(shares) != len(classes):
            raise ValueError(f"{where} has {len(shares)} numbers, but the classifier has {', '.join(classes)}")
        if min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise ValueError(f"{where} must be non-negative and sum to one, but got {shares}")
        return torch.tensor(shares, dtype=torch.float64)
