"""Training a classifier: its parts against hand-written references, and the whole command on drawn faces."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BeitConfig,
    ConvNextConfig,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    MobileNetV2Config,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
)

from fairness_dft.classifiers.backbone import last_linear
from fairness_dft.classifiers.calibration import at_a_bound, head_figures, temperature
from fairness_dft.classifiers.image_classifier import ImageClassifier
from fairness_dft.classifiers.training import ClassifierTraining, head_loss
from fairness_dft.datasets.base import UNKNOWN, LabelledFolder, Pictures
from fairness_dft.portraits.draw import AGES, GENDERS, SKINS
from fairness_dft.portraits.training import draw_portraits
from fairness_dft.reports.classifier_card import model_card
from fairness_dft.train_classifier import main

NAMES = {"gender": GENDERS, "race": SKINS, "age": AGES}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn faces, with a table; every tenth age is not known."""
    folder = tmp_path_factory.mktemp("faces")
    portraits = draw_portraits(705, seed=5, balanced=True)
    rows = []
    for i in portraits.labels["face"].nonzero().flatten().tolist():
        Image.fromarray(portraits.pictures[i].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        row = {head: NAMES[head][int(portraits.labels[head][i])] for head in NAMES}
        row["age"] = "" if i % 10 == 3 else row["age"]
        rows.append({"file": f"{i}.png", "split": ("train", "train", "train", "validation", "test")[i % 5], **row})
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ResNet's configuration alone: it starts with random weights."""
    folder = tmp_path_factory.mktemp("backbone")
    ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic").save_pretrained(folder)
    preparation = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    return folder


def flags(faces: Path, backbone: Path, output: Path, **more: object) -> list[str]:
    settings = {
        "seed_everything": 0,
        "model.backbone": backbone,
        "model.learning_rate": 1e-2,
        "data": "fairness_dft.datasets.LabelledFolder",
        "data.init_args.folder": faces,
        "data.init_args.workers": 0,
        "data.init_args.batch_size": 32,
        "output": output,
        "trainer.max_epochs": 25,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.logger": "false",
        **more,
    }
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def trained(faces: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("classifiers") / "drawn"
    main(flags(faces, backbone, output))
    return output


def share(verdict: torch.Tensor, truth: torch.Tensor, label: int, other: int) -> float:
    """How often the pictures of one label are taken for another one."""
    return float((verdict[truth == label] == other).float().mean())


def expected_calibration_error(logits: torch.Tensor, truth: torch.Tensor) -> float:
    """By hand: in each of 15 bins of confidence, the gap between confidence and accuracy, weighed by its pictures."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(logits.softmax(1), truth, strict=True):
        if label != UNKNOWN:
            sure, verdict = row.max(0)
            bins.setdefault(math.ceil(float(sure) * 15), []).append((float(sure), bool(verdict == label)))
    total = sum(map(len, bins.values()))
    gaps = [abs(sum(sure - right for sure, right in pairs)) for pairs in bins.values()]
    return sum(gaps) / total


@pytest.mark.slow
def test_trained_classifier_is_what_its_figures_say(faces: Path, trained: Path) -> None:
    """The figures, again: by the project's own loader of classifiers, over the test pictures."""
    figures = json.loads((trained / "metrics.json").read_text())
    classifier = ImageClassifier(str(trained))
    classifier.load()
    assert classifier.heads == {head: tuple(sorted(names)) for head, names in NAMES.items()}
    data = LabelledFolder(str(faces))
    data.read()
    pictures = Pictures(data.pictures["test"], 32)
    assert figures["split"] == "test" and figures["pictures"]["test"] == len(pictures)
    with torch.no_grad():
        logits = classifier(torch.stack([pixels for pixels, _ in pictures]).float() / 255)
    for head, classes in classifier.heads.items():
        truth = torch.tensor([labels[head] for _, labels in pictures])
        verdict = logits[head].argmax(1)
        recall = [float((verdict[truth == i] == i).float().mean()) for i in range(len(classes))]
        values = figures["heads"][head]
        assert list(values["recall"].values()) == pytest.approx(recall)
        assert values["balanced_accuracy"] == pytest.approx(sum(recall) / len(recall))
        assert values["accuracy"] == pytest.approx(float((verdict == truth)[truth != UNKNOWN].float().mean()))
        precision = [
            recall[i] / sum(share(verdict, truth, j, i) for j in range(len(classes))) for i in range(len(classes))
        ]
        assert list(values["precision"].values()) == pytest.approx(precision)
        for f1, p, r in zip(values["f1"].values(), precision, recall, strict=True):
            assert f1 == pytest.approx(2 * p * r / (p + r))
        assert values["calibration_error"] == pytest.approx(expected_calibration_error(logits[head], truth), abs=1e-5)
        expected = [
            [int(((truth == i) & (verdict == j)).sum()) for j in range(len(classes))] for i in range(len(classes))
        ]
        assert values["confusion"] == expected
    assert figures["heads"]["race"]["balanced_accuracy"] > 0.7  # chance: 0.25
    assert figures["heads"]["gender"]["balanced_accuracy"] > 0.7


@pytest.mark.slow
def test_temperatures_are_in_the_saved_layer_and_best_on_validation(faces: Path, trained: Path) -> None:
    classifier = ImageClassifier(str(trained))
    classifier.load()
    data = LabelledFolder(str(faces))
    data.read()
    pictures = Pictures(data.pictures["validation"], 32)
    with torch.no_grad():
        logits = classifier(torch.stack([pixels for pixels, _ in pictures]).float() / 255)
    for head in classifier.heads:
        truth = torch.tensor([labels[head] for _, labels in pictures])
        assert temperature(logits[head], truth) == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_model_card_tells_figures_and_limits(trained: Path) -> None:
    card, figures = (trained / "README.md").read_text(), json.loads((trained / "metrics.json").read_text())
    assert "perceived" in card and "must not be used to" in card and "LabelledFolder" in card
    for head, values in figures["heads"].items():
        assert f"| {head} | {values['balanced_accuracy']:.3f} |" in card
        for name, row in zip(sorted(NAMES[head]), values["confusion"], strict=True):
            assert f"| {name} | {' | '.join(map(str, row))} |" in card
    assert str(trained.parent.parent) not in (trained / "config.json").read_text()


def test_heads_of_many_classes_are_summed_up() -> None:
    many, few = [f"subject {i}" for i in range(30)], ["man", "woman"]
    torch.manual_seed(0)
    labels, genders = torch.arange(30).repeat(4), torch.randint(2, (120,))
    logits = 9 * torch.nn.functional.one_hot(labels, 30).float()
    logits[labels == 7] = logits[labels == 8]
    heads = {
        "subject": head_figures(logits, labels, many),
        "gender": head_figures(torch.nn.functional.one_hot(genders, 2).float(), genders, few),
    }
    error = {name: values["calibration_error"] for name, values in heads.items()}
    counts = {"train": 1, "validation": 2, "test": 120}
    figures = {"split": "test", "pictures": counts, "heads": heads, "calibration_error_before": error}
    figures["temperature"] = {"subject": 1.0, "gender": 1.0}
    card = model_card("ResNet", None, "LabelledFolder", {}, figures)
    assert "30 classes, lowest 0.000 (subject 7)" in card and "subject 3" not in card
    assert "| gender: label ↓ prediction → | man | woman |" in card and "from random weights" in card


def test_loss_of_a_head_is_the_weighted_mean_over_known_labels() -> None:
    logits = torch.randn(5, 3, dtype=torch.float64)
    labels, weights = torch.tensor([0, UNKNOWN, 2, 1, UNKNOWN]), torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    expected = 0.0
    for i in (0, 2, 3):
        exponentials = [math.exp(value) for value in logits[i].tolist()]
        expected -= float(weights[labels[i]]) * math.log(exponentials[int(labels[i])] / sum(exponentials))
    assert head_loss(logits, labels, weights).item() == pytest.approx(expected / 3)
    nothing = head_loss(logits.requires_grad_(), torch.full((5,), UNKNOWN), weights)
    nothing.backward()
    assert nothing.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_temperature_undoes_a_scale(true: float) -> None:
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (20_000, 3))
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([random.choice(3, p=chance) for chance in chances])
    labels[:100] = UNKNOWN
    found = temperature(torch.from_numpy(logits * true), torch.from_numpy(labels))
    assert found == pytest.approx(true, rel=0.05)
    assert temperature(torch.zeros(2, 2), torch.full((2,), UNKNOWN)) == 1
    assert temperature(torch.eye(3), torch.arange(3)) == 1  # without an error, there is no best one


def test_a_temperature_at_its_bound_is_told() -> None:
    """Sure verdicts that are right no more often than chance have no finite temperature."""
    useless = temperature(9 * torch.eye(2)[[0, 1, 0, 1]], torch.tensor([0, 1, 1, 0]))
    [line] = at_a_bound({"hat": useless, "mood": 1.7})
    assert line.startswith("the temperature of hat reached its bound (20.00)")


def test_calibration_can_be_left_out() -> None:
    training = ClassifierTraining(calibrated=False)
    training.heads, training.last = {"gender": ("man", "woman")}, torch.nn.Linear(3, 2)
    training.verdicts = {"gender": (torch.eye(2).repeat(5, 1), torch.tensor([0, 1] * 4 + [1, 0]))}
    before = training.last.weight.clone()
    assert training.calibrate() == {"gender": 1} and torch.equal(training.last.weight, before)
    training.calibrated = True
    assert training.calibrate()["gender"] != 1 and not torch.equal(training.last.weight, before)


def test_balanced_weights_give_every_class_the_same_share(tmp_path: Path, backbone: Path) -> None:
    for i in range(5):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
    rows = ["0.png,train,a,p", "1.png,train,a,q", "2.png,train,a,", "3.png,train,b,p", "4.png,validation,b,q"]
    (tmp_path / "labels.csv").write_text("\n".join(["file,split,one,two", *rows]) + "\n")
    data = LabelledFolder(str(tmp_path))
    data.read()
    for balance, expected in ((True, [4 / 6, 2.0]), (False, [1.0, 1.0])):
        training = ClassifierTraining(str(backbone), balance=balance)
        training.load(data)
        assert training.weights[0].tolist() == pytest.approx(expected)
        assert training.weights[1].tolist() == pytest.approx([0.75, 1.5] if balance else [1.0, 1.0])
        assert data.size == 32 and training.network.training


def test_pretrained_backbone_keeps_its_body_and_gets_new_heads(tmp_path: Path, faces: Path) -> None:
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    original = ViTForImageClassification(ViTConfig(**sizes, patch_size=16, num_labels=5))
    original.save_pretrained(tmp_path / "vit")
    data = LabelledFolder(str(faces))
    data.read()
    for pretrained in (True, False):
        training = ClassifierTraining(str(tmp_path / "vit"), pretrained=pretrained)
        training.load(data)
        name = "vit.embeddings.patch_embeddings.projection.weight"
        same = torch.equal(training.network.state_dict()[name], original.state_dict()[name])
        assert same == pretrained
        assert training.last.out_features == 8
        assert training.preparation["size"] == {"height": 32, "width": 32}
        assert training.preparation["image_mean"] == [0.485, 0.456, 0.406]


def test_mistakes_are_one_line(faces: Path, backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model").write_text("precious")
    for changes, message in (
        ({"output": tmp_path / "there"}, "--output: .* already exists"),
        ({"output": tmp_path / "there" / "model" / "x"}, "--output: cannot write"),
        ({"model.backbone": "no/such-backbone"}, "--model.backbone. 'no/such-backbone' could not be loaded"),
        ({"model.smoothing": 1.5}, "`smoothing` must be in"),
        ({"data.init_args.folder": tmp_path / "missing"}, "--data: there is no folder"),
        ({"data.init_args.labels": "other.csv"}, "--data: there is no file"),
        ({"model.learning_rat": 1}, "did you mean --model.learning_rate"),
        ({"trainer.max_epochs": -1}, "--trainer.max_epochs must be given"),
        ({"trainer.limit_test_batches": 0}, "limit_test_batches must not be 0"),
        ({"ckpt_path": tmp_path / "no.ckpt"}, "--ckpt_path: there is no file"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            main(flags(faces, backbone, **{"output": tmp_path / "new", **changes}))
        assert "\n" not in str(error.value)
    assert (tmp_path / "there" / "model").read_text() == "precious"


SMALL_BACKBONES = {
    "resnet": (ResNetConfig, dict(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")),
    "vit": (
        ViTConfig,
        dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, patch_size=16),
    ),
    "dinov2": (Dinov2Config, dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=16)),
    "convnext": (ConvNextConfig, dict(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)),
    "swin": (SwinConfig, dict(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)),
    "mobilenet": (MobileNetV2Config, dict(depth_multiplier=0.25)),
    "beit": (BeitConfig, dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)),
}


@pytest.mark.parametrize("kind", SMALL_BACKBONES)
def test_scaling_the_last_layer_scales_the_logits_and_nothing_idle_is_trained(kind: str) -> None:
    config, sizes = SMALL_BACKBONES[kind]
    network = AutoModelForImageClassification.from_config(config(**sizes, image_size=32, num_labels=5))
    layer = last_linear(network, 32)
    pictures = torch.rand(2, 3, 32, 32)
    before = network.eval()(pictures).logits
    before.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)
    with torch.no_grad():
        layer.weight.div_(3)
        layer.bias.div_(3)
        torch.testing.assert_close(network(pictures).logits, before / 3, rtol=1e-3, atol=1e-5)


def test_networks_that_average_two_heads_are_refused() -> None:
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, patch_size=16)
    network = DeiTForImageClassificationWithTeacher(DeiTConfig(**sizes, image_size=32, num_labels=5))
    with pytest.raises(ValueError, match="do not come from one linear layer"):
        last_linear(network, 32)


def test_figures_without_a_picture_are_null() -> None:
    figures = head_figures(torch.zeros(2, 2), torch.full((2,), UNKNOWN), ("a", "b"))
    assert json.loads(json.dumps(figures, allow_nan=False))["calibration_error"] is None
    one = head_figures(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), ("a", "b"))
    assert one["balanced_accuracy"] == 1 and one["recall"] == {"a": 1.0, "b": None}


@pytest.mark.slow
def test_plain_transformers_reads_it_as_we_do(faces: Path, trained: Path) -> None:
    classifier, processor = ImageClassifier(str(trained)), AutoImageProcessor.from_pretrained(trained)
    network = AutoModelForImageClassification.from_pretrained(trained)
    classifier.load()
    pictures = [Image.open(file).resize((32, 32)) for file in sorted(faces.glob("*.png"))[:4]]
    ours = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures]).float() / 255
    with torch.no_grad():
        theirs = network(**processor(pictures, return_tensors="pt")).logits
        found = torch.cat(list(classifier(ours).values()), 1)
    torch.testing.assert_close(found, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")
def test_a_stopped_training_goes_on_in_its_folder(faces: Path, backbone: Path, tmp_path: Path) -> None:
    output = tmp_path / "classifier"
    main(flags(faces, backbone, output, **{"trainer.max_epochs": 1}))
    checkpoint = output / "training" / "checkpoints" / "last.ckpt"
    steps = torch.load(checkpoint, weights_only=True)["global_step"]
    main(flags(faces, backbone, output, **{"trainer.max_epochs": 2, "ckpt_path": checkpoint}))
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2 * steps > 0
    with pytest.raises(ValueError, match="already exists"):
        main(flags(faces, backbone, output))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named(faces: Path, backbone: Path, tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "faces"
    shutil.copytree(faces, folder)
    victim = max(folder.glob("*.png"))
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"--data: the image .*{victim.name}. cannot be read") as error:
        main(flags(folder, backbone, tmp_path / "new", **{"data.init_args.workers": workers, "trainer.max_epochs": 1}))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_two_processes_count_every_picture_once(faces: Path, tmp_path: Path) -> None:
    """With a backbone that has a parameter which the logits never use."""
    config, sizes = SMALL_BACKBONES["dinov2"]
    config(**sizes, image_size=32).save_pretrained(tmp_path / "dinov2")
    ddp = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.max_epochs": 1}
    command = [
        sys.executable,
        "-m",
        "fairness_dft.train_classifier",
        *flags(faces, tmp_path / "dinov2", tmp_path / "c", **ddp),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "c" / "metrics.json").read_text())
    assert figures["pictures"]["test"] % 2 == 1  # one rank has one more
    for head in ("gender", "race"):
        assert sum(map(sum, figures["heads"][head]["confusion"])) == figures["pictures"]["test"]


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "experiments" / "classifiers").glob("*.yaml")))
def test_every_classifier_experiment_asks_for_its_data(file: Path, tmp_path: Path) -> None:
    folder = yaml.safe_load(file.read_text(encoding="utf-8"))["data"]["init_args"]["folder"]
    with pytest.raises(ValueError, match=f"--data: there is no folder '{folder}'"):
        main([f"--config={file}", f"--output={tmp_path / 'new'}", "--trainer.accelerator=cpu", "--trainer.devices=1"])


@pytest.mark.slow
def test_the_command_ends_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fairness_dft.train_classifier", "--data=fairness_dft.datasets.FairFace"]
    command += ["--data.init_args.folder", str(tmp_path / "missing"), "--output", str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: --data: there is no folder")
    assert "Traceback" not in done.stderr
