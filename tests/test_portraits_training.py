"""The trainings of the miniature report what they did."""

import pytest
import torch
from miniature import judge

from fairness_dft.portraits import text_to_image
from fairness_dft.portraits.judges import COARSE, augment_coarse
from fairness_dft.portraits.training import draw_portraits


def test_reported_steps_are_those_of_all_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def count(name, modules, loss, steps, *more, **settings) -> float:
        trained.append(steps)
        return 1.0

    monkeypatch.setattr(text_to_image, "optimise", count)
    portraits = draw_portraits(20, seed=0)
    autoencoder, figures = text_to_image.train_autoencoder(portraits, 2_200, seed=1)
    assert len(trained) == 2 and figures["steps"] == sum(trained) == 3_666
    trained.clear()
    _, figures = text_to_image.train_generator(autoencoder, portraits, 8, seed=2)
    assert trained == [2, 8] and figures["steps"] == {"text_encoder": 2, "unet": 8}


def test_the_training_classifier_learns_from_coarse_and_noisy_pictures() -> None:
    torch.manual_seed(0)
    halves = torch.zeros(200, 3, 64, 64)
    halves[..., 32:] = 0.5
    coarse = augment_coarse(halves, noise=0.5)
    assert coarse.shape == (200, 3, COARSE, COARSE)
    assert coarse[..., 2 : COARSE // 2 - 2].mean().item() == pytest.approx(-1, abs=0.02)
    assert coarse[..., COARSE // 2 + 2 : -2].mean().item() == pytest.approx(0, abs=0.02)
    spread = coarse[..., 2 : COARSE // 2 - 2].flatten(1).std(1)  # uniform from 0 to twice the noise, as inputs span 2
    assert spread.mean().item() == pytest.approx(0.5, abs=0.08) and 0.9 < spread.max() < 1.1
    shipped = judge("training").classifier
    shipped.load()
    assert shipped.preprocessing.size == (COARSE, COARSE)
