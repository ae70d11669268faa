"""Batches: one prompt P with the noise seeds of its N images, reproducible and the same on all ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from fairness_dft.prompts.files import Prompt
from fairness_dft.randomness import Stream, hashed_words

IMAGES = {
    "train": "images_per_prompt",
    "validation": "validation_images_per_prompt",
    "test": "test_images_per_prompt",
}
STREAMS = {"train": Stream.TRAIN, "validation": Stream.VALIDATION, "test": Stream.TEST}


@dataclass(kw_only=True)
class PromptBatch:
    """The input of one step; seeds come last, because Lightning warns about a number after a tensor.

    Attributes:
        prompt: The prompt P, the same on every rank.
        index: The position of the prompt in its split.
        noise_set: The number of this set of seeds in the prompt's noise pool; None for fresh noise.
        seeds: One noise seed for each image of this rank, with shape (N / world size,), int64, non-negative.
    """

    prompt: Prompt
    index: int
    noise_set: int | None = None
    seeds: Tensor

    @property
    def is_repeated(self) -> bool:
        """Whether this prompt comes with these seeds again, so that it pays to cache the base model's images."""
        return self.noise_set is not None


def noise_seeds(seed: int, split: str, epoch: int, position: int, count: int) -> Tensor:
    """Hash a place in the run into the noise seeds of its images.

    Args:
        seed: Seed of the run, non-negative.
        split: "train", "validation" or "test"; no two of them share a stream.
        epoch: Epoch e; 0 in evaluation.
        position: Position k of the batch in its epoch.
        count: Number N of images; the first seeds do not depend on it.

    Returns:
        The seeds s_1, ..., s_N, with shape (N,), int64, in [0, 2^63).
    """
    words = hashed_words(seed, (STREAMS[split], epoch, position), count)
    return torch.from_numpy((words >> np.uint64(1)).astype(np.int64))


class PromptLoader:
    """Yield one `PromptBatch` per prompt, in a fixed order and with fixed seeds.

    This is a plain iterable and not a `DataLoader`: Lightning would add a distributed sampler to a `DataLoader` and
    warn about its missing workers, although there is nothing to load.

    Args:
        prompts: Prompts of the split.
        split: "train", "validation" or "test".
        seed: Seed of the run.
        images_per_prompt: Number N of images, over all ranks.
        rank: Index of this process.
        world_size: Number of processes; N must be a multiple of it.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        split: str,
        seed: int,
        images_per_prompt: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.prompts = prompts
        self.split = split
        self.seed = seed
        self.images_per_prompt = images_per_prompt
        self.rank = rank
        self.world_size = world_size
        check_divides(split, images_per_prompt, world_size)

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[PromptBatch]:
        for index in range(len(self.prompts)):
            yield self.batch(epoch=0, position=index, index=index)

    def batch(self, epoch: int, position: int, index: int) -> PromptBatch:
        """Return this rank's part of the batch with prompt `index` at `position` k of `epoch` e."""
        seeds = noise_seeds(self.seed, self.split, epoch, position, self.images_per_prompt)
        seeds = seeds.view(self.world_size, -1)[self.rank].clone()
        return PromptBatch(prompt=self.prompts[index], index=index, seeds=seeds)


class TrainingPromptLoader(PromptLoader):
    """Yield the training prompts in a new order every epoch, with fresh seeds or seeds from a pool.

    The batches are one endless stream, and each iteration takes the next `len(self)` batches. If an epoch ends early,
    because of `limit_train_batches` or an interruption, the next epoch continues from there.

    Args:
        repeats: Number of times that each prompt comes in an epoch.
        start: Number of batches of the stream that were trained on before.
        prompts: Training prompts.
        noise_pool: Number of sets of N seeds that each prompt has; each batch draws one set. None for fresh seeds in
            every batch.
        **loader: Remaining arguments of `PromptLoader`.
    """

    def __init__(
        self,
        repeats: Sequence[int],
        start: int,
        prompts: Sequence[Prompt],
        noise_pool: int | None = None,
        **loader: Any,
    ) -> None:
        super().__init__(prompts, "train", **loader)
        self.noise_pool = noise_pool
        self.slots: NDArray[np.int64] = np.repeat(np.arange(len(prompts)), repeats)
        self.next_batch = start

    @override
    def __len__(self) -> int:
        return len(self.slots)

    @override
    def __iter__(self) -> Iterator[PromptBatch]:
        for _ in range(len(self)):
            epoch, position = divmod(self.next_batch, len(self))
            self.next_batch += 1
            yield self.batch(epoch, position, index=int(self.order(epoch)[position]))

    @override
    def batch(self, epoch: int, position: int, index: int) -> PromptBatch:
        if self.noise_pool is None:
            return super().batch(epoch, position, index)
        chosen = int(hashed_words(self.seed, (Stream.NOISE_POOL, epoch, position), 1)[0] % self.noise_pool)
        return replace(super().batch(epoch=chosen, position=index, index=index), noise_set=chosen)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return π_e, the prompt index at every position of an epoch, with shape (len(self),)."""
        return self.slots[np.argsort(hashed_words(self.seed, (Stream.ORDER, epoch), len(self)), kind="stable")]

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: the method only shows Lightning that the loader can resume in mid-epoch.

        The data module starts the loader at the trainer's own count. A position stored here would be one too far in
        the checkpoint of an exception in mid-batch, and Lightning would not load it from a checkpoint of the end of
        an epoch.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore the empty state."""


def check_divides(split: str, images: int, world_size: int) -> None:
    """Check that a number of images divides evenly among the ranks.

    Raises:
        ValueError: If it does not.
    """
    if images % world_size:
        below = images - images % world_size
        nearest = " or ".join(str(count) for count in (below, below + world_size) if count)
        raise ValueError(
            f"{IMAGES[split]} counts the images of all {world_size} processes together and must be"
            f" a multiple of {world_size}, but is {images}; the nearest: {nearest}"
        )
