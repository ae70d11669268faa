"""The target distribution D of each prompt: the general one, one of its own, and what it names.

D has one dimension an attribute, in the order of the classifier's classes. A prompt that names a class of an aligned
attribute ("an old woman, a chef") asks for it, and the model should go on showing it: such a prompt is trained towards
D(· | what it names).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fairness_dft.attributes import Attribute
from fairness_dft.classifiers.judge import Judge
from fairness_dft.prompts.files import Prompt


class PromptTargets:
    """The target distributions of prompts, and their shares by class name.

    Args:
        attribute: what is aligned, to what.
        classes: the class names of an attribute, or of a product, as `Judge.classes` tells them.

    Raises:
        ValueError: if a target does not fit the classes.
    """

    def __init__(self, attribute: Attribute, classes: Callable[[str], Sequence[str]]) -> None:
        self.attribute, self.classes = attribute, classes
        self.distributions = attribute.distributions({name: classes(name) for name in attribute.names})

    @property
    def general(self) -> Tensor:
        """D where a prompt has no other, with shape (K_1, ..., K_A)."""
        return self.distributions[None]

    def of(self, prompt: Prompt) -> Tensor:
        """D of one prompt, with shape (K_1, ..., K_A)."""
        keys = (prompt.text, prompt.subject, prompt.concept, None)
        return next(self.distributions[key] for key in keys if key in self.distributions)

    def in_training(self, prompt: Prompt) -> Tensor:
        """D given what the prompt names of it; a target of this very prompt stands as it is."""
        if prompt.text in self.distributions:
            return self.of(prompt)
        kinds, names = named(self.attribute, prompt), self.attribute.names
        return given(self.of(prompt), {names.index(name): self.classes(name).index(kinds[name]) for name in kinds})

    def shares(self, prompt: Prompt | None = None) -> dict[str, dict[str, float]]:
        """D by class name, of each attribute and of their product; of a prompt, its own."""
        joint = self.general if prompt is None else self.of(prompt)
        tables = {self.attribute.label: joint.flatten()}
        for axis, name in enumerate(self.attribute.names):
            others = [other for other in range(joint.ndim) if other != axis]
            tables[name] = joint.sum(others) if others else joint
        return {name: dict(zip(self.classes(name), table.tolist(), strict=True)) for name, table in tables.items()}

    def own_shares(self, prompts: Iterable[Prompt]) -> dict[str, dict[str, dict[str, float]]]:
        """The `shares` of those prompts that have another target than the general one, by their texts."""
        return {prompt.text: self.shares(prompt) for prompt in prompts if self.of(prompt) is not self.general}


def named(attribute: Attribute, prompt: Prompt) -> dict[str, str | None]:
    """What a prompt names of that which is aligned: the class of each attribute, None for one in other words."""
    return {name: kind for name, kind in prompt.names if name in attribute.names}


def given(distribution: Tensor, named: Mapping[int, int]) -> Tensor:
    """A joint distribution where the classes of some attributes are named, D(· | named).

    Where D has nothing of what is named, the other attributes keep the shares that they have over all of D.

    Args:
        distribution: D, with one dimension an attribute.
        named: the class of each named attribute, by its dimension.

    Returns:
        The distribution, with the shape of D: zero where a class is another than the named one.
    """
    place = tuple(
        slice(named[axis], named[axis] + 1) if axis in named else slice(None) for axis in range(distribution.ndim)
    )
    part = distribution[place]
    if named and not part.any():
        part = distribution.sum(list(named), keepdim=True)
    found = torch.zeros_like(distribution)
    found[place] = part / part.sum()
    return found


def check_names(attribute: Attribute, judge: Judge, prompts: Iterable[Prompt]) -> None:
    """Refuse training prompts that name what is aligned by what is no class of it, before a large network loads.

    Raises:
        ValueError: if there is one.
    """
    for prompt in prompts:
        for name, kind in named(attribute, prompt).items():
            if kind not in judge.classes(name) and prompt.text not in attribute.targets:
                raise ValueError(
                    f"the training prompt {prompt.text!r} names {name} {kind!r}, which is none of the classifier's "
                    f"{', '.join(judge.classes(name))}; correct its file, or give it one of --model.attribute.targets"
                )
