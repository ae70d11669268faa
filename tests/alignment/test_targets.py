"""The target of each prompt: its own, the general one, and what it names."""

import pytest
import torch

from fairness_dft.alignment.targets import PromptTargets, check_names
from fairness_dft.attributes import Attribute, TargetDistribution
from fairness_dft.prompts.files import Prompt

CLASSES = {"gender": ("man", "woman"), "race": ("light", "tan", "brown", "dark"), "age": ("young", "old")}


def joint(*names: str, **settings: object) -> TargetDistribution:
    """Return the target of several attributes of CLASSES."""
    return Attribute(list(names), **settings).distributions(CLASSES)[None]


def prompt(text: str, **names: str | None) -> Prompt:
    return Prompt(text, "chef", "occupation", tuple(names.items()))


def test_the_most_particular_target_is_taken() -> None:
    wanted = {"occupation": [0.1, 0.9], "chef": [0.2, 0.8], "a chef": [0.3, 0.7]}
    for keys, share in (
        ((), 0.5),
        (("occupation",), 0.1),
        (("chef", "occupation"), 0.2),
        (("a chef", "occupation", "chef"), 0.3),
    ):
        targets = PromptTargets(Attribute("gender", targets={key: wanted[key] for key in keys}), CLASSES.get)
        assert targets.of(prompt("a chef")).joint.tolist() == pytest.approx([share, 1 - share])


def test_a_prompt_is_trained_towards_what_it_names() -> None:
    own = {"mine": {"gender": [0.2, 0.8]}, "sport": {"race": [1.0, 0.0, 0.0, 0.0]}}
    targets = PromptTargets(Attribute(["gender", "race"], targets=own), CLASSES.get)
    woman, dark = 1, 3

    def target(text: str, **names: str | None) -> torch.Tensor:
        return targets.in_training(prompt(text, **names)).joint

    assert target("a chef").eq(1 / 8).all()
    assert target("an old chef", age="old").eq(1 / 8).all()  # age is not aligned
    of_women = target("a woman, a chef", gender="woman", age="old")
    assert of_women[woman].tolist() == [0.25] * 4 and of_women.sum() == 1
    assert target("a woman with dark skin", gender="woman", race="dark")[woman, dark] == 1
    assert target("mine", gender="woman").equal(targets.distributions["mine"].joint)  # said of this very prompt
    runner = targets.in_training(Prompt("a woman running", "running", "sport", (("gender", "woman"),))).joint
    assert runner[woman].tolist() == [1.0, 0.0, 0.0, 0.0] and runner.sum() == 1  # of its concept, given what it names
    assert targets.of(prompt("a woman", gender="woman")).joint.eq(1 / 8).all()  # figures keep D


@pytest.mark.parametrize("named", [{}, {0: 1}, {2: 0}, {0: 1, 2: 0}, {0: 0, 1: 3, 2: 1}])
def test_given_is_the_conditional_distribution(named: dict[int, int]) -> None:
    target = torch.rand(2, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target /= target.sum()
    expected = torch.zeros_like(target)
    for place in torch.cartesian_prod(*map(torch.arange, target.shape)).tolist():
        if all(place[axis] == of for axis, of in named.items()):
            expected[tuple(place)] = target[tuple(place)]
    names = {name: CLASSES[name][named[axis]] for axis, name in enumerate(CLASSES) if axis in named}
    torch.testing.assert_close(TargetDistribution(target, CLASSES).given(names).joint, expected / expected.sum())


def test_what_the_target_excludes_may_be_named() -> None:
    table = joint("gender", "age", target={"woman, old": 0.1, "woman, young": 0.4, "man, young": 0.5})
    men = table.given({"gender": "man"}).joint
    torch.testing.assert_close(
        men, torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    )  # no old men, as wanted
    only_women = joint("gender", "age", target={"woman, old": 0.25, "woman, young": 0.75})
    expected = torch.tensor([[0.75, 0.25], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(only_women.given({"gender": "man"}).joint, expected)  # men, of the ages that are wanted


def test_marginals_and_shares_are_sums_over_the_other_axes() -> None:
    values = torch.rand(2, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values /= values.sum()
    target = TargetDistribution(values, CLASSES)
    shares = target.shares()
    assert list(shares) == ["gender×race×age", "gender", "race", "age"]
    for axis, (name, classes) in enumerate(CLASSES.items()):
        for index, chosen in enumerate(classes):
            places = torch.cartesian_prod(*map(torch.arange, values.shape)).tolist()
            expected = sum(values[tuple(place)].item() for place in places if place[axis] == index)
            assert shares[name][chosen] == pytest.approx(expected)
            assert target.marginal(name)[index].item() == pytest.approx(expected)
    assert shares[target.label]["woman, tan, old"] == values[1, 1, 1].item()


def test_a_distribution_of_another_shape_than_its_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have the shape of the classes, \(2, 4, 2\), but got \(2, 2\)"):
        TargetDistribution(torch.ones(2, 2, dtype=torch.float64) / 4, CLASSES)


def test_a_name_that_is_no_class_needs_a_target_of_its_own() -> None:
    attribute = Attribute("gender", targets={"a queen": [0.0, 1.0], "chef": [0.5, 0.5]})
    known = [prompt("a chef"), prompt("a woman", gender="woman"), prompt("an ancient chef", age="ancient")]
    check_names(attribute, CLASSES.get, [*known, prompt("a queen", gender="queen")])
    for chosen in ("queen", None):
        with pytest.raises(ValueError, match=f"'a lady' names gender {chosen!r}, but .* man, woman; corr"):
            check_names(attribute, CLASSES.get, [*known, prompt("a lady", gender=chosen)])
