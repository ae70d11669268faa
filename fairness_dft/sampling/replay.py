"""The gradient of detached network calls, without a graph of the sampler: sample first, go back later.

Where the latent z_t is detached before it enters the network, no gradient flows from one network call to another, and
the gradient of a loss L on z_0 is a sum of independent terms,

    dL/dθ = Σ_t w_t dL/dz_0 · ∂ε_t/∂θ,    ε_t = (1 - s) ε(z_t, ∅) + s ε(z_t, c),

each of which needs z_t, t, the conditioning and dL/dz_0, and nothing else. So sampling builds no graph, and the
backward pass calls the network again on whichever rows it likes: of any steps, one branch of guidance after the other,
as many at a time as there is memory for. A branch whose conditioning does not depend on what is learned is left out,
unless the network learns too.

In the code `weight` is w_t = k_t times the factor of the gradient path (for the adjusted gradient, the same number A
for all t), `guidance_scale` is s, and a row is one image at one step in one branch.

References:
    Finetuning Text-to-Image Diffusion Models for Fairness (Shen et al., 2024), section 4.2.
    https://arxiv.org/abs/2311.07604
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairness_dft.diffusion.text_to_image import TextToImage


@dataclass(frozen=True)
class Call:
    """One call of the denoising network while sampling.

    Args:
        latents: The detached latents z_t as they entered the network, with shape (n, C, h, w).
        timestep: The training timestep t, a scalar.
        weight: The weight w_t of its gradient.
    """

    latents: Tensor
    timestep: Tensor
    weight: float


def replayed(
    latents: Tensor,
    calls: Sequence[Call],
    model: TextToImage,
    conditioning: Tensor,
    unconditional: Tensor,
    guidance_scale: float,
    rows: int,
) -> Tensor:
    """Return `latents`, with a gradient that reaches the trained parameters by recomputing `calls`.

    Args:
        latents: The sampled latents z_0, with shape (n, C, h, w), without a graph.
        calls: The network calls that carry gradient.
        model: The model that was called.
        conditioning: The conditioning c, with shape (P, L, D), where P divides n: then the first n / P images share the
            first row, and so on.
        unconditional: The conditioning of the empty prompt, with the same shape.
        guidance_scale: The scale s.
        rows: How many rows the network works on at a time.
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    recompute = RecomputedBackward(calls, model, guidance_scale, rows, _Precision(latents.device.type))
    replay: Tensor = _Replay.apply(  # type: ignore[no-untyped-call]
        latents, recompute, conditioning, unconditional, *learned
    )
    return replay


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        latents: Tensor,
        recompute: "RecomputedBackward",
        conditioning: Tensor,
        unconditional: Tensor,
        *learned: Tensor,
    ) -> Tensor:
        ctx.recompute = recompute
        ctx.save_for_backward(conditioning, unconditional, *learned)
        return latents.view_as(latents)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        conditioning, unconditional, *learned = ctx.saved_tensors
        return None, None, *ctx.recompute(gradient, conditioning, unconditional, learned)


@dataclass(frozen=True)
class RecomputedBackward:
    """Calls the network again, a few rows at a time, when the gradient of z_0 is known."""

    calls: Sequence[Call]
    model: TextToImage
    guidance_scale: float
    rows: int
    precision: "_Precision"

    def __call__(
        self, gradient: Tensor, conditioning: Tensor, unconditional: Tensor, learned: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return the gradients of either branch's conditioning, and of all that is learned, from that of z_0."""
        found: list[Tensor | None] = [None] * (2 + len(learned))
        branches, scales = (conditioning, unconditional), (self.guidance_scale, 1 - self.guidance_scale)
        learns = self.model.denoiser_learns()
        asked = [i for i, branch in enumerate(branches) if scales[i] and (learns or branch.requires_grad)]
        if not asked:
            return found
        leaves = [branch.detach().requires_grad_() for branch in branches]
        latents = torch.stack([call.latents for call in self.calls])
        timesteps = torch.stack([call.timestep for call in self.calls])
        weights = torch.tensor([[call.weight * scale for scale in scales] for call in self.calls], dtype=torch.double)
        weights = weights.view(-1, 2, *[1] * (gradient.ndim - 1)).to(gradient)

        each = len(gradient) // len(conditioning)  # images that a row serves
        every = torch.cartesian_prod(*map(torch.arange, latents.shape[:2])).to(gradient.device)
        for i in asked:  # branch by branch, so that the rows of a call share its prompt
            for part in every.tensor_split(-(-len(every) // self.rows)):
                step, image = part.unbind(1)
                with torch.enable_grad(), self.precision.autocast():
                    rows = leaves[i][image // each if len(leaves[i]) > 1 else slice(None)]
                    prediction = self.model.denoise(latents[step, image], timesteps[step], rows)
                weighted = gradient[image] * weights[step, i]
                values = torch.autograd.grad(prediction, (*leaves, *learned), weighted, allow_unused=True)
                found = [_add(total, value) for total, value in zip(found, values, strict=True)]
        of_branches = [None if value is None else value.to(conditioning.dtype) for value in found[:2]]
        return [*of_branches, *found[2:]]


def _add(total: Tensor | None, value: Tensor | None) -> Tensor | None:
    """Return the sum, in at least single precision, where None is zero."""
    if value is None:
        return total
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    return value if total is None else total + value


class _Precision:
    """The mixed precision in which something is called, to call it again in the same."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.enabled = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, self.enabled)
