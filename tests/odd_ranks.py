"""Parts that behave differently on one rank, for tests that name them by class path."""

import torch
from torch import Tensor
from typing_extensions import override

from fairness_dft.faces import Faces, WholeFrame


class BlindRank(WholeFrame):
    """Finds no face on the second rank, and everywhere on the first."""

    @override
    def forward(self, images: Tensor) -> Faces:
        faces = super().forward(images)
        seeing = torch.distributed.get_rank() == 0
        return Faces(faces.crops, faces.boxes, faces.mask & seeing)
