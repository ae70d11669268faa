"""Target distributions in the classifier's order, and what is refused."""

import pytest
import torch

from fairness_dft.attributes import Attribute

SKINS = ("light", "tan", "brown", "dark")


@pytest.mark.parametrize("classes", [("only",), ("man", "woman"), SKINS, tuple("abcdefg")])
def test_uniform_is_the_default_for_any_number_of_classes(classes: tuple[str, ...]) -> None:
    target = Attribute().distribution(classes)
    assert target.dtype == torch.float64
    torch.testing.assert_close(target, torch.tensor([1 / len(classes)] * len(classes), dtype=torch.float64))


def test_numbers_are_taken_in_the_classifiers_order() -> None:
    target = Attribute("race", [0.1, 0.2, 0.3, 0.4]).distribution(SKINS)
    torch.testing.assert_close(target, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))


def test_names_are_put_in_the_classifiers_order_and_those_left_out_get_nothing() -> None:
    target = Attribute("race", {"dark": 0.75, "light": 0.25}).distribution(SKINS)
    torch.testing.assert_close(target, torch.tensor([0.25, 0.0, 0.0, 0.75], dtype=torch.float64))


def test_thirds_sum_to_one_within_rounding() -> None:
    torch.testing.assert_close(
        Attribute("style", [1 / 3] * 3).distribution(("a", "b", "c")),
        torch.full((3,), 1 / 3, dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("unifrom", "attribute.target of 'race' must be 'uniform', numbers or class names .* got 'unifrom'"),
        ({"light": 0.5, "pale": 0.5}, "names pale, but the classifier has light, tan, brown, dark"),
        ([0.5, 0.5], "has 2 numbers, but the classifier has light, tan, brown, dark"),
        ([], "has 0 numbers, but the classifier has"),
        ([0.5, 0.75, -0.25, 0.0], r"must be non-negative and sum to one, but got \[0.5, 0.75, -0.25, 0.0\]"),
        ([0.25, 0.25, 0.25, 0.2], "must be non-negative and sum to one"),
        ({"light": 0.9}, "must be non-negative and sum to one"),
        ({}, "must be non-negative and sum to one"),
        ([float("nan"), 0.5, 0.25, 0.25], "must be non-negative and sum to one"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(target: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attribute("race", target).distribution(SKINS)


@pytest.mark.parametrize("field", ["confidence", "factor1", "factor2"])
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_a_number_out_of_its_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"attribute.{field} must be between 0 and 1, but got {value}"):
        Attribute(**{field: value})


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_of_the_range_are_allowed(value: float) -> None:
    attribute = Attribute(confidence=value, factor1=value, factor2=value)
    assert attribute.confidence == attribute.factor1 == attribute.factor2 == value
