"""The trainings of the miniature report what they did."""

import pytest

from fairness_dft.portraits import text_to_image
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
    _, figures = text_to_image.train_generator(autoencoder, portraits, portraits, 7, 4, seed=2)
    assert trained == [7, 4] and figures["steps"] == 11
