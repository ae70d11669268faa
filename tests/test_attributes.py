"""Target distributions in the classifier's order, single and joint, and what is refused."""

from collections.abc import Sequence

import pytest
import torch

from fairness_dft.attributes import Attribute

SKINS = ("light", "tan", "brown", "dark")
CLASSES = {"gender": ("man", "woman"), "race": SKINS, "age": ("young", "old")}


def distribution(attribute: Attribute, classes: Sequence[str]) -> torch.Tensor:
    """The target of a single attribute."""
    return attribute.distributions({attribute.name: classes})[None].joint


def joint(*names: str, **settings: object) -> torch.Tensor:
    """The target of several attributes of CLASSES."""
    return Attribute(list(names), **settings).distributions(CLASSES)[None].joint


@pytest.mark.parametrize("classes", [("only",), ("man", "woman"), SKINS, tuple("abcdefg")])
def test_uniform_is_the_default_for_any_number_of_classes(classes: tuple[str, ...]) -> None:
    target = distribution(Attribute(), classes)
    assert target.dtype == torch.float64
    torch.testing.assert_close(target, torch.tensor([1 / len(classes)] * len(classes), dtype=torch.float64))


def test_numbers_are_taken_in_the_classifiers_order() -> None:
    target = distribution(Attribute("race", [0.1, 0.2, 0.3, 0.4]), SKINS)
    torch.testing.assert_close(target, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))


def test_names_are_put_in_the_classifiers_order_and_those_left_out_get_nothing() -> None:
    target = distribution(Attribute("race", {"dark": 0.75, "light": 0.25}), SKINS)
    torch.testing.assert_close(target, torch.tensor([0.25, 0.0, 0.0, 0.75], dtype=torch.float64))


def test_thirds_sum_to_one_within_rounding() -> None:
    torch.testing.assert_close(
        distribution(Attribute("style", [1 / 3] * 3), ("a", "b", "c")),
        torch.full((3,), 1 / 3, dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("unifrom", "attribute.target of 'race' must be 'uniform', numbers or class names .* got 'unifrom'"),
        ({"light": 0.5, "pale": 0.5}, "names pale, but the classifier has light; tan; brown; dark"),
        ([0.5, 0.5], r"must be 4 numbers, for light; tan; brown; dark, but got \[0.5, 0.5\]"),
        ([], r"must be 4 numbers, for light; tan; brown; dark, but got \[\]"),
        ({"light": "uniform"}, "must be 4 numbers, .* but got"),
        ([0.5, 0.75, -0.25, 0.0], r"must be non-negative and sum to one, but got \[0.5, 0.75, -0.25, 0.0\]"),
        ([0.25, 0.25, 0.25, 0.2], "must be non-negative and sum to one"),
        ({"light": 0.9}, "must be non-negative and sum to one"),
        ({}, "must be non-negative and sum to one"),
        ([float("nan"), 0.5, 0.25, 0.25], "must be non-negative and sum to one"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(target: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distribution(Attribute("race", target), SKINS)


@pytest.mark.parametrize("field", ["confidence", "semantics_factor", "face_gradient_factor"])
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_a_number_out_of_its_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"attribute.{field} must be between 0 and 1, but got {value}"):
        Attribute(**{field: value})


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_of_the_range_are_allowed(value: float) -> None:
    attribute = Attribute(confidence=value, semantics_factor=value, face_gradient_factor=value)
    assert attribute.confidence == attribute.semantics_factor == attribute.face_gradient_factor == value


def test_several_attributes_are_independent_and_uniform_by_default() -> None:
    target = joint("gender", "race", "age")
    assert target.shape == (2, 4, 2) and target.dtype == torch.float64
    torch.testing.assert_close(target, torch.full((2, 4, 2), 1 / 16, dtype=torch.float64))


def test_each_attribute_may_have_its_own_target() -> None:
    target = joint("gender", "age", target={"age": {"young": 0.75, "old": 0.25}})
    torch.testing.assert_close(target, torch.tensor([[0.375, 0.125], [0.375, 0.125]], dtype=torch.float64))
    target = joint("age", "gender", target={"gender": [0.2, 0.8], "age": [0.75, 0.25]})
    torch.testing.assert_close(target, torch.tensor([[0.15, 0.6], [0.05, 0.2]], dtype=torch.float64))


def test_a_table_gives_the_product_of_classes_its_shares() -> None:
    table = {"woman, old": 0.1, "woman, young": 0.4, "man, young": 0.5}
    expected = torch.tensor([[0.5, 0.0], [0.4, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(joint("gender", "age", target=table), expected)
    torch.testing.assert_close(joint("gender", "age", target=[0.5, 0.0, 0.4, 0.1]), expected)


def test_targets_of_prompts_stand_beside_the_default() -> None:
    attribute = Attribute(["gender", "age"], targets={"sport": "uniform", "ceo": {"gender": [0.3, 0.7]}})
    found = attribute.distributions(CLASSES)
    assert list(found) == [None, "sport", "ceo"]
    torch.testing.assert_close(found["sport"].joint, found[None].joint)
    torch.testing.assert_close(found["ceo"].marginal("gender"), torch.tensor([0.3, 0.7], dtype=torch.float64))


@pytest.mark.parametrize("name", ["gender×age", ["gender", "age"], ["gender×age"]])
def test_a_product_is_named_like_one(name: str | list[str]) -> None:
    attribute = Attribute(name, semantics_factor={"gender": 0.2, "age": 0.6}, confidence=0.7)
    assert attribute.names == ("gender", "age") and attribute.label == "gender×age"
    assert [attribute.setting("semantics_factor", name) for name in attribute.names] == [0.2, 0.6]
    assert [attribute.setting("confidence", name) for name in attribute.names] == [0.7, 0.7]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"woman, ancient": 1.0}, "names woman, ancient, but the classifier has man, young; man, old; woman, young"),
        ({"age": {"older": 1.0}}, "attribute.target of 'gender×age', age names older, but the classifier has young"),
        ({"age": [0.5, 0.6]}, "of 'gender×age', age must be non-negative and sum to one"),
        ({"age": "uniform", "race": "uniform"}, "names age, race, but the classifier has man, young; man, old"),
        ([0.5, 0.5], "must be 4 numbers, for man, young; man, old; woman, young; woman, old, but got"),
        ("fair", "must be 'uniform', numbers or class names with numbers, but got 'fair'"),
    ],
)
def test_a_joint_target_that_does_not_fit_is_refused(target: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        joint("gender", "age", target=target)
    with pytest.raises(
        ValueError, match=message.replace("of 'gender×age'", "of 'chef'").replace("target of", "targets of")
    ):
        joint("gender", "age", targets={"chef": target})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": []}, "attribute.name must be one attribute or several different ones, but got"),
        ({"name": ["age", "age"]}, "several different ones"),
        ({"name": ["gender×age", "age"]}, "several different ones"),
        (
            {"semantics_factor": {"race": 0.5}},
            "attribute.semantics_factor must be one number, or one for each of gender, but got",
        ),
        (
            {"name": ["gender", "age"], "face_gradient_factor": {"age": 0.5}},
            "one number, or one for each of gender, age",
        ),
        ({"confidence": {"gender": 2}}, "attribute.confidence must be between 0 and 1, but got {'gender': 2}"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attribute(**settings)


def test_attributes_that_a_target_of_some_prompts_leaves_out_keep_their_shares() -> None:
    classes = {"gender": ("man", "woman"), "age": ("young", "old")}
    own = {"senator": {"gender": {"woman": 0.4, "man": 0.6}}}
    general = {"age": {"young": 0.75, "old": 0.25}}
    table = {"man, young": 0.25, "woman, young": 0.5, "man, old": 0.25}  # a quarter old, too
    for target in (general, table):
        found = Attribute(["gender", "age"], target=target, targets=own).distributions(classes)["senator"].joint
        expected = torch.tensor([[0.6 * 0.75, 0.6 * 0.25], [0.4 * 0.75, 0.4 * 0.25]], dtype=torch.float64)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("target", [{True: 0.6, False: 0.4}, {0: 0.6, 1: 0.4}])
def test_names_that_yaml_reads_as_something_else_are_told(target: dict) -> None:
    with pytest.raises(ValueError, match=r"names (False, True|0, 1), but the classifier has yes; no \(quote names"):
        Attribute("hat", target=target).distributions({"hat": ("yes", "no")})
