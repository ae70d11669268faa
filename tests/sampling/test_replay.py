"""Gradients of network calls that are made again, against the graph of the whole sampler."""

from functools import partialmethod
from pathlib import Path

import diffusers
import pytest
import torch
from tiny import build_tiny_pipeline
from torch.testing import assert_close

from fairness_dft.adapters.base import Adapter
from fairness_dft.adapters.combined import Combined
from fairness_dft.adapters.lora import TextEncoderLoRA, UNetLoRA
from fairness_dft.adapters.prompt_prefix import PromptPrefix
from fairness_dft.diffusion.stable_diffusion import StableDiffusion
from fairness_dft.sampling.gradients import GradientPath
from fairness_dft.sampling.replay import Call, replayed
from fairness_dft.sampling.sampler import Sampler

PROMPTS = ["a chef", "a nurse at work", "a photo of the face of a judge, a person"]
ADAPTERS = {
    "text encoder": lambda: TextEncoderLoRA(rank=2),
    "U-Net": lambda: UNetLoRA(rank=2),
    "prefix": lambda: PromptPrefix(2),
    "both": lambda: Combined([TextEncoderLoRA(rank=2), UNetLoRA(rank=2)]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


def finetuned(
    folder: Path, adapter: Adapter, scheduler: str = "DDIMScheduler", compile: bool = False
) -> StableDiffusion:
    model = StableDiffusion(str(folder), scheduler, compile=compile)
    model.load()
    adapter.attach(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def gradient(model: StableDiffusion, adapter: Adapter, prompts: str | list[str] = PROMPTS, **options) -> torch.Tensor:
    sampler = Sampler(**{"steps": 3, "guidance_scale": 3.0} | options)
    images = sampler(model, prompts, model.noise(torch.arange(3)), generator=torch.Generator().manual_seed(0))
    loss = (images * torch.linspace(-1, 2, images.numel()).view_as(images)).sum()
    found = torch.autograd.grad(loss, list(adapter.parameters()), materialize_grads=True)  # a moving average has none
    return torch.cat([part.flatten() for part in found])


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("trained", ADAPTERS)
@pytest.mark.parametrize("weights", ["uniform", "solver"])
def test_calls_made_again_have_the_gradient_of_the_graph(
    folder: Path, scheduler: str, trained: str, weights: str
) -> None:
    adapter = ADAPTERS[trained]()
    model, path = finetuned(folder, adapter, scheduler), GradientPath(weights=weights)
    expected = gradient(model, adapter, gradient=path, checkpoint=False)
    assert expected.norm() > 0
    for rows in (1, 5, None, 100):
        found = gradient(model, adapter, gradient=path, images_at_once=rows)
        assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"])
def test_they_have_it_with_schedulers_that_draw_noise_or_call_more_often(folder: Path, scheduler: str) -> None:
    adapter = TextEncoderLoRA(rank=2)
    model, path = finetuned(folder, adapter, scheduler), GradientPath(weights="solver")
    expected, found = (gradient(model, adapter, gradient=path, checkpoint=again, steps=5) for again in (False, True))
    assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0, 0.5, 7.5])
@pytest.mark.parametrize("prompts", ["a chef", PROMPTS])
def test_with_and_without_guidance(folder: Path, guidance_scale: float, prompts: str | list[str], monkeypatch) -> None:
    """At the scales 1 and 0 one branch has no part in the prediction, and is not called on the way back."""
    adapter = TextEncoderLoRA(rank=2)
    model = finetuned(folder, adapter)
    expected = gradient(model, adapter, prompts, guidance_scale=guidance_scale, checkpoint=False)
    rows, denoise = [], model.denoise

    def watched(latents, *rest):
        rows.append(len(latents) * torch.is_grad_enabled())
        return denoise(latents, *rest)

    monkeypatch.setattr(model, "denoise", watched)
    found = gradient(model, adapter, prompts, guidance_scale=guidance_scale)
    assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert sum(rows) == 3 * 3 * (1 if guidance_scale in (0, 1) else 2)  # steps and images


@pytest.mark.parametrize("rows", [1, 4, 7, 100])
def test_sampling_has_no_graph_and_going_back_takes_some_rows_of_any_steps(
    folder: Path, rows: int, monkeypatch
) -> None:
    model = finetuned(folder, TextEncoderLoRA(rank=2))
    calls, denoise = [], model.denoise

    def watched(latents, timestep, conditioning):
        calls.append((torch.is_grad_enabled(), len(latents), set(timestep.flatten().tolist())))
        return denoise(latents, timestep, conditioning)

    monkeypatch.setattr(model, "denoise", watched)
    path = GradientPath(steps="random", count=2)
    sampler = Sampler(steps=3, guidance_scale=3.0, gradient=path, images_at_once=rows)
    images = sampler(model, "a chef", model.noise(torch.arange(3)), generator=torch.Generator().manual_seed(0))
    assert images.requires_grad and not any(graph for graph, *_ in calls)
    calls.clear()
    images.sum().backward()
    assert all(graph for graph, *_ in calls)
    sizes = [size for _, size, _ in calls]
    total = 2 * 2 * 3  # steps that carry gradient, branches, images
    assert sum(sizes) == total and max(sizes) <= rows and max(sizes) - min(sizes) <= 1
    assert len(calls) == 2 * -(-total // 2 // rows)  # each is of one branch
    assert len(set().union(*(steps for *_, steps in calls))) == 2


def test_images_share_the_keys_of_their_prompt(folder: Path) -> None:
    model, seen = finetuned(folder, TextEncoderLoRA(rank=2)), []
    to_k = next(module for name, module in model.unet.named_modules() if name.endswith("attn2.to_k"))
    to_k.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    sampler = Sampler(steps=3, guidance_scale=3.0, images_at_once=4)
    images = sampler(model, "a chef", model.noise(torch.arange(4)))
    assert seen == 3 * [2]  # of the prompt and of the empty one
    seen.clear()
    images.sum().backward()
    assert seen == 6 * [1]


@pytest.mark.parametrize(
    ("kinds", "branches"),
    [(["prefix"], 1), (["text encoder"], 2), (["prefix", "U-Net"], 2), (["prefix", "text encoder"], 2)],
)
def test_a_branch_that_nothing_learned_leads_to_is_left_out(
    folder: Path, kinds: list[str], branches: int, monkeypatch
) -> None:
    adapter = Combined([ADAPTERS[kind]() for kind in kinds])
    model = finetuned(folder, adapter)
    expected = gradient(model, adapter, checkpoint=False)
    rows, denoise = [], model.denoise

    def watched(latents, timestep, conditioning):
        rows.append(len(latents) * torch.is_grad_enabled())
        return denoise(latents, timestep, conditioning)

    monkeypatch.setattr(model, "denoise", watched)
    found = gradient(model, adapter, images_at_once=4)
    assert sum(rows) == 3 * 3 * branches  # steps and images
    assert found.norm() > 0
    assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_calls_are_made_again_in_the_same_precision(folder: Path, dtype: torch.dtype, monkeypatch) -> None:
    """The backward pass runs outside of autocast, as in Lightning; the calls that it makes do not."""
    adapter = UNetLoRA(rank=2)
    model = finetuned(folder, adapter)
    seen, forward = [], model.unet.conv_in.forward
    monkeypatch.setattr(model.unet.conv_in, "forward", lambda z: seen.append(forward(z)) or seen[-1])
    found = []
    for again in (False, True):
        with torch.autocast("cpu", dtype):
            images = Sampler(steps=2, checkpoint=again)(model, "a chef", model.noise(torch.arange(2)))
            loss = images.float().square().sum()
        found.append(torch.autograd.grad(loss, list(adapter.parameters())))
    assert {output.dtype for output in seen} == {dtype}
    for plain, again in zip(*found, strict=True):
        assert again.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(plain.flatten(), again.flatten(), dim=0) > 0.999


class Copied(torch.nn.Module):
    """A network whose prediction is its conditioning."""

    def denoiser_learns(self) -> bool:
        return False

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        return conditioning.expand_as(latents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_calls_are_summed_in_single_precision(dtype: torch.dtype) -> None:
    """In either half precision 2048 + 1 is 2048."""
    zero, conditioning = torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype, requires_grad=True)
    calls = [Call(zero, torch.tensor(0), weight) for weight in [2048.0] + 16 * [1.0]]
    latents = replayed(zero, calls, Copied(), conditioning, conditioning, guidance_scale=1.0, rows=1)
    [found] = torch.autograd.grad(latents.sum(), conditioning)
    assert found.dtype == dtype and found.item() == 2064


def test_nothing_learned_has_no_graph(folder: Path) -> None:
    model = StableDiffusion(str(folder))
    model.load()
    images = Sampler(steps=2)(model, "a chef", model.noise(torch.arange(2)))
    assert not images.requires_grad


def test_the_images_are_those_without_a_graph(folder: Path) -> None:
    model = finetuned(folder, TextEncoderLoRA(rank=2), "EulerAncestralDiscreteScheduler")
    sampler, noise = Sampler(steps=3), model.noise(torch.arange(3))
    with torch.no_grad():
        expected = sampler(model, "a chef", noise)
    assert diffusers.EulerAncestralDiscreteScheduler is type(model.scheduler)
    assert_close(sampler(model, "a chef", noise), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # it is dynamo that looks
@pytest.mark.parametrize("prompts", ["a chef", PROMPTS])
def test_compiled_blocks_have_the_same_gradient_and_are_compiled_once(
    folder: Path, prompts: str | list[str], monkeypatch
) -> None:
    """Traced and differentiated as `torch.compile` does it, without the minutes of its code generator."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    gradients, graphs = [], torch._dynamo.utils.counters["stats"]
    for compiled in (False, True):
        adapter = ADAPTERS["text encoder"]()
        model = finetuned(folder, adapter, compile=compiled)
        before = graphs["unique_graphs"]
        gradients.append(gradient(model, adapter, prompts, images_at_once=3))
        with torch.no_grad(), adapter.using("original"):
            Sampler(steps=2)(model, prompts, model.noise(torch.arange(3)))
    assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5 * float(gradients[0].abs().max()))
    made = graphs["unique_graphs"]
    assert made > before
    gradient(model, adapter, prompts, images_at_once=5, steps=4)
    assert graphs["unique_graphs"] == made


def test_compiling_needs_a_compiler(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"`compile` needs a C\+\+ compiler, but there is none: install g\+\+"):
        StableDiffusion(compile=True)
