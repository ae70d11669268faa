"""Layers of a frozen network that save less for the backward pass than PyTorch's, and compute the same.

A convolution y = W ∗ x + b needs x in its backward pass only for the gradient of W, but PyTorch saves x even if W is
frozen. For a normalization followed by SiLU, y = silu(norm(x)), it saves x and norm(x), although x is enough: these
layers recompute norm(x), except within `keeping_activations`. This saves more than two thirds of the decoder's
activations, which have full resolution. The convolutions have first derivatives only.

In the code x is `inputs`.

References:
    Lowering PyTorch's Memory Consumption for Selective Differentiation (Bhatia and Dangel, 2024).
    https://arxiv.org/abs/2404.12406
    Autodiff stores inputs of convolution layers with non-trainable weight. https://github.com/pytorch/pytorch/issues/133566
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint
from typing_extensions import override


class FrozenConv2d(nn.Conv2d):
    """A convolution that does not save its inputs for the backward pass if its weight is frozen."""

    @override
    def _conv_forward(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        simple = inputs.ndim == 4 and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if not simple or not _frozen(inputs, weight, bias):
            return cast(Tensor, super()._conv_forward(inputs, weight, bias))
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return cast(Tensor, _Convolution.apply(inputs, weight, bias, settings))  # type: ignore[no-untyped-call]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = inputs.shape, settings
        return nn.functional.conv2d(inputs, weight, bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        weight = weight.to(gradient.dtype)  # under autocast they differ
        of_inputs = nn.grad.conv2d_input(ctx.shape, weight, gradient, *ctx.settings)  # type: ignore[attr-defined]
        return of_inputs, None, None, None


_KEEPING: ContextVar[bool] = ContextVar("keeping", default=False)


@contextmanager
def keeping_activations() -> Iterator[None]:
    """Let layers called in this context save activations instead of recomputing them in the backward pass."""
    token = _KEEPING.set(True)
    try:
        yield
    finally:
        _KEEPING.reset(token)


class GroupNormSiLU(nn.GroupNorm):
    """A group normalization with SiLU, which saves only its inputs for the backward pass."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Return silu(norm(x)), for x with shape (B, C, ...)."""
        if _KEEPING.get() or not (torch.is_grad_enabled() and inputs.requires_grad):
            return self.both(inputs)
        return cast(Tensor, checkpoint(self.both, inputs, use_reentrant=False, preserve_rng_state=False))

    def both(self, inputs: Tensor) -> Tensor:
        """Return the same, and save norm(x) too."""
        return silu(super().forward(inputs))


def forget_inputs(network: nn.Module) -> None:
    """Replace the convolutions of a network by `FrozenConv2d`, in place.

    Args:
        network: Any network.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = FrozenConv2d


def join_activations(vae: nn.Module) -> None:
    """Join normalizations with the activations that follow them, in place; parameters keep their names.

    Args:
        vae: An `AutoencoderKL`; blocks with another activation or normalization stay unchanged.
    """
    from diffusers.models.resnet import ResnetBlock2D

    blocks = [module for module in vae.modules() if isinstance(module, ResnetBlock2D)]
    pairs: list[tuple[nn.Module, str, list[Any]]] = [
        (block, "nonlinearity", [block.norm1, block.norm2]) for block in blocks
    ]
    coders = (cast(nn.Module, vae.encoder), cast(nn.Module, vae.decoder))
    pairs += [(part, "conv_act", [part.conv_norm_out]) for part in coders]
    for module, activation, norms in pairs:
        if type(getattr(module, activation)) is nn.SiLU and {type(norm) for norm in norms} == {nn.GroupNorm}:
            setattr(module, activation, nn.Identity())
            for norm in norms:
                norm.__class__ = GroupNormSiLU


def _frozen(inputs: Tensor, *parameters: Tensor | None) -> bool:
    """Return whether only the inputs need a gradient."""
    learned = any(parameter is not None and parameter.requires_grad for parameter in parameters)
    return torch.is_grad_enabled() and inputs.requires_grad and not learned
