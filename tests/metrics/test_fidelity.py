"""Distances between sets of embeddings, against their definitions in numpy and scipy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from fairness_dft.metrics.fidelity import Fidelity, Inception
from fairness_dft.training.quality_monitor import QualityMonitor


def two_sets(count: int = 60, dimension: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    before = torch.randn(count, dimension, generator=random)
    after = torch.randn(count, dimension, generator=random) * 0.5 + 0.7
    return torch.nn.functional.normalize(before, dim=1), torch.nn.functional.normalize(after, dim=1)


def measured(before: torch.Tensor, after: torch.Tensor, batches: int = 3) -> dict[str, float]:
    fidelity = Fidelity(before.shape[1])
    for parts in zip(before.chunk(batches), after.chunk(batches), strict=True):
        fidelity.update(*parts)
    return fidelity.compute()


def test_frechet_distance_is_that_of_two_gaussians() -> None:
    sets = two_sets()
    x, y = (part.double().numpy() * np.sqrt(5) for part in sets)
    means, covariances = (x.mean(0), y.mean(0)), (np.cov(x.T), np.cov(y.T))
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert measured(*sets)["fid"] == pytest.approx(expected, rel=1e-3)


def test_kernel_distance_is_the_unbiased_squared_discrepancy() -> None:
    """Of all pictures at once, as here, every subset gives the same."""
    sets = two_sets()
    x, y = (part.double().numpy() * np.sqrt(5) for part in sets)
    n = len(x)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / 5 + 1) ** 3

    within = sum((kernel(a, a).sum() - np.trace(kernel(a, a))) / (n * (n - 1)) for a in (x, y))
    expected = within - 2 * kernel(x, y).mean()
    assert measured(*sets)["kid"] == pytest.approx(expected, rel=1e-3)


def test_the_same_pictures_have_not_moved() -> None:
    before, _ = two_sets()
    found = measured(before, before)
    assert found["fid"] == pytest.approx(0, abs=1e-3) and found["kid"] <= 0
    assert measured(before, before) == found


def test_one_picture_says_nothing() -> None:
    before, after = two_sets(1)
    assert measured(before, after, batches=1) is None


class StandIn(torch.nn.Module):
    """Takes the place of torch-fidelity's network, which needs torchvision: pixels in [0, 255] to embeddings."""

    num_features = 7

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.register_buffer("weights", torch.load(feature_extractor_weights_path))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.dtype == torch.uint8
        return pixels.float().flatten(1) @ self.weights / 255


def test_inceptions_distance_is_that_of_torchmetrics(tmp_path, monkeypatch) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    file = tmp_path / "weights.pth"
    torch.save(torch.randn(3 * 4 * 4, 7, generator=torch.Generator().manual_seed(0)), file)
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", StandIn)
    inception, random = Inception(str(file)), torch.Generator().manual_seed(1)
    inception.load()
    before, after = (torch.rand(30, 3, 4, 4, generator=random) ** power for power in (1, 2))
    ours = Fidelity(7, scale=1.0)
    theirs = FrechetInceptionDistance(StandIn("inception-v3-compat", ["2048"], str(file)))
    ours.update(inception(before), inception(after))
    theirs.update((before * 255).byte(), real=True)
    theirs.update((after * 255).byte(), real=False)
    assert ours.compute()["fid"] == pytest.approx(float(theirs.compute()), rel=1e-5)

    monitor = QualityMonitor(inception=str(file))
    monitor.load()
    module = SimpleNamespace(features=[], device=torch.device("cpu"), log=lambda *_, **__: None)
    for stage in ("test", "validation"):
        monitor.start(None, module, stage)
        for half in (slice(0, 15), slice(15, None)):
            monitor.see(module, {"original": before[half], "ema": after[half]}, None)
        monitor.finish(None, module, stage)
        if stage == "test":
            assert monitor.values["fid_inception", "ema"] == pytest.approx(float(theirs.compute()), rel=1e-5)
    assert not monitor.values  # a validation does without


def test_inception_that_is_not_at_hand_is_one_line(tmp_path, monkeypatch) -> None:
    with pytest.raises(
        ValueError, match="--quality_monitor.inception. .* could not be loaded .there is no file .*: give the file of"
    ):
        Inception(str(tmp_path / "none.pth")).load()
    file = tmp_path / "weights.pth"
    file.write_bytes(b"nothing of the kind")
    with monkeypatch.context() as patch:
        patch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
        with pytest.raises(
            ValueError, match="--quality_monitor.inception. .*it needs a package: pip install torch-fidelity"
        ):
            Inception(str(file)).load()
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", StandIn)
    with pytest.raises(ValueError, match=r"inception\) .*weights.pth' could not be loaded"):
        Inception(str(file)).load()
