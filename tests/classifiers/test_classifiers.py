"""Classifiers, their heads and preprocessing against Hugging Face's own code."""

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import LABELS, PREPROCESSOR, build_classifier
from PIL import Image
from torch import Tensor
from transformers import ResNetForImageClassification, ResNetModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fairness_dft.classifiers.image_classifier import FacePresence, ImageClassifier, columns_of_heads
from fairness_dft.classifiers.judge import Judge
from fairness_dft.faces.finders import WholeFrame
from fairness_dft.networks.preprocessing import Preprocessing

HEADS = {
    "gender": ("man", "woman"),
    "race": ("light", "tan", "brown", "dark"),
    "face": ("absent", "present"),
    "age": ("young", "old"),
    "occupation": ("chef", "pilot", "judge"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "classifier"))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 16, 16)


def load(folder: Path, **options: str) -> ImageClassifier:
    classifier = ImageClassifier(str(folder), **options)
    classifier.load()
    return classifier


def reference_logits(folder: Path, images: Tensor) -> Tensor:
    """What Hugging Face's own network says of images that are prepared by hand."""
    network = ResNetForImageClassification.from_pretrained(folder).eval()
    mean, deviation = torch.tensor(PREPROCESSOR["image_mean"]), torch.tensor(PREPROCESSOR["image_std"])
    with torch.no_grad():
        return network((images - mean[:, None, None]) / deviation[:, None, None]).logits


def test_heads_come_from_the_labels_in_their_order(folder: Path) -> None:
    assert len(LABELS) > 10  # sorted as text, label 10 would come before label 2
    assert load(folder).heads == HEADS
    stored = json.loads((folder / "config.json").read_text())["id2label"]
    assert set(stored) == {str(i) for i in range(len(LABELS))}


def test_each_head_gets_its_logits(folder: Path, images: Tensor) -> None:
    logits, start = reference_logits(folder, images), 0
    heads = load(folder)(images)
    assert list(heads) == list(HEADS)
    for head, classes in HEADS.items():
        torch.testing.assert_close(heads[head], logits[:, start : start + len(classes)])
        start += len(classes)


def test_labels_may_be_in_any_order(tmp_path: Path, images: Tensor) -> None:
    labels = ("race/light", "gender/man", "race/dark", "gender/woman")
    folder = build_classifier(tmp_path, labels)
    classifier, logits = load(folder), reference_logits(folder, images)
    assert classifier.heads == {"race": ("light", "dark"), "gender": ("man", "woman")}
    torch.testing.assert_close(classifier(images)["race"], logits[:, [0, 2]])
    torch.testing.assert_close(classifier(images)["gender"], logits[:, [1, 3]])


@pytest.mark.parametrize(
    ("labels", "heads"),
    [
        ({1: "woman", 0: "man"}, {"gender": {"man": 0, "woman": 1}}),
        ({"10": "a/k", "9": "a/j", "2": "b/c"}, {"b": {"c": 2}, "a": {"j": 9, "k": 10}}),
        ({0: "race/Latino/Hispanic", 1: "race/Black"}, {"race": {"Latino/Hispanic": 0, "Black": 1}}),
        ({0: "White", 1: "Latino/Hispanic"}, {"gender": {"White": 0, "Latino/Hispanic": 1}}),
    ],
)
def test_labels_become_heads(labels: dict, heads: dict) -> None:
    assert columns_of_heads(labels, "gender") == heads


def test_plain_labels_are_one_head_named_by_the_attribute(tmp_path: Path, images: Tensor) -> None:
    folder = build_classifier(tmp_path, ("young", "middle", "old"))
    classifier = load(folder, attribute="age")
    assert classifier.heads == {"age": ("young", "middle", "old")}
    torch.testing.assert_close(classifier(images)["age"], reference_logits(folder, images))


def test_the_weights_are_frozen_and_the_images_get_gradients(folder: Path, images: Tensor) -> None:
    judge = Judge(load(folder))
    images.requires_grad_()
    judge(images).probabilities("gender")[:, 0].sum().backward()
    assert images.grad.abs().amax((1, 2, 3)).min() > 0
    assert not any(parameter.requires_grad for parameter in judge.parameters())
    assert all(parameter.grad is None for parameter in judge.parameters())


def test_gradients_of_images_are_those_of_finite_differences(tmp_path: Path) -> None:
    classifier = load(build_classifier(tmp_path, ("man", "woman"))).double()
    images = torch.rand(1, 3, 9, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: classifier(x)["gender"], images, fast_mode=True, eps=1e-7, atol=1e-4, rtol=1e-3
    )


def test_training_mode_does_not_reach_the_network(folder: Path, images: Tensor) -> None:
    judge = Judge(load(folder), FacePresence(str(folder)))
    judge.load()
    before, state = judge(images), {key: value.clone() for key, value in judge.state_dict().items()}
    parent = torch.nn.Sequential(judge).train()
    after = parent(images)
    assert not any(module.training for module in [*judge.classifier.modules(), *judge.faces.classifier.modules()])
    for head in HEADS:
        torch.testing.assert_close(after.logits[head], before.logits[head], rtol=0, atol=0)
    torch.testing.assert_close(judge.state_dict(), state, rtol=0, atol=0)  # batch statistics among them


def test_loading_twice_does_nothing(folder: Path) -> None:
    classifier = load(folder)
    network = classifier.network
    classifier.load()
    assert classifier.network is network


def test_the_constructor_loads_nothing() -> None:
    judge = Judge(ImageClassifier("no/such/folder"), FacePresence("no/such/folder"))
    assert judge.classifier.heads == {} and not list(judge.parameters())


def test_face_presence_is_the_classifiers_own_output(copy: Path) -> None:
    images = torch.rand(9, 3, 16, 16)
    present, absent = LABELS.index("face/present"), LABELS.index("face/absent")
    logits = reference_logits(copy, images)
    margin = logits[:, present] - logits[:, absent]
    network = ResNetForImageClassification.from_pretrained(copy)
    with torch.no_grad():  # so that the classifier is of two minds
        network.classifier[1].bias[absent] += (margin.sort().values[3:5]).mean()
    network.save_pretrained(copy)

    finder = FacePresence(str(copy))
    finder.load()
    faces = finder(images.requires_grad_())
    assert faces.has_face.sum() == 5 and not faces.has_face.requires_grad
    torch.testing.assert_close(faces.has_face, margin >= margin.median())
    torch.testing.assert_close(faces.crops, images)
    assert faces.boxes.tolist() == [[0, 0, 16, 16]] * 9


def test_the_judge_joins_faces_and_classes(folder: Path, images: Tensor) -> None:
    judge = Judge(ImageClassifier(str(folder)), FacePresence(str(folder)))
    judge.load()
    verdict, logits = judge(images), reference_logits(folder, images)
    assert judge.classes("race") == HEADS["race"]
    torch.testing.assert_close(verdict.classes("race"), logits[:, 2:6].argmax(1))
    torch.testing.assert_close(verdict.probabilities("race"), logits[:, 2:6].softmax(1))
    torch.testing.assert_close(verdict.has_face, judge.faces(images).has_face)
    assert verdict.boxes.shape == (5, 4)


def test_a_product_of_attributes_has_the_tuples_of_their_classes(folder: Path) -> None:
    judge = Judge(load(folder))
    names = judge.classes("race×age×gender")
    assert names == tuple(", ".join(each) for each in product(HEADS["race"], HEADS["age"], HEADS["gender"]))
    verdict = judge(torch.rand(40, 3, 16, 16))
    for index, *each in zip(
        *(verdict.classes(name) for name in ("race×age×gender", "race", "age", "gender")), strict=True
    ):
        parts = [HEADS[name][part] for name, part in zip(("race", "age", "gender"), each, strict=True)]
        assert names[index] == ", ".join(parts)
    assert judge.reads("race×age") and judge.reads("age") and not judge.reads("race×height")
    with pytest.raises(ValueError, match="does not read 'height', only gender"):
        judge.classes("gender×height")


def test_logits_have_the_precision_of_the_images_under_autocast(folder: Path, images: Tensor) -> None:
    classifier = load(folder)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = classifier(images)["race"]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, classifier(images)["race"], rtol=0.05, atol=0.05)


def test_a_network_that_finds_and_classifies_runs_once(folder: Path, copy: Path, images: Tensor) -> None:
    one, two = (Judge(ImageClassifier(str(folder)), FacePresence(str(path))) for path in (folder, copy))
    calls = []
    for judge in (one, two):
        judge.load()
        for network in {judge.classifier.network, judge.faces.classifier.network}:
            network.register_forward_hook(lambda *_: calls.append(1))
    verdict, expected = one(images), two(images)
    assert len(calls) == 1 + 2
    torch.testing.assert_close(vars(verdict), vars(expected))


@pytest.mark.parametrize("count", [0, 1])
def test_none_or_one_image_can_be_judged(folder: Path, count: int) -> None:
    verdict = Judge(load(folder))(torch.rand(count, 3, 16, 16))
    assert verdict.classes("gender").shape == verdict.has_face.shape == (count,)


def test_without_a_face_finder_every_image_is_a_face(folder: Path, images: Tensor) -> None:
    judge = Judge(load(folder))
    assert isinstance(judge.faces, WholeFrame) and judge(images).has_face.all()


def test_an_attribute_that_is_not_read_is_refused(folder: Path) -> None:
    message = "does not read 'height', only gender, race, face, age, occupation: choose one of these"
    with pytest.raises(ValueError, match=message):
        Judge(load(folder)).classes("height")


def test_a_classifier_that_knows_no_faces_is_no_face_finder(tmp_path: Path) -> None:
    build_classifier(tmp_path, ("gender/man", "gender/woman"))
    with pytest.raises(ValueError, match="classifier '.*' could not be loaded .it has no label face/present"):
        FacePresence(str(tmp_path)).load()


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_missing_file_is_one_clear_line(copy: Path, file: str) -> None:
    (copy / file).unlink()
    message = (
        rf"the classifier '.*' could not be loaded .there is no file '{file}'.: give a folder .*--config \S+portraits"
    )
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_a_missing_folder_is_one_clear_line() -> None:
    with pytest.raises(
        ValueError, match=r"classifier 'no/such/folder' could not be loaded \(there is no folder of this name"
    ):
        ImageClassifier("no/such/folder").load()


def test_missing_weights_are_one_clear_line(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the classifier '.*' could not be loaded \(.*no file named .*safetensors"):
        load(copy)


@pytest.mark.parametrize(("file", "content"), [("model.safetensors", "half a fi"), ("config.json", "{")])
def test_damaged_files_are_one_clear_line(copy: Path, file: str, content: str) -> None:
    (copy / file).write_text(content)
    with pytest.raises(ValueError, match=r"the classifier '.*' could not be loaded \(.+\): give") as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_a_backbone_without_a_head_is_refused_rather_than_given_a_random_one(copy: Path) -> None:
    ResNetModel.from_pretrained(copy).save_pretrained(copy)
    message = "it is not an image classifier: its weights lack classifier.1.bias, classifier.1.weight"
    with pytest.raises(ValueError, match=message):
        load(copy)


def picture(height: int, width: int) -> np.ndarray:
    """A smooth picture with some noise, uint8."""
    random = np.random.default_rng(height * 100 + width)
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + random.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)


def as_image(pixels: np.ndarray) -> Tensor:
    return torch.tensor(pixels).permute(2, 0, 1)[None] / 255


def preprocessing(tmp_path: Path, **changes: object) -> Preprocessing:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**PREPROCESSOR, **changes}))
    return Preprocessing.from_file(file)


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_without_resize_preprocessing_is_hugging_faces_own(tmp_path: Path, size: tuple[int, int]) -> None:
    configured = {"height": size[0], "width": size[1]}
    processor = ViTImageProcessorPil(**{**PREPROCESSOR, "size": configured})
    pixels = picture(*size)
    expected = processor(pixels, return_tensors="pt").pixel_values
    torch.testing.assert_close(preprocessing(tmp_path, size=configured)(as_image(pixels)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("size", [(64, 64), (37, 53), (16, 40), (9, 5), (1, 1)])
def test_resizing_is_pils_with_antialiasing(tmp_path: Path, size: tuple[int, int], resample: int) -> None:
    pixels = picture(*size) // 2 + 64  # PIL clips what a cubic overshoots
    expected = np.asarray(Image.fromarray(pixels).resize((16, 16), resample))
    prepare = preprocessing(tmp_path, image_mean=[0.0] * 3, image_std=[1.0] * 3, resample=int(resample))
    # PIL rounds to whole gray levels after each of its two passes.
    torch.testing.assert_close(prepare(as_image(pixels)), as_image(expected), rtol=0, atol=1.5 / 255)


def test_the_crop_of_a_clip_is_its_size(tmp_path: Path) -> None:
    settings = {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}
    processor = CLIPImageProcessorPil(**{**PREPROCESSOR, **settings})
    pixels = picture(20, 20)
    prepare = preprocessing(tmp_path, **settings)
    assert prepare.size == (20, 20)
    expected = processor(pixels, return_tensors="pt").pixel_values
    torch.testing.assert_close(prepare(as_image(pixels)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"size": 24}, (24, 24)),
        ({"size": {"shortest_edge": 24}}, (24, 24)),
        ({"size": {"shortest_edge": 256}, "crop_size": 224}, (224, 224)),
        ({"crop_size": None}, (16, 16)),
    ],
)
def test_every_way_to_write_a_size_is_read(tmp_path: Path, settings: dict, size: tuple[int, int]) -> None:
    assert preprocessing(tmp_path, **settings).size == size


def test_a_network_that_wants_no_normalisation_gets_none(tmp_path: Path) -> None:
    image = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(preprocessing(tmp_path, do_normalize=False)(image), image)


def test_preprocessing_passes_gradients_and_holds_no_state(tmp_path: Path) -> None:
    prepare = preprocessing(tmp_path)
    image = torch.rand(1, 3, 40, 40, requires_grad=True)
    prepare(image).sum().backward()
    # Every pixel of the output is a weighted mean of pixels of the input, divided by the deviation.
    expected = 16 * 16 / torch.tensor(PREPROCESSOR["image_std"])
    torch.testing.assert_close(image.grad.sum((0, 2, 3)), expected)
    assert not prepare.state_dict()


@pytest.mark.parametrize("key", ["size", "image_mean", "image_std"])
def test_a_missing_key_is_one_clear_line(tmp_path: Path, key: str) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({name: value for name, value in PREPROCESSOR.items() if name != key}))
    with pytest.raises(
        ValueError, match=f"preprocessor_config.json lacks '{key}', which the preprocessing of images needs"
    ):
        Preprocessing.from_file(file)


def test_preprocessing_that_is_no_json_is_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text("{")
    with pytest.raises(ValueError, match="preprocessor_config.json is not valid JSON: "):
        Preprocessing.from_file(file)
