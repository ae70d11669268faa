"""Distance between two sets of images: Fréchet and kernel distances between embeddings, by torchmetrics.

The sets are the images of the base model and of another model for the same prompts. Both distances count every change,
also the wanted one: more women among engineers are a change too.

References:
    GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), on FID, https://arxiv.org/abs/1706.08500
    Demystifying MMD GANs (Bińkowski et al., 2018), on KID, https://arxiv.org/abs/1801.01401
    Exposing flaws of generative model evaluation metrics (Stein et al., 2023), on DINOv2 in place of Inception,
    https://arxiv.org/abs/2306.04675
"""

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from typing_extensions import override

from fairness_dft.files import Location
from fairness_dft.networks.frozen import FrozenNetwork

SUBSET = 1000  # images of each set in one estimate of the kernel distance


class Given(nn.Module):
    """Passes embeddings through, where torchmetrics asks for a network that computes them."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.num_features = dimension

    @override
    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the embeddings themselves."""
        return embeddings


class KernelDistance(KernelInceptionDistance):
    """Kernel distance with subsets of all images, at most `SUBSET`, and with a fixed seed."""

    @override
    def compute(self) -> tuple[Tensor, Tensor]:
        sizes = [
            sum(len(part) for part in parts) for parts in (as_list(self.real_features), as_list(self.fake_features))
        ]
        self.subset_size = min(SUBSET, *sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return super().compute()


def as_list(state: list[Tensor] | Tensor) -> list[Tensor]:
    """Return a list state, which is one tensor once several processes have gathered it."""
    return [state] if isinstance(state, Tensor) else state


class Inception(FrozenNetwork):
    """Inception-v3 with the weights of published FIDs.

    It is torch-fidelity's, which this project does not require: `pip install torch-fidelity`.

    Args:
        path: The file of its weights, `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity's releases.
    """

    what = "Inception network (--quality_monitor.inception)"
    allowed = "the file of Inception's weights from torch-fidelity's releases"
    way_out = "leave it out"
    single_file = True
    local_only = True

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    @override
    def _load(self, location: Location) -> None:
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(location.file()))
        except ModuleNotFoundError as error:
            raise ValueError("it needs a package: pip install torch-fidelity") from error

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings with shape (N, 2048) of images with shape (N, 3, H, W), in [0, 1]."""
        embeddings: Tensor = self.network((images * 255).byte())
        return embeddings


class Fidelity(nn.Module):
    """Fréchet (FID) and kernel (KID) distance between two sets of embeddings, over all processes.

    Args:
        dimension: Dimension D of the embeddings.
        scale: Factor of the embeddings; √D by default, so that the entries of those of unit length are about one.
            Published FIDs use Inception's embeddings as they are, with a factor of 1.

    Example:
        >>> fidelity, embeddings = Fidelity(dimension=2), torch.eye(2)
        >>> fidelity.update(embeddings, embeddings)
        >>> abs(fidelity.compute()["fid"]) < 1e-3
        True
    """

    def __init__(self, dimension: int, scale: float | None = None) -> None:
        super().__init__()
        self.scale = dimension**0.5 if scale is None else scale
        self.frechet = FrechetInceptionDistance(Given(dimension))
        with warnings.catch_warnings():  # about the memory that embeddings take
            warnings.simplefilter("ignore")
            self.kernel = KernelDistance(Given(dimension), subset_size=SUBSET)

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add embeddings of images of both models, each with shape (N, D)."""
        for metric in (self.frechet, self.kernel):
            for embeddings, real in ((before, True), (after, False)):
                metric.update(embeddings.float() * self.scale, real=real)

    def compute(self) -> dict[str, float] | None:
        """Return both distances as "fid" and "kid"; None with fewer than two images of each model."""
        try:
            return {"fid": float(self.frechet.compute()), "kid": float(self.kernel.compute()[0])}
        except RuntimeError as error:
            if "More than one sample" in str(error):
                return None
            raise
