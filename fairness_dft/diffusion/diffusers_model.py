"""What models that diffusers loads share: schedulers, precision and the error when loading fails."""

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from fairness_dft.files import resolve


def native_precision(network: Any) -> AbstractContextManager:
    """Within, a network that is frozen in half precision computes in it.

    Autocast would change its tensors to single precision and back around each normalisation, which takes time and
    memory and gains nothing where weights are rounded already. Learned weights, which are in single precision, need it.
    """
    if weight_dtype(network) not in (torch.float16, torch.bfloat16) or has_trained_weights(network):
        return nullcontext()
    return torch.autocast(next(network.parameters()).device.type, enabled=False)


def weight_dtype(network: nn.Module) -> torch.dtype:
    """The data type of its weights, without a walk through all modules, which diffusers' own `dtype` takes."""
    return next(network.parameters()).dtype


def has_trained_weights(network: nn.Module) -> bool:
    """Return whether any weight of a network is trained."""
    return any(parameter.requires_grad for parameter in network.parameters())


def find_scheduler(name: str) -> Any:
    """Returns the diffusers scheduler class of that name.

    Raises:
        ValueError: If there is none.
    """
    import diffusers

    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        usual = "DPMSolverMultistepScheduler, DDIMScheduler or EulerDiscreteScheduler"
        raise ValueError(f"`scheduler` must be the name of a diffusers scheduler, such as {usual}, but got {name!r}")
    return found


def loading_error(path: str, reason: str) -> str:
    """Says in one line which model could not be loaded, why, and how to go on."""
    reason = (reason.strip() or "unknown reason").splitlines()[0].rstrip(".")
    local = resolve(path).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path)
    download = "" if local else f"Download it where there is a network (`hf download {path}`), or give"
    return (
        f"Could not load the text-to-image model {path!r} ({reason}). "
        f"{download or 'Give'} a local folder in the layout of Stable Diffusion "
        "(--model.generator.init_args.path FOLDER), or run on the miniature that ships with this repository "
        "(--config experiments/parts/portraits.yaml)."
    )
