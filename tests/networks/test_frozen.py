"""The base of frozen networks: it loads once, never trains, and checks without changing anything."""

import copy
from pathlib import Path

import pytest
from torch import nn

from fairness_dft.classifiers import FacePresence, ImageClassifier, Judge
from fairness_dft.faces import DetectedFaces, FaceEmbedding, FaceRealism, InsightFace, YuNet
from fairness_dft.features import Clip, Dino
from fairness_dft.files import Location
from fairness_dft.metrics.fidelity import Inception
from fairness_dft.networks.frozen import FrozenNetwork, FrozenWeights, loading_error

PORTRAITS = Path("data/portraits")
PRESENT = {
    "clip": lambda: Clip(str(PORTRAITS / "clip")),
    "dino": lambda: Dino(str(PORTRAITS / "dino")),
    "classifier": lambda: ImageClassifier(str(PORTRAITS / "classifier_training")),
    "face presence": lambda: FacePresence(str(PORTRAITS / "classifier_evaluation")),
    "yunet": lambda: YuNet(str(PORTRAITS / "yunet.onnx")),
    "insightface": lambda: InsightFace(str(PORTRAITS / "detector")),
    "package": lambda: InsightFace("buffalo_l"),  # which insightface downloads: nobody knows before
    "judge": lambda: Judge(
        ImageClassifier(str(PORTRAITS / "classifier_training")), DetectedFaces([YuNet(str(PORTRAITS / "yunet.onnx"))])
    ),
}
ABSENT = {
    "clip": lambda: Clip("no/such/clip"),
    "classifier": lambda: ImageClassifier("owner/classifier"),
    "face presence": lambda: FacePresence("no/such/classifier"),
    "yunet": lambda: YuNet("owner/repository/yunet.onnx"),
    "insightface": lambda: InsightFace("no/such/detector"),
    "embedding": lambda: FaceEmbedding("arcface.onnx"),
    "bank": lambda: FaceRealism("bank.safetensors"),
    "inception": lambda: Inception("weights.pth"),
    "judge": lambda: Judge(
        ImageClassifier(str(PORTRAITS / "classifier_training")), DetectedFaces([YuNet("missing.onnx")])
    ),
}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse whatever a check must not do: reach the hub's files, or load them."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a check must not download anything")

    monkeypatch.setattr("fairness_dft.files.on_hub", lambda path: False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)


class Line(FrozenNetwork):
    """A line, which counts how often it is loaded, or fails."""

    path, required_files, local_only = "data/portraits/clip", ("config.json",), True
    loads = 0

    def __init__(self, reason: str = "") -> None:
        super().__init__()
        self.reason = reason

    def _load(self, location: Location) -> None:
        self.loads += 1
        if self.reason:
            raise OSError(self.reason)
        self.network = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()


def test_it_loads_once_and_never_trains() -> None:
    line = Line()
    line.load()
    first = line.network
    line.load()
    assert line.loads == 1 and line.network is first
    nn.Sequential(line).train()
    assert not any(module.training for module in line.modules())
    assert not any(parameter.requires_grad for parameter in line.parameters())


def test_a_failure_is_one_line_and_leaves_nothing_half_loaded() -> None:
    line = Line("the file\n is   broken.")
    for tries in (1, 2):
        with pytest.raises(
            ValueError, match=r"network 'data/portraits/clip' could not be loaded \(the file is broken\)"
        ):
            line.load()
        assert line.loads == tries and not hasattr(line, "network")
    line.reason = ""
    line.load()
    assert line.loads == 3


def test_an_error_says_what_why_what_is_allowed_and_the_way_out() -> None:
    assert str(loading_error("bank", "x", "it is empty", "a full one", "leave it out")) == (
        "the bank 'x' could not be loaded (it is empty): give a full one, or leave it out"
    )
    assert str(loading_error("bank", "x", KeyError(), "a full one")) == (
        "the bank 'x' could not be loaded (KeyError): give a full one"
    )
    assert len(str(loading_error("bank", "x", "long " * 1000, "a full one"))) < 400


def state(value: object) -> object:
    """All attributes of an object and its parts, to compare by `==`."""
    if isinstance(value, (FrozenWeights, nn.Module)):
        return {name: state(held) for name, held in vars(value).items()}
    if isinstance(value, dict):
        return {name: state(held) for name, held in value.items()}
    return [state(held) for held in value] if isinstance(value, list) else copy.copy(value)


@pytest.mark.parametrize("name", PRESENT)
def test_a_check_finds_what_is_there_and_changes_no_state(name: str) -> None:
    part = PRESENT[name]()
    before = state(part)
    part.check()
    assert state(part) == before


@pytest.mark.parametrize("name", ABSENT)
def test_a_check_refuses_what_is_absent_in_one_line_and_changes_no_state(name: str) -> None:
    part = ABSENT[name]()
    before = state(part)
    message = r"the .+ '.+' could not be loaded \((there is )?no (such )?(file|folder)[^()]*\): give "
    with pytest.raises(ValueError, match=message) as error:
        part.check()
    assert "\n" not in str(error.value) and state(part) == before


def test_what_needs_nothing_from_outside_is_always_there() -> None:
    """A network of a user's own that only replaces `load`, without a path."""

    class Own(FrozenNetwork):
        def load(self) -> None:
            self.layer = nn.Linear(1, 1)

    Own().check()
