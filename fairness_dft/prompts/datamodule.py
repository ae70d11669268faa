"""Prompts and noise: batch k of epoch e is (P, s_1, ..., s_N), P = P_π_e(k), s_i = h(seed, split, e, k, i).

One step of the method samples N images of one prompt P, because a target distribution means something only
over several images of the same prompt. N is `images_per_prompt`, over all ranks together; π_e (`order`) is a
permutation that depends on seed and epoch alone; h (`noise_seeds`) is a counter-based hash, so that any batch
can be made again without those before it. Every rank sees the same prompt and takes its contiguous slice of
the seeds.

"Finetuning Text-to-Image Diffusion Models for Fairness", Shen, Du, Pang, Lin, Wong and Kankanhalli, 2024,
https://arxiv.org/abs/2311.07604
"""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from typing_extensions import override

from fairness_dft.files import resolve
from fairness_dft.prompts.batches import IMAGES, PromptLoader, TrainingPromptLoader, check_divides
from fairness_dft.prompts.files import SPLITS, Prompt, PromptList, lines, normalise

PAPER_FILES = [
    f"data/prompts/{name}.json" for name in ("occupations", "occupations_in_context", "descriptors", "sports")
]
PAPER_WEIGHTS = [1, 6, 20, 4]


class PromptModule(LightningDataModule):
    """Prompts from files; a batch is one prompt with N noise seeds, the same on every run with the same seed.

    Args:
        files: prompt files, JSON or plain text, relative to the current directory or to the repository; of several, not
            all need prompts for validation or test.
        weights: how many times the training prompts of each file come in an epoch, one number a file; once
            if left out.
        images_per_prompt: images of a prompt in a training step, over all processes together.
        validation_images_per_prompt: images of a validation prompt, over all processes together.
        test_images_per_prompt: images of a test prompt, over all processes together.
        train_prompts: only the first so many training prompts of each file.
        validation_prompts: only the first so many validation prompts of each file.
        test_prompts: only the first so many test prompts of each file.
        train_subjects: plain text file with the subjects to train on, one a line; training prompts about
            anything else are left out, validation and test are not changed.
        noise_pool: how many sets of N noises each training prompt has. Training then meets the same noise
            again, and the original's images are judged only once; but a small pool is remembered, so that
            fresh noise stays less fair. Fresh noise in every step if left out.
        seed: what the order of the prompts and the noise are derived from.

    Attributes:
        tested: the split that is tested, another than "test" for an audit; with as many images of a prompt as a test.

    Raises:
        ValueError: if a file is malformed or a number out of range.
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
            raise ValueError(f"weights must be one number a file, but {len(files)} files have {len(self.weights)}")
        self.lists = [PromptList.from_file(file) for file in files]
        self.train_subjects = train_subjects and resolve(train_subjects)
        self.kept = {normalise(line) for line in lines(self.train_subjects)} if self.train_subjects else None

    def prompts(self, split: str) -> list[Prompt]:
        """Returns the prompts of a split, file after file; `PromptBatch.index` counts them in this order.

        Args:
            split: "train", "validation" or "test".

        Raises:
            ValueError: if no file has such a split, or one has none to train on, or `train_subjects` leaves no prompt.
        """
        return [prompt for prompt, _ in self._weighted(split)]

    def _weighted(self, split: str) -> list[tuple[Prompt, int]]:
        pairs: list[tuple[Prompt, int]] = []
        needed = split == "train" or all(split not in prompt_list.splits for prompt_list in self.lists)
        for prompt_list, weight in zip(self.lists, self.weights, strict=True):
            if split not in prompt_list.splits and not needed:
                continue  # the others' will do
            chosen = [prompt for prompt in prompt_list.split(split) if self._keeps(prompt, split)]
            pairs += [(prompt, weight) for prompt in chosen[: self.limits[split]]]
        if not pairs:
            paths = ", ".join(str(prompt_list.path) for prompt_list in self.lists)
            raise ValueError(
                f"{self.train_subjects}: names no training subject of {paths}; to train on all of them,"
                " give --data.init_args.train_subjects null, or else a file with one subject a line"
            )
        return pairs

    def _keeps(self, prompt: Prompt, split: str) -> bool:
        return split != "train" or self.kept is None or normalise(prompt.subject) in self.kept

    def check(self, splits: Sequence[str], processes: int) -> None:
        """Refuses at once what would otherwise end a run in the middle.

        Args:
            splits: those that the run will use.
            processes: how many of them share the images of a prompt.

        Raises:
            ValueError: if one of the splits is lacking, or a number of images does not divide.
        """
        for split in splits:
            self.prompts(split)
            counted = "test" if split == self.tested else split
            check_divides(counted, getattr(self, IMAGES[counted]), processes)

    @override
    def setup(self, stage: str) -> None:
        """Refuses numbers of images that do not divide by the number of processes, before anything runs.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        used = {"fit": SPLITS[:2], "validate": SPLITS[1:2], "test": SPLITS[2:]}
        for split in used.get(stage, ()):
            check_divides(split, getattr(self, IMAGES[split]), self.trainer.world_size if self.trainer else 1)

    @override
    def train_dataloader(self) -> TrainingPromptLoader:
        """Returns the training prompts from where the trainer stands: 0, or where it was interrupted."""
        prompts, repeats = zip(*self._weighted("train"), strict=True)
        start = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed if self.trainer else 0
        return TrainingPromptLoader(repeats, start, prompts, self.noise_pool, **self._loader_settings("train"))

    @override
    def val_dataloader(self) -> PromptLoader:
        """Returns the validation prompts."""
        return PromptLoader(self.prompts("validation"), "validation", **self._loader_settings("validation"))

    @override
    def test_dataloader(self) -> PromptLoader:
        """Returns the prompts of the split `tested`."""
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
    """Occupations: 948 to train on, and the 10 validation and 50 test occupations of the paper.

    Args:
        file: prompt file, JSON or plain text.
    """

    def __init__(self, file: str = "data/prompts/occupations.json", **kwargs: Any) -> None:
        super().__init__(files=[file], weights=[1], **kwargs)


class SportPrompts(PromptModule):
    """People doing a sport.

    Args:
        file: prompt file, JSON or plain text.
    """

    def __init__(self, file: str = "data/prompts/sports.json", **kwargs: Any) -> None:
        super().__init__(files=[file], weights=[1], **kwargs)


class DescriptorPrompts(PromptModule):
    """People described by an adjective.

    Args:
        file: prompt file, JSON or plain text.
    """

    def __init__(self, file: str = "data/prompts/descriptors.json", **kwargs: Any) -> None:
        super().__init__(files=[file], weights=[1], **kwargs)


class MixedPrompts(PromptModule):
    """Several concepts in one run, by default the paper's four, weighted to come about equally often.

    Args:
        files: prompt files, JSON or plain text.
        weights: how many times the training prompts of each file come in an epoch, one number a file.
    """

    def __init__(self, files: list[str] = PAPER_FILES, weights: list[int] = PAPER_WEIGHTS, **kwargs: Any) -> None:
        super().__init__(files=files, weights=weights, **kwargs)
