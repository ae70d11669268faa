"""Parts that behave differently on one rank, for tests that name them by class path."""

import torch
from torch import Tensor
from typing_extensions import override

from fairness_dft.faces.crops import ALIGNED_LANDMARKS, ALIGNED_SIZE
from fairness_dft.faces.finders import Faces, WholeFrame


class BlindRank(WholeFrame):
    """Finds no face on the second rank, and on the first one in every image, which it fills."""

    finds_landmarks = True

    @override
    def forward(self, images: Tensor) -> Faces:
        faces = super().forward(images)
        seeing = torch.distributed.get_rank() == 0
        landmarks = images.new_tensor(ALIGNED_LANDMARKS) * (images.shape[-1] / ALIGNED_SIZE)
        return Faces(faces.crops, faces.boxes, faces.has_face & seeing, landmarks.expand(len(images), 5, 2))
