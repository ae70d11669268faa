"""An audit: an evaluation whose images are kept on disk, or were made by others."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from typing_extensions import override

from fairness_dft.adapters.base import Name
from fairness_dft.adapters.external import NoAdapter
from fairness_dft.audits.images import ImageFolder, ImageStore
from fairness_dft.diffusion.any_pipeline import AnyPipeline
from fairness_dft.prompts.batches import PromptBatch
from fairness_dft.prompts.files import Prompt
from fairness_dft.training.evaluation import Evaluation

AT_ONCE = 64  # images that are drawn or read at a time
PICTURED = 12  # images of a prompt in the report


class Audit(Evaluation):
    """An evaluation that keeps its images on disk, or looks at images that others made.

    Attributes:
        source: Where images come from. Without a text-to-image model where they come from an `ImageFolder`.
    """

    source: ImageStore | ImageFolder

    @override
    def check(self) -> None:
        if isinstance(self.source, ImageStore):
            super().check()

    @override
    def load_generator(self) -> None:
        if isinstance(self.source, ImageStore):
            super().load_generator()

    @override
    @torch.no_grad()
    def compare(self, batch: PromptBatch, names: Sequence[Name]) -> dict[str, Tensor]:
        if not isinstance(self.generator, AnyPipeline):
            return super().compare(batch, names)
        steps, scale = self.evaluation_sampler.steps, self.evaluation_sampler.guidance_scale
        drawn: dict[str, Tensor] = {}
        for name in names:
            with self.adapter.using(name):
                drawn[name] = self.generator.draw(batch.prompt.text, batch.seeds, steps, scale)
        return drawn

    @property
    def models(self) -> list[Name]:
        """The models that are audited: `original`, and `ema` with an adapter or a pair of folders."""
        if isinstance(self.source, ImageFolder):
            return cast(list[Name], self.source.models)
        return ["original"] if type(self.adapter) is NoAdapter else ["original", "ema"]

    @override
    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Tensor]:
        if isinstance(self.source, ImageFolder):
            text = self.source.prompts[batch.index]
            return {model: self.source.images(model, text, batch.seeds) for model in self.models}
        return {model: self.draw(model, batch) for model in self.models}

    def draw(self, model: Name, batch: PromptBatch) -> Tensor:
        """Return a model's images of a batch; those that are not on disk are drawn as in the test of a finetuning."""

        def make(seeds: Tensor) -> Tensor:
            return self.compare(replace(batch, seeds=seeds), (model,))[model]

        store = self.source
        assert isinstance(store, ImageStore)
        chunks = torch.split(batch.seeds, AT_ONCE)
        return torch.cat([store.images(model, batch.prompt.text, chunk, make) for chunk in chunks])


class FolderPrompts:
    """Batches of the images of an `ImageFolder`, with their numbers in place of seeds.

    Args:
        folder: The images.
        prompts: Their prompts, in the folder's order.
    """

    def __init__(self, folder: ImageFolder, prompts: Sequence[Prompt]) -> None:
        self.batches = [
            PromptBatch(prompt=prompt, index=index, seeds=numbers)
            for index, (text, prompt) in enumerate(zip(folder.prompts, prompts, strict=True))
            for numbers in torch.split(torch.arange(len(folder.files["original"][text])), AT_ONCE)
        ]
        self.prompt_count = len(folder.prompts)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[PromptBatch]:
        return iter(self.batches)


def first_images(module: Audit, loader: Iterable[PromptBatch]) -> Callable[[int], dict[str, Tensor]]:
    """Return what draws the first images of a prompt, by its index: for each model with shape (n, 3, H, W)."""
    batches = {batch.index: batch for batch in reversed(list(loader))}  # the first of each prompt

    @torch.no_grad()
    def draw(index: int) -> dict[str, Tensor]:
        few = replace(batches[index], seeds=batches[index].seeds[:PICTURED].to(module.device))
        return {model: images.cpu() for model, images in module.test_step(few, index).items()}

    return draw
