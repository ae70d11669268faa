"""Every experiment resolves to the values that it had before it was written over a base recipe (version 0.1)."""

from pathlib import Path
from pydoc import locate
from typing import Any

import pytest
import yaml
from command_line import EXPERIMENTS
from lightning.pytorch.cli import LightningArgumentParser

from fairness_dft.cli.configuration import prepared, shipped_names
from fairness_dft.cli.lightning_cli import FairnessCLI, OneLineCLI
from fairness_dft.moved_names import rename
from fairness_dft.train_classifier import ClassifierCLI

FIXTURES = Path(__file__).parent / "resolved"
MORE = {  # arguments beside the files, of the same combination then
    "race.portraits.prompt_adherence": [
        "--data.init_args.files=[data/prompts/occupations.json, data/prompts/named_skin.json]",
        "--data.init_args.weights=[1, 1]",
    ]
}


def recorded(fixture: str) -> dict[str, dict[str, Any]]:
    """Every combination of files by its name, as flat settings."""
    combinations: dict[str, dict[str, Any]] = {}
    for name, settings in yaml.safe_load((FIXTURES / f"{fixture}.yaml").read_text(encoding="utf-8")).items():
        start = combinations.get(settings.pop("like", ""), {})
        without = settings.pop("without", [])
        combinations[name] = {key: value for key, value in start.items() if key not in without} | settings
    return combinations


def today(settings: dict[str, Any]) -> dict[str, Any]:
    """Nest flat settings, in the names of today."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = key.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = value
    node = yaml.compose(yaml.safe_dump(tree), Loader=yaml.SafeLoader)
    rename(node)
    return yaml.safe_load(yaml.serialize(node))


def differences(then: Any, now: Any, key: str = "") -> list[str]:
    """The settings that differ; those that are new since are not compared."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [line for name in then for line in differences(then[name], now.get(name, "absent"), f"{key}.{name}")]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return [line for n, pair in enumerate(zip(then, now, strict=True)) for line in differences(*pair, f"{key}.{n}")]
    if key.endswith(".class_path"):
        assert locate(then) is not None, then
        then, now = locate(then), locate(now)
    return [] if then == now and type(then) is type(now) else [f"{key}: was {then!r}, is {now!r}"]


def parser_of(command: type[OneLineCLI], *arguments: str) -> LightningArgumentParser:
    """The parser of a command that builds nothing."""

    class Parsing(command):
        def before_instantiate_classes(self) -> None:
            pass

        def instantiate_classes(self) -> None:
            pass

    return Parsing(list(arguments)).parser


@pytest.fixture(scope="module")
def fit_parser() -> LightningArgumentParser:
    return parser_of(FairnessCLI, "--config=quickstart")


@pytest.fixture(scope="module")
def classifier_parser() -> LightningArgumentParser:
    return parser_of(ClassifierCLI, "--config=classifiers/training", "--output=unused")


def resolve(parser: LightningArgumentParser, arguments: list[str]) -> dict[str, Any]:
    return yaml.safe_load(parser.dump(parser.parse_args(prepared(arguments)), skip_none=False))


@pytest.mark.parametrize("name", recorded("experiments"))
def test_an_experiment_resolves_to_the_values_of_before(name: str, fit_parser: LightningArgumentParser) -> None:
    experiment, *parts = name.split(".")
    files = [EXPERIMENTS / f"{experiment}.yaml", *(EXPERIMENTS / "parts" / f"{part}.yaml" for part in parts)]
    arguments = [f"--config={file}" for file in files] + MORE.get(name, [])
    assert differences(today(recorded("experiments")[name]), resolve(fit_parser, arguments)) == []


@pytest.mark.parametrize("name", recorded("classifiers"))
def test_a_classifier_resolves_to_the_values_of_before(name: str, classifier_parser: LightningArgumentParser) -> None:
    arguments = [f"--config={EXPERIMENTS / 'classifiers' / name}.yaml", "--output=/tmp/x"]
    assert differences(today(recorded("classifiers")[name]), resolve(classifier_parser, arguments)) == []


def test_every_experiment_is_compared_alone_and_on_the_miniature() -> None:
    names = {file.stem for file in EXPERIMENTS.glob("*.yaml")}
    assert names | {f"{name}.portraits" for name in names} <= recorded("experiments").keys()
    assert set(shipped_names()) == names
    assert recorded("classifiers").keys() == {file.stem for file in (EXPERIMENTS / "classifiers").glob("*.yaml")}


def test_a_difference_is_seen() -> None:
    then = {"model": {"rate": 1.0, "list": [{"class_path": "fairness_dft.features.Clip"}]}}
    assert differences(then, {"model": {"rate": 1.0, "list": [{"class_path": "fairness_dft.features.Clip"}]}}) == []
    now = {"model": {"rate": 2.0, "list": [{"class_path": "fairness_dft.features.Dino"}]}}
    assert len(differences(then, now)) == 2
    assert differences({"a": 1}, {}) == [".a: was 1, is 'absent'"]
