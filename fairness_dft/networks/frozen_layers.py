"""Layers of a frozen network that keep less for the backward pass than PyTorch's, and compute the same.

A convolution y = W ∗ x + b needs x in its backward pass for the gradient of W alone, but PyTorch keeps x even where W
is frozen. Of a normalisation that SiLU follows, y = silu(norm(x)), it keeps x and norm(x), of which x suffices: norm(x)
is computed again, but within `keeping_activations`. Of the decoder's activations, which are at full resolution, this
leaves less than a third. Convolutions have first derivatives only.

In the code x is `inputs`.

References:
    Lowering PyTorch's Memory Consumption for Selective Differentiation (Bhatia and Dangel, 2024).
    https://arxiv.org/abs/2404.12406
    Autodiff stores inputs of convolution layers with non-trainable weight. https://github.com/pytorch/pytorch/issues/133566
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint
from typing_extensions import override


class FrozenConv2d(nn.Conv2d):
    """A convolution that does not keep its inputs where its weight is frozen."""

    @override
    def _conv_forward(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        simple = inputs.ndim == 4 and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if not simple or not _frozen(inputs, weight, bias):
            return super()._conv_forward(inputs, weight, bias)
        return _Convolution.apply(inputs, weight, bias, (self.stride, self.padding, self.dilation, self.groups))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = inputs.shape, settings
        return nn.functional.conv2d(inputs, weight, bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        weight = weight.to(gradient.dtype)  # under autocast they differ
        return nn.grad.conv2d_input(ctx.shape, weight, gradient, *ctx.settings), None, None, None


_KEEPING: ContextVar[bool] = ContextVar("keeping", default=False)


@contextmanager
def keeping_activations() -> Iterator[None]:
    """Within, layers keep whatever saves them a computation in the backward pass; it counts where they are called."""
    token = _KEEPING.set(True)
    try:
        yield
    finally:
        _KEEPING.reset(token)


class GroupNormSiLU(nn.GroupNorm):
    """A group normalisation and SiLU, of which only the inputs are kept."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Computes silu(norm(x)), of x with shape (B, C, ...)."""
        if _KEEPING.get() or not (torch.is_grad_enabled() and inputs.requires_grad):
            return self.both(inputs)
        return checkpoint(self.both, inputs, use_reentrant=False, preserve_rng_state=False)

    def both(self, inputs: Tensor) -> Tensor:
        """Computes the same, and keeps norm(x) too."""
        return silu(super().forward(inputs))


def forget_inputs(network: nn.Module) -> None:
    """Replaces the convolutions of a network by those that do not keep their inputs where they are frozen.

    Args:
        network: Any network.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = FrozenConv2d


def join_activations(vae: nn.Module) -> None:
    """Joins normalisations with the activations that follow them; parameters keep their names.

    Args:
        vae: An `AutoencoderKL`; with another activation than SiLU, or another normalisation, it stays as it is.
    """
    from diffusers.models.resnet import ResnetBlock2D

    blocks = [module for module in vae.modules() if isinstance(module, ResnetBlock2D)]
    found = [(block, "nonlinearity", [block.norm1, block.norm2]) for block in blocks]
    found += [(part, "conv_act", [part.conv_norm_out]) for part in (vae.encoder, vae.decoder)]
    for module, activation, norms in found:
        if type(getattr(module, activation)) is nn.SiLU and {type(norm) for norm in norms} == {nn.GroupNorm}:
            setattr(module, activation, nn.Identity())
            for norm in norms:
                norm.__class__ = GroupNormSiLU


def _frozen(inputs: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the backward pass leads to the inputs alone."""
    learned = any(parameter is not None and parameter.requires_grad for parameter in parameters)
    return torch.is_grad_enabled() and inputs.requires_grad and not learned
