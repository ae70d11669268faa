"""The target distribution D of each prompt: the general one, one of its own, and what it names.

A prompt that names a class of an aligned attribute ("an old woman, a chef") asks for it, and the model should keep
showing it: such a prompt is trained towards D(· | what it names).
"""

from collections.abc import Callable, Iterable, Sequence

from fairness_dft.attributes import Attribute, TargetDistribution
from fairness_dft.prompts.files import Prompt


class PromptTargets:
    """The target distributions of prompts.

    Args:
        attribute: What is aligned, and to what.
        classes: Returns the class names of an attribute, as `Judge.classes` does.

    Raises:
        ValueError: If a target does not fit the classes.

    Example:
        >>> attribute = Attribute("gender", targets={"senator": {"woman": 0.4, "man": 0.6}})
        >>> targets = PromptTargets(attribute, lambda name: ("man", "woman"))
        >>> targets.of(Prompt("a senator", "senator", "occupation")).joint.tolist()
        [0.6, 0.4]
    """

    def __init__(self, attribute: Attribute, classes: Callable[[str], Sequence[str]]) -> None:
        self.attribute = attribute
        self.distributions = attribute.distributions({name: classes(name) for name in attribute.names})

    @property
    def general(self) -> TargetDistribution:
        """D where a prompt has no other."""
        return self.distributions[None]

    def of(self, prompt: Prompt) -> TargetDistribution:
        """Return D of one prompt."""
        keys = (prompt.text, prompt.subject, prompt.concept, None)
        return next(self.distributions[key] for key in keys if key in self.distributions)

    def in_training(self, prompt: Prompt) -> TargetDistribution:
        """Return D given what the prompt names; a target of this very prompt stays as it is."""
        if prompt.text in self.distributions:
            return self.of(prompt)
        return self.of(prompt).given(
            {name: chosen for name, chosen in named(self.attribute, prompt).items() if chosen is not None}
        )

    def shares(self, prompt: Prompt | None = None) -> dict[str, dict[str, float]]:
        """Return D by class name, of each attribute and of their product; of a prompt, its own."""
        return (self.general if prompt is None else self.of(prompt)).shares()

    def own_shares(self, prompts: Iterable[Prompt]) -> dict[str, dict[str, dict[str, float]]]:
        """Return the `shares` of those prompts that have another target than the general one, by their texts."""
        return {prompt.text: self.shares(prompt) for prompt in prompts if self.of(prompt) is not self.general}


def named(attribute: Attribute, prompt: Prompt) -> dict[str, str | None]:
    """Return the class of each aligned attribute that a prompt names; None for a class in other words."""
    return {name: chosen for name, chosen in prompt.names if name in attribute.names}


def check_names(attribute: Attribute, classes: Callable[[str], Sequence[str]], prompts: Iterable[Prompt]) -> None:
    """Refuse training prompts that name an aligned attribute by something that is not one of its classes.

    Args:
        attribute: What is aligned.
        classes: Returns the class names of an attribute, as `Judge.classes` does.
        prompts: The training prompts.

    Raises:
        ValueError: If there is one.
    """
    for prompt in prompts:
        for name, chosen in named(attribute, prompt).items():
            if chosen not in classes(name) and prompt.text not in attribute.targets:
                raise ValueError(
                    f"the training prompt {prompt.text!r} names {name} {chosen!r}, but the classifier's classes are "
                    f"{', '.join(classes(name))}; correct its file, or give it one of --model.attribute.targets"
                )
