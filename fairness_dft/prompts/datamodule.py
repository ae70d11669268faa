"""Prompts and noise: batch k of epoch e is (P, s_1, ..., s_N), P = P_π_e(k), s_i = h(seed, split, e, k, i).

One step of the method samples N images of one prompt P, because a target distribution has a meaning only over several
images of the same prompt. N is `images_per_prompt`, over all ranks together; π_e (`order`) is a permutation that
depends on seed and epoch alone; h (`noise_seeds`) is a counter-based hash, so that any batch can be computed without
the batches before it. Every rank sees the same prompt and takes its contiguous slice of the seeds.

References:
    Finetuning Text-to-Image Diffusion Models for Fairness (Shen et al., 2024). https://arxiv.org/abs/2311.07604
"""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from typing_extensions import override

from fairness_dft.files import resolve
from fairness_dft.prompts.batches import IMAGES, PromptLoader, TrainingPromptLoader, check_divides
from fairness_dft.prompts.files import SPLITS, Prompt, PromptList, lines, normalize

PAPER_FILES = [
    f"data/prompts/{name}.json" for name in ("occupations", "occupations_in_context", "descriptors", "sports")
]
PAPER_WEIGHTS = [1, 6, 20, 4]


class PromptModule(LightningDataModule):
    """Prompts from files; each batch is one prompt with N noise seeds, and the same seed gives the same batches.

    Args:
        files: Prompt files, JSON or plain text, relative to the current directory or to the repository. Only one of
            several files needs prompts for validation and test.
        weights: Number of times that the training prompts of each file come in an epoch, one number per file; 1 by
            default.
        images_per_prompt: Images per prompt in a training step, over all processes together.
        validation_images_per_prompt: Images per validation prompt, over all processes together.
        test_images_per_prompt: Images per test prompt, over all processes together.
        train_prompts: Number of training prompts to use from each file; all by default.
        validation_prompts: Number of validation prompts to use from each file; all by default.
        test_prompts: Number of test prompts to use from each file; all by default.
        train_subjects: Plain text file with the subjects to train on, one per line. Training prompts about other
            subjects are left out; validation and test stay the same.
        noise_pool: Number of sets of N noise seeds for each training prompt. With a pool, training repeats the same
            noise and classifies the base model's images only once, but it may overfit to a small pool and become less
            fair on fresh noise. By default, every step has fresh noise.
        seed: Seed of the order of the prompts and of the noise.

    Attributes:
        tested: The split that is tested; an audit may choose another one than "test". The number of images per prompt
            is always that of a test.

    Raises:
        ValueError: If a file is malformed or a number is out of range.

    Example:
        >>> data = PromptModule(["data/prompts/sports.json"], images_per_prompt=4, seed=0)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.seeds.shape
        torch.Size([4])
        >>> batch.prompt == data.prompts("train")[batch.index]
        True
    """

    def __init__(
        self,
        files: list[str],
        weights: list[int] | None = None,
        images_per_prompt: int = 24,
        validation_images_per_prompt: int = 24,
        test_images_per_prompt: int = 60,
        train_prompts: int | None = None,
        validation_prompts: int | None = None,
        test_prompts: int | None = None,
        train_subjects: str | None = None,
        noise_pool: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.noise_pool = noise_pool
        self.images_per_prompt = images_per_prompt
        self.validation_images_per_prompt = validation_images_per_prompt
        self.test_images_per_prompt = test_images_per_prompt
        self.limits = {"train": train_prompts, "validation": validation_prompts, "test": test_prompts}
        self.weights = [1] * len(files) if weights is None else weights
        self.seed = seed
        self.tested = "test"
        _check_at_least(0, seed=seed)
        _check_at_least(1, noise_pool=noise_pool)
        _check_at_least(1, **{name: getattr(self, name) for name in IMAGES.values()})
        _check_at_least(1, **{f"{split}_prompts": count for split, count in self.limits.items()})
        _check_at_least(1, files=len(files), weights=min(self.weights, default=1))
        if len(self.weights) != len(files):
            raise ValueError(f"weights must be one number per file, but {len(files)} files have {len(self.weights)}")
        self.lists = [PromptList.from_file(file) for file in files]
        self.train_subjects = train_subjects and resolve(train_subjects)
        self._subjects = {normalize(line) for line in lines(self.train_subjects)} if self.train_subjects else None

    def prompts(self, split: str) -> list[Prompt]:
        """Return the prompts of a split, file after file; `PromptBatch.index` counts them in this order.

        Args:
            split: "train", "validation" or "test".

        Raises:
            ValueError: If no file has this split, a file has no training prompts, or `train_subjects` leaves no prompt.
        """
        return [prompt for prompt, _ in self._weighted(split)]

    def _weighted(self, split: str) -> list[tuple[Prompt, int]]:
        pairs: list[tuple[Prompt, int]] = []
        needed = split == "train" or all(split not in prompt_list.splits for prompt_list in self.lists)
        for prompt_list, weight in zip(self.lists, self.weights, strict=True):
            if split not in prompt_list.splits and not needed:
                continue  # other files have this split
            chosen = [prompt for prompt in prompt_list.split(split) if self._keeps(prompt, split)]
            pairs += [(prompt, weight) for prompt in chosen[: self.limits[split]]]
        if not pairs:
            paths = ", ".join(str(prompt_list.path) for prompt_list in self.lists)
            raise ValueError(
                f"{self.train_subjects}: names no training subject of {paths}; give a file with one of them per line,"
                " or --data.init_args.train_subjects null to train on all of them"
            )
        return pairs

    def _keeps(self, prompt: Prompt, split: str) -> bool:
        return split != "train" or self._subjects is None or normalize(prompt.subject) in self._subjects

    def check(self, splits: Sequence[str], processes: int) -> None:
        """Check before a run what would otherwise end it in the middle; this changes nothing.

        Args:
            splits: Splits that the run uses.
            processes: Number of processes that share the images of a prompt.

        Raises:
            ValueError: If a split is missing, or a number of images does not divide evenly among the processes.
        """
        for split in splits:
            self.prompts(split)
            counted = "test" if split == self.tested else split
            check_divides(counted, getattr(self, IMAGES[counted]), processes)

    @override
    def setup(self, stage: str) -> None:
        """Check that the numbers of images divide evenly among the processes, before anything runs.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        used = {"fit": SPLITS[:2], "validate": SPLITS[1:2], "test": SPLITS[2:]}
        for split in used.get(stage, ()):
            check_divides(split, getattr(self, IMAGES[split]), self.trainer.world_size if self.trainer else 1)

    @override
    def train_dataloader(self) -> TrainingPromptLoader:
        """Return the training prompts from the trainer's current batch on: 0, or where it was interrupted."""
        prompts, repeats = zip(*self._weighted("train"), strict=True)
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total if self.trainer else None
        start = total.processed if self.trainer else 0
        return TrainingPromptLoader(repeats, start, prompts, self.noise_pool, **self._loader_settings("train"))

    @override
    def val_dataloader(self) -> PromptLoader:
        """Return the validation prompts."""
        return PromptLoader(self.prompts("validation"), "validation", **self._loader_settings("validation"))

    @override
    def test_dataloader(self) -> PromptLoader:
        """Return the prompts of the split `tested`."""
        return PromptLoader(self.prompts(self.tested), "test", **self._loader_settings("test"))

    def _loader_settings(self, split: str) -> dict[str, int]:
        settings = {"seed": self.seed, "images_per_prompt": getattr(self, IMAGES[split])}
        if self.trainer:
            settings |= {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        return settings


def _check_at_least(least: int, **numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < least:
            raise ValueError(f"{name} must be at least {least}, but is {number}")


class OccupationPrompts(PromptModule):
    """Portraits of occupations: 948 for training, and the 10 validation and 50 test occupations of the paper.

    Args:
        file: Prompt file, JSON or plain text.
        **kwargs: Arguments of `PromptModule`.

    Example:
        >>> data = OccupationPrompts(test_images_per_prompt=2)
        >>> batches = list(data.test_dataloader())
        >>> len(batches), batches[2].prompt.text
        (50, 'A photo of the face of a ticket taker, a person')
    """

    def __init__(self, file: str = "data/prompts/occupations.json", **kwargs: Any) -> None:
        super().__init__(files=[file], weights=[1], **kwargs)


class SportPrompts(PromptModule):
    """Portraits of people who do a sport.

    Args:
        file: Prompt file, JSON or plain text.
        **kwargs: Arguments of `PromptModule`.

    Example:
        >>> [prompt.concept for prompt in SportPrompts(test_prompts=1).prompts("test")]
        ['sport']
    """

    def __init__(self, file: str = "data/prompts/sports.json", **kwargs: Any) -> None:
        super().__init__(files=[file], weights=[1], **kwargs)


class DescriptorPrompts(PromptModule):
    """Portraits of people who are described by an adjective.

    Args:
        file: Prompt file, JSON or plain text.
        **kwargs: Arguments of `PromptModule`.

    Example:
        >>> [prompt.concept for prompt in DescriptorPrompts(test_prompts=1).prompts("test")]
        ['descriptor']
    """

    def __init__(self, file: str = "data/prompts/descriptors.json", **kwargs: Any) -> None:
        super().__init__(files=[file], weights=[1], **kwargs)


class MixedPrompts(PromptModule):
    """Several concepts in one run: by default the four of the paper, with weights that make them equally frequent.

    Args:
        files: Prompt files, JSON or plain text.
        weights: Number of times that the training prompts of each file come in an epoch, one number per file.
        **kwargs: Arguments of `PromptModule`.

    Example:
        >>> [prompt.concept for prompt in MixedPrompts(test_prompts=1).prompts("test")]
        ['occupation', 'occupation in context', 'descriptor', 'sport']
    """

    def __init__(self, files: list[str] = PAPER_FILES, weights: list[int] = PAPER_WEIGHTS, **kwargs: Any) -> None:
        super().__init__(files=files, weights=weights, **kwargs)
