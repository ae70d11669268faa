"""How far a set of pictures has moved: Fréchet and kernel distances between embeddings, by torchmetrics.

Between the original model's pictures and another model's, of the same prompts. Both count every change, also the one
that finetuning is for: more women among engineers are a move too.

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

SUBSET = 1000  # pictures of each set in one estimate of the kernel distance


class Given(nn.Module):
    """Takes embeddings where torchmetrics asks for a network that makes them."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.num_features = dimension

    @override
    def forward(self, embeddings: Tensor) -> Tensor:
        """The embeddings themselves."""
        return embeddings


class KernelDistance(KernelInceptionDistance):
    """The kernel distance, of subsets as large as there are pictures for, at most `SUBSET`; the same every time."""

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
    """A list state, which is one tensor where several processes have put theirs together."""
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
        """Embeddings with shape (N, 2048), of images with shape (N, 3, H, W) in [0, 1]."""
        return self.network((images * 255).byte())


class Fidelity(nn.Module):
    """Fréchet (FID) and kernel (KID) distance between two sets of embeddings, over all processes.

    Args:
        dimension: D.
        scale: what embeddings are multiplied by; √D by default, so that the numbers of those of unit length are about
            one. Published FIDs take Inception's as they are, 1.
    """

    def __init__(self, dimension: int, scale: float | None = None) -> None:
        super().__init__()
        self.scale = dimension**0.5 if scale is None else scale
        self.frechet = FrechetInceptionDistance(Given(dimension))
        with warnings.catch_warnings():  # of the memory that embeddings take
            warnings.simplefilter("ignore")
            self.kernel = KernelDistance(Given(dimension), subset_size=SUBSET)

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add embeddings of pictures of both models, each with shape (N, D)."""
        for metric in (self.frechet, self.kernel):
            for embeddings, real in ((before, True), (after, False)):
                metric.update(embeddings.float() * self.scale, real=real)

    def compute(self) -> dict[str, float] | None:
        """Both distances, as "fid" and "kid"; None of fewer than two pictures each."""
        try:
            return {"fid": float(self.frechet.compute()), "kid": float(self.kernel.compute()[0])}
        except RuntimeError as error:
            if "More than one sample" in str(error):
                return None
            raise
