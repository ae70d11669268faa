"""The gradient path: how a loss on the final latent reaches the parameters.

A sampler with T steps is linear in the noise predictions,

    z_0 = a z_T + Σ_t k_t ε_t,

where the k_t are fixed by the scheduler alone. The exact ("naive") gradient of a loss L is

    dL/dθ = dL/dz_0 · Σ_t k_t B_t ∂ε_t/∂θ,

where B_t is the product of the coupling Jacobians through the later network calls. Its factors k_t B_t
explode towards the first steps. The *adjusted* gradient sets B_t = I, by detaching the latent z_t before it
enters the network, and gives every step the same weight:

    dL/dθ ≈ dL/dz_0 · Σ_t A ∂ε_t/∂θ,   with |A| the geometric mean of the |k_t|, and the sign of their sum.

In the code `coefficients` are the k_t, `scales` are what the gradient at ε_t is multiplied by *on top of*
k_t, and the steps are counted from the first one (t = T, pure noise) to the last. Everything here is pure
PyTorch: a scheduler is whatever has the methods of a diffusers scheduler.

References:
    Finetuning Text-to-Image Diffusion Models for Fairness (Shen et al., 2024), section 4.2.
    https://arxiv.org/abs/2311.07604
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Generator, Tensor

Weights = Literal["solver", "uniform", "authors"]
Steps = Literal["all", "last", "random"]


def solver_coefficients(scheduler: Any, steps: int) -> Tensor:
    """Read the coefficients k_t of z_0 = a z_T + Σ_t k_t ε_t from the scheduler's own recursion.

    Ones are back-propagated through the recursion alone, with independent scalars in place of the network's
    outputs. This holds for every scheduler that is linear in them, and for whatever they predict: under
    v-prediction k_t is the coefficient of v_t.

    Args:
        scheduler: A diffusers scheduler; it is copied, not changed. The coefficients are cached as long as it exists.
        steps: The number of sampling steps.

    Returns:
        The coefficients k_t, with shape (T,), in float64. T is the number of network calls, which is `steps`
        for all but a few schedulers (Heun, PNDM).
    """
    known = _known_coefficients.setdefault(scheduler, {})
    if steps not in known:
        known[steps] = _solver_coefficients(copy.deepcopy(scheduler), steps)
    return known[steps].clone()


_known_coefficients: WeakKeyDictionary[Any, dict[int, Tensor]] = WeakKeyDictionary()


def _solver_coefficients(scheduler: Any, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    outputs = torch.zeros(len(scheduler.timesteps), 1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):  # ancestral schedulers draw noise
        latents = torch.zeros_like(outputs[0])
        for output, timestep in zip(outputs, scheduler.timesteps, strict=True):
            scheduler.scale_model_input(latents, timestep)  # some count on being asked
            latents = scheduler.step(output, timestep, latents).prev_sample
        (coefficients,) = torch.autograd.grad(latents.sum(), outputs)
    return coefficients.flatten()


def uniform_weights(coefficients: Tensor) -> Tensor:
    """Compute A / k_t, which makes the weight of every step the same number A.

    Args:
        coefficients: The coefficients k_t, with shape (T,).

    Returns:
        The weights, with shape (T,). They are positive wherever all k_t have one sign, as those of DDIM,
        Euler and DPM-Solver++ have.

    Example:
        >>> weights = uniform_weights(torch.tensor([1.0, 4.0]))
        >>> weights, weights * torch.tensor([1.0, 4.0])
        (tensor([2.0000, 0.5000]), tensor([2., 2.]))

    Raises:
        ValueError: If some k_t is zero, so that no factor can raise it to A.
    """
    if (coefficients.abs() <= 1e-6 * coefficients.abs().max()).any():
        unused = int(coefficients.abs().argmin())
        raise ValueError(
            f"`weights` uniform needs a scheduler that uses every step, but this one ignores step {unused}: "
            "choose another scheduler, such as DPMSolverMultistepScheduler, or `weights` solver"
        )
    return torch.copysign(geometric_mean(coefficients.abs()), coefficients.sum()) / coefficients


def authors_weights(scheduler: Any, timesteps: Tensor) -> Tensor:
    """Compute the step weights of the authors' published code.

    These are √ᾱ_t √(1 - ᾱ_t) / (1 - α_t), divided by their geometric mean: the reciprocal of the coefficient
    of a DDPM step, whichever solver is used. They act on top of the solver's own k_t.

    Args:
        scheduler: A diffusers scheduler, of which `betas` = 1 - α_t and `alphas_cumprod` = ᾱ_t are read.
        timesteps: The sampled training timesteps, with shape (T,), in [0, number of training timesteps).

    Returns:
        The weights, with shape (T,) and geometric mean 1, in float64.
    """
    timesteps = timesteps.cpu().round().long()
    alphas_cumprod = scheduler.alphas_cumprod.cpu().double()[timesteps]
    weights = (alphas_cumprod * (1 - alphas_cumprod)).sqrt() / scheduler.betas.cpu().double()[timesteps]
    normalized: Tensor = weights / geometric_mean(weights)
    return normalized


def geometric_mean(values: Tensor) -> Tensor:
    """Return exp(mean(log(values))) of positive `values`."""
    return values.log().mean().exp()


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: float | Tensor) -> Tensor:
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


def scale_gradient(tensor: Tensor, scale: float | Tensor) -> Tensor:
    """Return `tensor` unchanged, and multiply the gradient that comes back through it.

    Args:
        tensor: Any tensor.
        scale: A number, or a constant tensor that broadcasts to the shape of `tensor`, such as a mask. It is read
            when the gradient comes back, and may be filled in until then.
    """
    scaled: Tensor = _ScaleGradient.apply(tensor, scale)  # type: ignore[no-untyped-call]
    return scaled


@dataclass(frozen=True)
class GradientPath:
    """How the gradient travels from the final latent to the network calls: three independent choices.

    The default is the adjusted gradient of the paper.

    Args:
        coupled: Whether the gradient also flows through the latents that enter the network (B_t exact), or
            the latents are detached there (B_t = I).
        weights: What multiplies the gradient at the prediction ε_t, whose weight is the solver's own k_t.
            `solver` leaves k_t; `uniform` makes it the same for every step; `authors` uses the formula of the
            authors' code.
        steps: Which steps carry gradient: `all`, the `last` ones or `random` ones. The others run without a
            graph. Detached random steps are weighted by T / count, so that their gradient is that of `all` in
            expectation.
        count: How many steps carry gradient, at most all of them; required by `random`. Without it `last`
            draws the number for every call, uniformly from 1 to T.

    Raises:
        ValueError: If a choice is not one of those allowed.

    Example:
        >>> GradientPath(steps="last", count=2).select(4)
        tensor([False, False,  True,  True])
        >>> GradientPath.draft(2) == GradientPath(coupled=True, weights="solver", steps="last", count=2)
        True
    """

    coupled: bool = False
    weights: Weights = "uniform"
    steps: Steps = "all"
    count: int | None = None

    def __post_init__(self) -> None:
        if self.weights not in get_args(Weights):
            raise ValueError(f"`weights` must be one of {get_args(Weights)}, but got {self.weights!r}")
        if self.steps not in get_args(Steps):
            raise ValueError(f"`steps` must be one of {get_args(Steps)}, but got {self.steps!r}")
        if self.count is not None and self.count < 1:
            raise ValueError(f"`count` must be at least 1, but got {self.count}")
        if self.steps == "all" and self.count is not None:
            raise ValueError(f"`count` is for `steps` last or random, but got {self.count} with `steps` all")
        if self.steps == "random" and self.count is None:
            raise ValueError("`steps` random needs a `count`, how many steps carry gradient, but got none")

    @classmethod
    def naive(cls) -> "GradientPath":
        """Return the exact gradient: coupled, with the solver's weights, of all steps."""
        return cls(coupled=True, weights="solver")

    @classmethod
    def adjusted(cls) -> "GradientPath":
        """Return adjusted direct finetuning (Shen et al., 2024): detached, with uniform weights, of all steps."""
        return cls()

    @classmethod
    def draft(cls, count: int) -> "GradientPath":
        """Return DRaFT-K (Clark et al., 2024, https://arxiv.org/abs/2309.17400): the last `count` steps."""
        return cls(coupled=True, weights="solver", steps="last", count=count)

    @classmethod
    def alignprop(cls) -> "GradientPath":
        """Return AlignProp (Prabhudesai et al., 2023, https://arxiv.org/abs/2310.03739): DRaFT-K with random K."""
        return cls(coupled=True, weights="solver", steps="last")

    @classmethod
    def refl(cls) -> "GradientPath":
        """Return ReFL (Xu et al., 2023, https://arxiv.org/abs/2304.05977): one late step, here the last."""
        return cls(coupled=False, weights="solver", steps="last", count=1)

    def select(self, total: int, generator: Generator | None = None) -> Tensor:
        """Choose the steps that carry gradient.

        Args:
            total: The number of steps T.
            generator: A CPU random generator; the global one by default.

        Returns:
            A boolean mask over the steps, first to last, with shape (T,).
        """
        if self.steps == "all":
            return torch.ones(total, dtype=torch.bool)
        backwards = torch.arange(total).flip(0)
        order = torch.randperm(total, generator=generator) if self.steps == "random" else backwards
        count = self.count or int(torch.randint(1, total + 1, (), generator=generator))
        selected = torch.zeros(total, dtype=torch.bool)
        selected[order[:count]] = True
        return selected

    def scales(self, scheduler: Any, steps: int) -> Tensor:
        """Compute the factor of the gradient at each prediction ε_t.

        Args:
            scheduler: A diffusers scheduler; it is copied, not changed.
            steps: The number of sampling steps.

        Returns:
            The factors, with shape (T,), in float64.

        Raises:
            ValueError: If the weights are uniform and the scheduler does not use some step.
        """
        return self._scales(solver_coefficients(scheduler, steps), scheduler, steps)

    def weights_from_final_latent(self, scheduler: Any, steps: int) -> Tensor:
        """Compute the factors that turn dL/dz_0 into the gradient at each prediction ε_t: k_t times `scales`.

        Args:
            scheduler: A diffusers scheduler that is linear in the predictions; it is copied, not changed.
            steps: The number of sampling steps.

        Returns:
            The weights, with shape (T,), in float64; for the adjusted gradient they are all the same number A.

        Raises:
            ValueError: If the weights are uniform and the scheduler does not use some step.
        """
        coefficients = solver_coefficients(scheduler, steps)
        return coefficients * self._scales(coefficients, scheduler, steps)

    def _scales(self, coefficients: Tensor, scheduler: Any, steps: int) -> Tensor:
        scales = torch.ones_like(coefficients)
        if self.weights == "uniform":
            scales = uniform_weights(coefficients)
        elif self.weights == "authors":
            scheduler = copy.deepcopy(scheduler)
            scheduler.set_timesteps(steps)
            scales = authors_weights(scheduler, scheduler.timesteps)
        if self.steps == "random" and not self.coupled:
            assert self.count is not None  # checked in __post_init__
            scales = scales * max(1.0, len(scales) / self.count)
        return scales
