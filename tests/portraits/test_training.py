"""The trainings of the miniature: their reports, their losses and what their last layers say."""

import csv
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from miniature import PORTRAITS, judge
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from fairness_dft.faces.crops import square_crops
from fairness_dft.portraits import text_to_image
from fairness_dft.portraits.classifiers import CROP, HEADS, SEEDS, views, write_pictures
from fairness_dft.portraits.heads import ATTRIBUTES, columns, head_losses, id2label, subjects_for_looks
from fairness_dft.portraits.training import LOOK, draw_portraits
from fairness_dft.portraits.world import subjects


def test_reported_steps_are_those_of_all_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def count(name, modules, loss, steps, *more, **settings) -> float:
        trained.append(steps)
        return 1.0

    monkeypatch.setattr(text_to_image, "optimise", count)
    portraits = draw_portraits(20, seed=0)
    autoencoder, figures = text_to_image.train_autoencoder(portraits, 2_200, seed=1)
    assert len(trained) == 3 and figures["steps"] == sum(trained) == 2_200 + 1_466 + 4_400
    trained.clear()
    _, figures = text_to_image.train_generator(autoencoder, portraits, 10, seed=2)
    assert trained == [2, 10] and figures["steps"] == {"text_encoder": 2, "unet": 10}


def test_the_training_classifier_sees_the_crops_that_a_detector_gives_it() -> None:
    """Of all faces, about boxes that differ from the detector's by less than half a pixel."""
    portraits = draw_portraits(100, seed=9, balanced=True)
    crops, labels = views(portraits, "training")
    seen = portraits.labels["face"] == 1
    assert crops.shape == (int(seen.sum()), 3, CROP, CROP)
    assert torch.equal(labels["gender"], portraits.labels["gender"][seen])
    shipped = judge("training")
    shipped.load()
    found = shipped.faces(portraits.images(slice(None)))
    assert torch.equal(found.has_face, seen)
    assert (found.boxes[seen] - portraits.boxes[seen]).abs().mean() < 0.5
    own = square_crops(portraits.images(slice(None)), found.boxes, shipped.faces.size, shipped.faces.margin)
    assert torch.equal(found.crops, own)
    exact = square_crops(portraits.images(slice(None)), portraits.boxes, shipped.faces.size, shipped.faces.margin)
    assert torch.allclose(crops, exact[seen], atol=1e-5)
    assert shipped.classifier.preprocessing.size == (CROP, CROP)


@pytest.mark.parametrize("which", ["training", "evaluation"])
def test_pictures_and_labels_are_written_for_every_split(which: str, tmp_path: Path) -> None:
    autoencoder = AutoencoderKL.from_pretrained(PORTRAITS / "pipeline" / "vae", torch_dtype=torch.float32)
    counts = {"train": 12, "validation": 6, "test": 4}
    write_pictures(tmp_path, which, autoencoder, counts)
    with (tmp_path / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "split", *HEADS[which]]
    assert {row["split"] for row in rows} == counts.keys()
    for row in rows:
        with Image.open(tmp_path / row["file"]) as picture:
            assert picture.size == ((CROP, CROP) if which == "training" else (64, 64))
    if which == "evaluation":
        assert len(rows) == sum(counts.values())
        drawn = draw_portraits(counts["train"], SEEDS[which], balanced=True)
        for row, *labels in zip(rows, *(drawn.labels[head].tolist() for head in HEADS[which]), strict=False):
            named = dict(zip(HEADS[which], labels, strict=True))
            no_face = named["face"] == 0
            for head, classes in HEADS[which].items():
                hidden = no_face and head not in ("face", "background", "background_colour")
                assert row[head] == ("" if hidden else classes[named[head]])
    else:
        assert all(row[head] for row in rows for head in ("gender", "race", "age"))


def test_a_subject_is_as_probable_as_the_parts_of_its_look_together() -> None:
    torch.manual_seed(0)
    layer, states = nn.Linear(6, len(id2label(ATTRIBUTES | LOOK))), torch.randn(3, 6)
    changed, heads = subjects_for_looks(layer)
    before, after = columns(ATTRIBUTES | LOOK), columns(heads)
    logits = layer(states)
    kept = before["face"].stop
    assert_close(changed(states)[:, :kept], logits[:, :kept])
    parts = {part: logits[:, before[part]].log_softmax(1) for part in LOOK}
    log_probability = torch.stack(
        [
            sum(parts[part][:, kinds.index(getattr(subject.look, part))] for part, kinds in LOOK.items())
            for subject in subjects()
        ],
        dim=1,
    )
    assert_close(changed(states)[:, after["subject"]].log_softmax(1), log_probability.log_softmax(1))
    assert heads["subject"] == tuple(subject.name for subject in subjects())


def test_only_a_face_tells_gender_and_only_a_person_clothes() -> None:
    torch.manual_seed(0)
    portraits = draw_portraits(60, seed=5, balanced=True)
    heads = ATTRIBUTES | LOOK
    logits = torch.randn(60, len(id2label(heads)))
    face = portraits.labels["face"] == 1
    assert 0 < face.sum() < 60
    expected = 0.0
    for head, where in columns(heads).items():
        everybody = head == "face" or head.startswith("background")
        rows = [i for i in range(60) if everybody or face[i]]
        expected += cross_entropy(logits[rows][:, where], portraits.labels[head][rows])
    assert_close(head_losses(logits, portraits.labels, heads), expected)
