"""Out-of-memory errors in one line, with the settings to lower and what each of them saves."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fairness_dft.files import one_line
from fairness_dft.prompts.datamodule import PromptModule
from fairness_dft.training.evaluation import Evaluation
from fairness_dft.training.fairness_loss import FairnessLoss


class MemoryNeeded(ValueError):
    """An out-of-memory error in one line."""


@contextmanager
def in_one_line(advice: str = "let the command work on fewer images at a time, or smaller ones") -> Iterator[None]:
    """Turn an out-of-memory error into one line.

    Args:
        advice: What to do.

    Raises:
        MemoryNeeded: In place of that error.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise MemoryNeeded(needed(error, advice)) from error
        raise


@contextmanager
def telling_what_saves_memory(module: Evaluation, data: PromptModule) -> Iterator[None]:
    """Turn an out-of-memory error into one line with three settings to lower, and what each of them saves.

    Args:
        module: The module that is trained or tested.
        data: Its prompts.

    Raises:
        MemoryNeeded: In place of that error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        evaluating = any(file.endswith("evaluation_loop.py") for file in files)
        if isinstance(module, FairnessLoss) and not evaluating:
            advice = of_training(module, data)
        else:
            advice = of_evaluation(module, data)
        raise MemoryNeeded(needed(error, advice)) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a GPU, or the allocator of the CPU, failed to allocate."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def needed(error: RuntimeError, advice: str) -> str:
    """Return the one line."""
    return f"not enough memory ({one_line(error).partition('. ')[0]}); {advice}"


def of_training(module: FairnessLoss, data: PromptModule) -> str:
    """Return what saves memory in a training step."""
    sampler, images = module.sampler, data.images_per_prompt
    share = max(1, images // module.trainer.world_size)
    at_once = min(sampler.images_at_once or share, share)
    fewer = f"--data.init_args.images_per_prompt (now {images}; half of it halves "
    if not sampler.checkpoint:
        return (
            f"set --model.sampler.checkpoint=true, which keeps the activations of {at_once} images in one step instead "
            f"of those of {share} in all steps, or lower {fewer}all activations; more GPUs do too) or "
            f"--model.sampler.steps (now {sampler.steps}; half of it halves those of the denoising network)"
        )
    if min(sampler.decode_kept, share) >= 2 * sampler.decode_chunk:
        decoding = f"--model.sampler.decode_kept (now {sampler.decode_kept}; half of it halves those of the decoder)"
    else:
        decoding = (
            f"--model.sampler.decode_chunk (now {sampler.decode_chunk}; half of it halves those of the decoder and the "
            "feature networks)"
        )
    return (
        f"lower --model.sampler.images_at_once (now {at_once}; half of it halves the activations of the denoising "
        f"network), {decoding}, or {fewer}latents, images and the classifier's activations; more GPUs do too)"
    )


def of_evaluation(module: Evaluation, data: PromptModule) -> str:
    """Return what saves memory in a validation or test."""
    sampler = module.evaluation_sampler
    testing = module.trainer.state.fn == "test"
    name, images = (
        ("test_images_per_prompt", data.test_images_per_prompt)
        if testing
        else ("validation_images_per_prompt", data.validation_images_per_prompt)
    )
    at_once = sampler.images_at_once or images
    return (
        f"lower --model.evaluation_sampler.images_at_once (now {at_once}; half of it halves what the denoising network "
        f"needs), --model.evaluation_sampler.decode_chunk (now {sampler.decode_chunk}; half of it halves what the "
        f"decoder and the feature networks need), or --data.init_args.{name} (now {images}; half of it halves latents, "
        "images and what the classifier needs)"
    )
