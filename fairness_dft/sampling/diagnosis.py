"""How the gradient behaves: step by step (Fig. 1b of the paper), and batch by batch for other gradient paths.

Of a sampler's noise predictions z_0 is a linear function, z_0 = a z_T + Σ_t k_t ε_t. With a random matrix R in place of
the loss's gradient at z_0, the part of step t in the gradient of θ is

    exact       R · k_t B_t ∂ε_t/∂θ        through the later network calls, which B_t stands for
    detached    R · k_t ∂ε_t/∂θ            B_t = I
    bare        R · ∂ε_t/∂θ                and without the solver's weight

The paper finds that the first explodes towards t = T.

References:
    Finetuning Text-to-Image Diffusion Models for Fairness (Shen et al., 2024), section 4.2 and figure 1b.
    https://arxiv.org/abs/2311.07604
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairness_dft.adapters.base import Adapter
from fairness_dft.diffusion.text_to_image import TextToImage
from fairness_dft.sampling.gradients import GradientPath, solver_coefficients
from fairness_dft.sampling.sampler import checkpointed, noise_sources

DEVIATION = 1e-2  # of R, whose entries the paper draws from N(0, 1e-4)


@dataclass(frozen=True)
class StepGradient:
    """The part of one sampling step in the gradient of θ.

    Attributes:
        timestep: t, in training timesteps.
        coefficient: k_t.
        exact: R · k_t B_t ∂ε_t/∂θ, with shape (P,).
        bare: R · ∂ε_t/∂θ, with shape (P,).
    """

    timestep: float
    coefficient: float
    exact: Tensor
    bare: Tensor

    def norms(self) -> tuple[float, float, float]:
        """|k_t B_t ∂ε_t/∂θ|, |k_t ∂ε_t/∂θ| and |∂ε_t/∂θ|, each times R."""
        bare = float(self.bare.norm())
        return float(self.exact.norm()), abs(self.coefficient) * bare, bare


def step_gradients(
    model: TextToImage,
    adapter: Adapter,
    prompt: str,
    noise: Tensor,
    direction: Tensor,
    steps: int,
    guidance_scale: float,
) -> Iterator[StepGradient]:
    """Yield the gradient of ⟨R, z_0⟩ with respect to the trained parameters, one sampling step after the other.

    Args:
        model: the text-to-image model, loaded, with the adapter attached and switched to what is trained.
        adapter: what is trained, with P numbers in all.
        prompt: the prompt P.
        noise: initial latents, with shape (n, C, h, w).
        direction: R, with the shape of `noise`.
        steps: number of sampling steps T.
        guidance_scale: of classifier-free guidance.

    Yields:
        Step after step from t = T on. The sum of their `exact` is the gradient of ⟨R, z_0⟩.
    """
    parameters = adapter.parameters()
    guided = checkpointed(model.guided)
    scheduler = copy.deepcopy(model.scheduler)
    scheduler.set_timesteps(steps, device=noise.device)
    coefficients = solver_coefficients(model.scheduler, steps).tolist()
    sources = noise_sources(scheduler, noise)

    with torch.no_grad():
        frozen = both(model, prompt)
    inputs, probes = [], []
    latents = noise * scheduler.init_noise_sigma
    with torch.enable_grad():
        for timestep in scheduler.timesteps:
            seen = scheduler.scale_model_input(latents, timestep)
            inputs.append(seen.detach())
            prediction = guided(seen, timestep, *frozen, guidance_scale)
            probes.append(torch.zeros_like(prediction, requires_grad=True))
            latents = scheduler.step(prediction + probes[-1], timestep, latents, **sources).prev_sample
        reaching = torch.autograd.grad(latents, probes, direction)  # R k_t B_t

    for timestep, seen, exact, coefficient in zip(scheduler.timesteps, inputs, reaching, coefficients, strict=True):
        with torch.enable_grad():
            prediction = guided(seen, timestep, *both(model, prompt), guidance_scale)
        parts = []
        for vector in (exact, direction):
            found = torch.autograd.grad(prediction, parameters, vector, retain_graph=True, allow_unused=True)
            parts.append(flatten(found, parameters))
        yield StepGradient(float(timestep), coefficient, *parts)


def both(model: TextToImage, prompt: str) -> tuple[Tensor, ...]:
    """Return the embeddings of the prompt and of the empty one, each with shape (1, L, D)."""
    return model.encode([prompt, ""]).tensor_split(2)


def flatten(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """Return all gradients as one vector, with shape (P,); zeros for a parameter without gradient."""
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


PATHS = {
    "naive": GradientPath.naive(),
    "detached": GradientPath(weights="solver"),
    "adjusted": GradientPath.adjusted(),
    "adjusted, authors' weights": GradientPath(weights="authors"),
    "DRaFT-1": GradientPath.draft(1),
    "DRaFT-2": GradientPath.draft(2),
    "AlignProp": GradientPath.alignprop(),
    "ReFL": GradientPath.refl(),
}


def passes(path: GradientPath, steps: int) -> float:
    """Return the network passes of one gradient: T forward, and one backward a step that carries gradient.

    Computing activations again (`Sampler.checkpoint`), which saves memory, is not counted.

    Args:
        path: the gradient path.
        steps: number of sampling steps T.
    """
    if path.steps == "all":
        return 2.0 * steps
    return steps + (min(path.count, steps) if path.count else (steps + 1) / 2)


@dataclass(frozen=True)
class GradientStatistics:
    """How the gradients of M independent batches relate.

    With s = E⟨g_i, g_j⟩ over pairs of different batches and v = E|g|², the mean of n gradients has squared norm
    s + (v − s) / n in expectation, of which s is what independent batches have in common.

    Attributes:
        norm: mean norm.
        deviation: of the norm between batches.
        shared: s, which may come out negative where it is near zero.
        square: v.
    """

    norm: float
    deviation: float
    shared: float
    square: float

    @classmethod
    def of(cls, gradients: Tensor) -> "GradientStatistics":
        """Of M gradients, with shape (M, P), at least two."""
        products = gradients.double() @ gradients.double().T
        squares, count = products.diagonal(), len(products)
        norms = squares.sqrt()
        shared = (products.sum() - squares.sum()) / (count * (count - 1))
        return cls(float(norms.mean()), float(norms.std()), float(shared), float(squares.mean()))

    @property
    def relative_variance(self) -> float:
        """E|g − E g|² / |E g|², the noise of one batch's gradient over its signal; infinite without a signal."""
        return (self.square - self.shared) / self.shared if self.shared > 0 else float("inf")

    def alignment(self, batches: float = 1) -> float:
        """Cosine between the means of two independent sets of `batches` gradients, in [0, 1]; 0 without a signal."""
        expected = self.shared + (self.square - self.shared) / batches
        return max(self.shared, 0.0) / expected if expected > 0 else 0.0


def clipped(gradients: Tensor) -> Tensor:
    """Gradients, with shape (M, P), cut to at most the median of their norms."""
    norms: Tensor = gradients.norm(dim=1, keepdim=True)
    return gradients * (norms.median() / norms.clamp(min=1e-30)).clamp(max=1)
