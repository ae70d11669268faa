"""Coefficients and weights against closed forms and figures measured on Stable Diffusion's noise schedule."""

from collections import Counter
from itertools import combinations

import diffusers
import pytest
import torch
from scipy.stats import chisquare
from torch.testing import assert_close

from fairness_dft.sampling.gradients import (
    GradientPath,
    authors_weights,
    scale_gradient,
    solver_coefficients,
    uniform_weights,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
]


def make_scheduler(name: str, **options):
    return getattr(diffusers, name)(**BETAS, **options)


def ddim_coefficients(scheduler, steps: int) -> torch.Tensor:
    """DDIM in closed form: each step adds c_t ε_t, and all later steps rescale it."""
    scheduler.set_timesteps(steps)
    stride = scheduler.config.num_train_timesteps // steps
    now = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    before = [t - stride for t in scheduler.timesteps.tolist()]
    then = torch.stack([scheduler.alphas_cumprod[t] if t >= 0 else scheduler.final_alpha_cumprod for t in before])
    then = then.double()
    added = (1 - then).sqrt() - (then * (1 - now) / now).sqrt()
    return added * (then[-1] / then).sqrt()


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("last_alpha_is_one", [False, True])
def test_ddim_coefficients_are_the_closed_form(steps: int, last_alpha_is_one: bool) -> None:
    scheduler = make_scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=last_alpha_is_one)
    coefficients = solver_coefficients(scheduler, steps)
    assert coefficients.dtype == torch.float64
    assert_close(coefficients, ddim_coefficients(scheduler, steps), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_final_latent_is_linear_in_the_predictions(name: str, prediction_type: str) -> None:
    scheduler = make_scheduler(name, prediction_type=prediction_type)
    if name == "DDIMScheduler":
        scheduler = make_scheduler(name, prediction_type=prediction_type, clip_sample=False)
    coefficients = solver_coefficients(scheduler, 6)
    outputs = torch.randn(len(coefficients), 1, 2, 2, 2)

    def sample(start: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        scheduler.set_timesteps(6)
        for output, timestep in zip(outputs, scheduler.timesteps, strict=True):
            scheduler.scale_model_input(start, timestep)
            start = scheduler.step(output, timestep, start).prev_sample
        return start

    noise = torch.randn(1, 2, 2, 2)
    moved = sample(noise, outputs) - sample(noise, torch.zeros_like(outputs))
    expected = (coefficients.float().view(-1, 1, 1, 1, 1) * outputs).sum(0)
    assert_close(moved, expected, rtol=1e-4, atol=1e-4)


def test_measured_figures_of_dpm_solver() -> None:
    scheduler = make_scheduler("DPMSolverMultistepScheduler")
    coefficients = solver_coefficients(scheduler, 20)
    scheduler.set_timesteps(20)
    product = coefficients * authors_weights(scheduler, scheduler.timesteps)

    def rounded(values: torch.Tensor) -> list[float]:
        return [round(value, 2) for value in values.tolist()]

    assert rounded(coefficients[[0, 16, 19]]) == [-2.36, -0.11, -0.23]
    assert (coefficients < 0).all()
    assert rounded(product[[0, 18, 19]]) == [-0.22, -0.74, -0.71]
    assert_close(product[1:9], torch.full((8,), -0.40, dtype=torch.float64), rtol=0, atol=0.01)
    assert_close(product[1:18].median(), torch.tensor(-0.40, dtype=torch.float64), rtol=0, atol=0.01)


def test_authors_weights_are_their_formula_with_geometric_mean_one() -> None:
    scheduler = make_scheduler("EulerDiscreteScheduler")
    scheduler.set_timesteps(5)
    weights = authors_weights(scheduler, scheduler.timesteps)
    raw = []
    for timestep in scheduler.timesteps.round().long().tolist():
        alpha_bar, alpha = scheduler.alphas_cumprod[timestep].item(), scheduler.alphas[timestep].item()
        raw.append(alpha_bar**0.5 * (1 - alpha_bar) ** 0.5 / (1 - alpha))
    raw = torch.tensor(raw, dtype=torch.float64)
    assert_close(weights, raw / raw.prod() ** (1 / 5), rtol=1e-3, atol=0)
    assert_close(weights.prod(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_uniform_scales_make_every_weight_the_geometric_mean(name: str, steps: int) -> None:
    scheduler = make_scheduler(name)
    coefficients = solver_coefficients(scheduler, steps)
    weight = coefficients * GradientPath.adjusted().scales(scheduler, steps)
    mean = -(coefficients.abs().prod() ** (1 / len(coefficients)))
    assert_close(weight, mean.expand_as(weight))


@pytest.mark.parametrize(
    ("coefficients", "weight"),
    [([-4.0, 1.0, -2.0], -2.0), ([4.0, -1.0, -7.0], -(28 ** (1 / 3))), ([-1.0, 9.0, -3.0], 3.0)],
)
def test_uniform_weights_have_the_sign_of_the_sum_where_the_solver_has_two(
    coefficients: list[float], weight: float
) -> None:
    values = torch.tensor(coefficients)
    assert_close(values * uniform_weights(values), torch.full((3,), weight))


def test_uniform_weights_refuse_an_unused_step() -> None:
    with pytest.raises(ValueError, match="`weights` uniform needs .* ignores step 1"):
        uniform_weights(torch.tensor([-1.0, 0.0, -2.0]))


def test_solver_scales_are_one_and_random_steps_stand_for_all() -> None:
    scheduler = make_scheduler("DDIMScheduler", clip_sample=False)
    assert_close(GradientPath.naive().scales(scheduler, 6), torch.ones(6, dtype=torch.float64))
    every = GradientPath(weights="authors").scales(scheduler, 6)
    some = GradientPath(weights="authors", steps="random", count=2).scales(scheduler, 6)
    assert_close(some, 3 * every)
    more_than_all = GradientPath(weights="authors", steps="random", count=9).scales(scheduler, 6)
    assert_close(more_than_all, every)
    coupled = GradientPath(coupled=True, weights="solver", steps="random", count=2).scales(scheduler, 6)
    assert_close(coupled, torch.ones(6, dtype=torch.float64))


def test_reading_a_scheduler_changes_neither_it_nor_the_random_state() -> None:
    scheduler = make_scheduler("EulerAncestralDiscreteScheduler")
    scheduler.set_timesteps(3)
    before, state = scheduler.timesteps.clone(), torch.get_rng_state()
    with torch.no_grad():
        coefficients = solver_coefficients(scheduler, 5)
    assert len(coefficients) == 5
    assert_close(scheduler.timesteps, before)
    assert_close(torch.get_rng_state(), state)


@pytest.mark.parametrize("total", [1, 2, 7])
def test_selected_steps(total: int) -> None:
    assert GradientPath.naive().select(total).tolist() == [True] * total
    last = GradientPath.draft(2).select(total)
    assert last.tolist() == [index >= total - 2 for index in range(total)]
    assert GradientPath.refl().select(total).tolist() == [False] * (total - 1) + [True]
    assert GradientPath(steps="random", count=3).select(total).sum() == min(3, total)


def test_random_steps_reach_every_subset_and_repeat_with_the_generator() -> None:
    path = GradientPath(steps="random", count=2)
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(path.select(4, generator).nonzero().flatten().tolist()) for _ in range(200)}
    assert drawn == set(combinations(range(4), 2))
    one, other = (path.select(50, torch.Generator().manual_seed(3)) for _ in range(2))
    assert_close(one, other)


@pytest.mark.parametrize(("total", "count"), [(4, 2), (5, 1), (5, 4)])
def test_random_steps_are_drawn_evenly(total: int, count: int) -> None:
    """Every subset as often as every other, up to what chance does in 4,000 draws."""
    path, generator = GradientPath(steps="random", count=count), torch.Generator().manual_seed(1)
    drawn = Counter(tuple(path.select(total, generator).nonzero().flatten().tolist()) for _ in range(4_000))
    assert set(drawn) == set(combinations(range(total), count))
    assert chisquare(list(drawn.values())).pvalue > 1e-3


def test_alignprop_truncates_everywhere() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = [GradientPath.alignprop().select(4, generator) for _ in range(200)]
    assert {int(mask.sum()) for mask in masks} == {1, 2, 3, 4}
    assert all(mask.tolist() == sorted(mask.tolist()) for mask in masks)


def test_named_estimators() -> None:
    assert GradientPath.adjusted() == GradientPath() == GradientPath(False, "uniform", "all", None)
    assert GradientPath.naive() == GradientPath(True, "solver", "all")
    assert GradientPath.draft(3) == GradientPath(True, "solver", "last", 3)
    assert GradientPath.alignprop() == GradientPath(True, "solver", "last")
    assert GradientPath.refl() == GradientPath(False, "solver", "last", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "equal"}, "`weights` must be one of .*uniform.* got 'equal'"),
        ({"steps": "first"}, "`steps` must be one of .*last.* got 'first'"),
        ({"steps": "last", "count": 0}, "`count` must be at least 1, but got 0"),
        ({"count": 3}, "`count` is for `steps` last or random"),
        ({"steps": "random"}, "`steps` random needs a `count`"),
    ],
)
def test_gradient_path_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientPath(**options)


@pytest.mark.parametrize("scale", [0.0, -2.5, torch.tensor([[0.0, 1.0, 2.0]])])
def test_scale_gradient_changes_only_the_gradient(scale) -> None:
    tensor = torch.randn(2, 3, requires_grad=True)
    scaled = scale_gradient(tensor, scale)
    assert_close(scaled, tensor, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(scaled.pow(2).sum(), tensor)
    assert_close(gradient, 2 * tensor * scale)
    assert not scale_gradient(tensor.detach(), scale).requires_grad
