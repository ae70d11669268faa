"""The sampler against finite differences, sums worked out by hand, and `StableDiffusionPipeline` itself."""

import copy
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from unittest.mock import Mock

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from jsonargparse import ArgumentError, ArgumentParser
from tiny import build_tiny_pipeline
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fairness_dft.adapters.lora import TextEncoderLoRA
from fairness_dft.diffusion.stable_diffusion import StableDiffusion
from fairness_dft.diffusion.text_to_image import TextToImage
from fairness_dft.sampling.gradients import GradientPath, solver_coefficients
from fairness_dft.sampling.sampler import Sampler, encode_prompts, rows_for

STEPS = 4
PATHS = [
    GradientPath.naive(),
    GradientPath.adjusted(),
    GradientPath.draft(2),
    GradientPath(weights="authors"),
    GradientPath(steps="random", count=2),
    GradientPath(coupled=True, weights="solver", steps="random", count=2),
]


class Toy(TextToImage):
    """A model of a few numbers in float64; θ is what its text encoder learns."""

    latent_shape = (2, 3, 3)

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = DDIMScheduler(clip_sample=False)
        self.theta = torch.nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
        self.mix = torch.nn.Parameter(0.6 * torch.randn(2, 2, dtype=torch.float64), requires_grad=False)
        self.with_graph: list[bool] = []

    def load(self) -> None:
        pass

    def encode(self, prompts):
        lengths = torch.tensor([[[len(prompt) / 4.0, 1.0]] for prompt in prompts], dtype=torch.float64)
        return torch.sin(lengths * self.theta)

    def denoise(self, latents, timestep, conditioning):
        self.with_graph.append(torch.is_grad_enabled())
        mixed = torch.einsum("ij,njhw->nihw", self.mix, latents)
        conditioning = conditioning.repeat_interleave(len(latents) // len(conditioning), 0)
        return torch.tanh(mixed + conditioning.flatten(1)[:, :, None, None]) + 1e-4 * timestep.view(-1, 1, 1, 1)

    def decode(self, latents):
        return torch.sigmoid(latents[:, :1]).expand(-1, 3, -1, -1)


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


def toy_noise(count: int = 3) -> torch.Tensor:
    return torch.randn(count, *Toy.latent_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def toy_loss(images: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1, 2, images[0].numel(), dtype=images.dtype).view_as(images[0])
    return (weights * images.square()).sum()


def toy_gradient(toy: Toy, path: GradientPath, **options) -> torch.Tensor:
    sampler = Sampler(steps=STEPS, guidance_scale=2.0, gradient=path, **options)
    generator = torch.Generator().manual_seed(2)
    images = sampler(toy, "a chef", toy_noise(), generator=generator)
    return torch.autograd.grad(toy_loss(images), toy.theta)[0]


def plain_loop(toy: Toy, first: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The recursion written out, with a graph from step `first` on: the latents z_T to z_1, and z_0."""
    toy.scheduler.set_timesteps(STEPS)
    latents, visited = toy_noise(), []
    for index, timestep in enumerate(toy.scheduler.timesteps):
        visited.append(latents)
        with torch.set_grad_enabled(index >= first):
            latents = toy.scheduler.step(guided(toy, latents, timestep), timestep, latents).prev_sample
    return visited, latents


def guided(toy: Toy, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    with_prompt, without = (toy.denoise(latents, timestep, toy.encode([text])) for text in ("a chef", ""))
    return without + 2.0 * (with_prompt - without)


def by_hand(toy: Toy, weights: torch.Tensor) -> torch.Tensor:
    """Σ_t w_t dL/dz_0 · ∂ε_t/∂θ, one step at a time, the latents held fixed."""
    with torch.no_grad():
        visited, final = plain_loop(toy, first=STEPS)
    final.requires_grad_()
    (incoming,) = torch.autograd.grad(toy_loss(toy.decode(final)), final)
    total = torch.zeros_like(toy.theta)
    for weight, latents, timestep in zip(weights, visited, toy.scheduler.timesteps, strict=True):
        (step,) = torch.autograd.grad(guided(toy, latents, timestep), toy.theta, incoming)
        total += weight * step
    return total


def test_naive_gradient_is_finite_differences(toy: Toy) -> None:
    gradient = toy_gradient(toy, GradientPath.naive())
    sampler, size = Sampler(steps=STEPS, guidance_scale=2.0), 1e-6
    for index in range(2):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                toy.theta[index] += sign * size
                values.append(toy_loss(sampler(toy, "a chef", toy_noise())))
                toy.theta[index] -= sign * size
        assert_close(gradient[index], (values[0] - values[1]) / (2 * size), rtol=1e-6, atol=1e-8)


def test_adjusted_gradient_is_the_sum_by_hand(toy: Toy) -> None:
    coefficients = solver_coefficients(toy.scheduler, STEPS)
    uniform = -(coefficients.abs().prod() ** (1 / STEPS))
    expected = by_hand(toy, uniform.expand(STEPS))
    assert_close(toy_gradient(toy, GradientPath.adjusted()), expected, rtol=1e-6, atol=1e-9)


def test_detached_solver_weights_are_the_coefficients(toy: Toy) -> None:
    expected = by_hand(toy, solver_coefficients(toy.scheduler, STEPS))
    gradient = toy_gradient(toy, GradientPath(coupled=False, weights="solver"))
    assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
    assert (gradient - toy_gradient(toy, GradientPath.naive())).abs().max() > 1e-3


@pytest.mark.parametrize("count", [1, 2, STEPS, STEPS + 3])
def test_last_steps_are_backpropagation_through_the_end(toy: Toy, count: int) -> None:
    _, final = plain_loop(toy, first=STEPS - count)
    (expected,) = torch.autograd.grad(toy_loss(toy.decode(final)), toy.theta)
    assert_close(toy_gradient(toy, GradientPath.draft(count)), expected)
    if count == 1:
        assert_close(toy_gradient(toy, GradientPath.refl()), expected)


@pytest.mark.parametrize("weights", ["solver", "uniform", "authors"])
@pytest.mark.parametrize("count", [1, 3])
def test_random_steps_are_unbiased(toy: Toy, weights: str, count: int, monkeypatch) -> None:
    subsets = list(combinations(range(STEPS), count))
    masks = iter([torch.tensor([index in subset for index in range(STEPS)]) for subset in subsets])
    path = GradientPath(weights=weights, steps="random", count=count)
    with monkeypatch.context() as patch:
        patch.setattr(GradientPath, "select", lambda *_: next(masks))
        gradients = [toy_gradient(toy, path) for _ in subsets]
    expected = toy_gradient(toy, GradientPath(weights=weights))
    assert_close(torch.stack(gradients).mean(0), expected)
    assert (gradients[0] - expected).abs().max() > 1e-4


@pytest.mark.parametrize("path", PATHS)
def test_checkpointed_gradient_is_the_plain_one(toy: Toy, path: GradientPath) -> None:
    plain = toy_gradient(toy, path, checkpoint=False)
    for chunk in (1, 2, 8):
        assert_close(toy_gradient(toy, path, checkpoint=True, decode_chunk=chunk, images_at_once=chunk), plain)


@pytest.mark.parametrize("path", PATHS)
def test_gradient_path_does_not_change_the_images(toy: Toy, path: GradientPath) -> None:
    with torch.no_grad():
        expected = Sampler(steps=STEPS)(toy, "a chef", toy_noise())
    assert_close(Sampler(steps=STEPS, gradient=path)(toy, "a chef", toy_noise()), expected, rtol=0, atol=0)


def test_only_selected_steps_have_a_graph_and_are_computed_again(toy: Toy) -> None:
    images = Sampler(steps=STEPS, gradient=GradientPath.draft(1))(toy, "a chef", toy_noise())
    assert toy.with_graph == [False] * (STEPS - 1) + [True]
    toy_loss(images).backward()
    assert len(toy.with_graph) == STEPS + 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_builds_no_graph(toy: Toy, context) -> None:
    with context():
        images = Sampler(steps=STEPS)(toy, "a chef", toy_noise())
    assert images.grad_fn is None and not images.requires_grad
    assert not any(toy.with_graph)


@pytest.mark.parametrize("count", [1, 3])
def test_one_prompt_stands_for_all(toy: Toy, count: int) -> None:
    sampler = Sampler(steps=STEPS)
    expected = sampler(toy, ["a chef"] * count, toy_noise(count))
    assert expected.shape == (count, 3, 3, 3)
    assert_close(sampler(toy, "a chef", toy_noise(count)), expected)


def test_each_image_follows_its_own_prompt(toy: Toy) -> None:
    sampler, prompts = Sampler(steps=STEPS), ["a chef", "a nurse at work"]
    together = sampler(toy, prompts, toy_noise(2))
    alone = [sampler(toy, prompt, toy_noise(2)[[row]]) for row, prompt in enumerate(prompts)]
    assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_some_images_at_a_time_are_those_of_all(toy: Toy, scheduler: str, monkeypatch) -> None:
    toy.scheduler = getattr(diffusers, scheduler)()
    sizes, guided = [], toy.guided
    monkeypatch.setattr(toy, "guided", lambda latents, *rest: sizes.append(len(latents)) or guided(latents, *rest))
    for prompts in ("a chef", ["a chef", "a nurse", "a judge", "a pilot", "a cook"]):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                sizes.clear()
                whole = Sampler(steps=3)(toy, prompts, toy_noise(5))
                assert sizes == [5] * 3
                sizes.clear()
                parts = Sampler(steps=3, images_at_once=2)(toy, prompts, toy_noise(5))
            assert sizes == [2, 2, 1] * 3
            assert_close(parts, whole)
            assert parts.requires_grad == gradients


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_texts_sampled_together_are_those_sampled_one_after_the_other(
    toy: Toy, path: GradientPath, scheduler: str, monkeypatch
) -> None:
    toy.scheduler = getattr(diffusers, scheduler)()
    sizes, denoise = [], toy.denoise
    monkeypatch.setattr(toy, "denoise", lambda latents, *rest: sizes.append(len(latents)) or denoise(latents, *rest))
    prompts = ["a chef", "a nurse at work", "a judge"]
    for texts in ([[text] for text in prompts], [prompts, prompts[::-1]]):
        for checkpoint, at_once in ((False, None), (True, None), (False, 2), (True, 4)):
            sampler = Sampler(STEPS, guidance_scale=2.0, gradient=path, checkpoint=checkpoint, images_at_once=at_once)
            draws = [torch.Generator().manual_seed(3) for _ in range(2)]
            expected = sampler(toy, texts[0], toy_noise(), generator=draws[0])
            first, *others = sampler.sample(
                toy, [encode_prompts(toy, text) for text in texts], toy_noise(), None, draws[1]
            )
            assert_close(sampler.decode(toy, first), expected)
            for latents, text in zip(others, texts[1:], strict=True):
                assert not latents.requires_grad
                with torch.no_grad():
                    assert_close(toy.decode(latents), sampler(toy, text, toy_noise()))
            gradients = [toy_loss(images) for images in (expected, sampler.decode(toy, first))]
            gradients = [torch.autograd.grad(loss, toy.theta)[0] for loss in gradients]
            assert_close(gradients[1], gradients[0])
            sizes.clear()
            with torch.no_grad():
                sampler.sample(toy, [encode_prompts(toy, text) for text in texts], toy_noise())
            images = 3 * len(texts)
            parts = -(-images // (at_once or images))
            assert len(sizes) == STEPS * parts and max(sizes) == 2 * -(-images // parts)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_several_images_of_several_prompts_share_rows(toy: Toy, checkpoint: bool) -> None:
    prompts, found = ["a chef", "a nurse at work"], []
    for texts in (prompts, [prompts[0]] * 3 + [prompts[1]] * 3):
        sampler = Sampler(STEPS, guidance_scale=2.0, checkpoint=checkpoint, images_at_once=4)
        [latents] = sampler.sample(toy, [encode_prompts(toy, texts)], toy_noise(6))
        images = sampler.decode(toy, latents)
        found.append((images, torch.autograd.grad(toy_loss(images), toy.theta)[0]))
    assert_close(found[0], found[1])
    with pytest.raises(ValueError, match="`texts` must have 1 or 5 rows, or as many as divide the 5 images"):
        sampler.sample(toy, [encode_prompts(toy, prompts)], toy_noise(5))


@pytest.mark.parametrize(
    ("start", "stop", "rows"), [(0, 3, 1), (4, 6, 1), (0, 6, 2), (3, 9, 2), (2, 4, 2), (1, 5, 2), (1, 6, 5), (1, 9, 8)]
)
def test_images_share_rows_of_a_conditioning_if_they_fit(start: int, stop: int, rows: int) -> None:
    conditioning = torch.arange(3.0).view(3, 1, 1)
    found = rows_for(conditioning, 9, start, stop)
    assert len(found) == rows
    assert found.repeat_interleave((stop - start) // rows, 0).flatten().tolist() == [i // 3 for i in range(start, stop)]


def test_guidance_scale_one_calls_the_network_with_one_batch(toy: Toy, monkeypatch) -> None:
    sizes = []
    denoise = toy.denoise
    monkeypatch.setattr(toy, "denoise", lambda latents, *rest: sizes.append(len(latents)) or denoise(latents, *rest))
    with torch.no_grad():
        for scale in (1.0, 2.0):
            Sampler(steps=1, guidance_scale=scale)(toy, "a chef", toy_noise(3))
    assert sizes == [3, 6]


def test_steps_are_drawn_from_their_range() -> None:
    sampler, generator = Sampler(steps=19, steps_max=23), torch.Generator().manual_seed(0)
    assert {sampler.draw_steps(generator) for _ in range(200)} == {19, 20, 21, 22, 23}
    assert Sampler(steps=7).draw_steps() == 7


def test_steps_of_one_call(toy: Toy) -> None:
    with torch.no_grad():
        Sampler(steps=2)(toy, "a chef", toy_noise(), steps=5)
    assert len(toy.with_graph) == 5


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "DDPMScheduler", "LCMScheduler"])
def test_schedulers_that_draw_noise_draw_the_same_for_the_same_image(toy: Toy, scheduler: str) -> None:
    toy.scheduler = getattr(diffusers, scheduler)()
    noise = toy_noise()
    with torch.no_grad():
        first, again, alone = (Sampler(steps=5)(toy, "a chef", z) for z in (noise, noise, noise[1:]))
    assert_close(first, again, rtol=0, atol=0)
    assert_close(first[1:], alone)
    quiet = copy.deepcopy(toy)
    quiet.scheduler = DDIMScheduler(clip_sample=False)
    with torch.no_grad():
        assert (Sampler(steps=5)(quiet, "a chef", noise) - first).abs().max() > 1e-3


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5, 6])
def test_a_function_in_chunks_is_the_function(rows: int, checkpoint: bool, kept: int) -> None:
    inputs, sizes, back = torch.randn(rows, 3, requires_grad=True), [], []

    def sine(part: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        found = part.sin()
        found.register_hook(lambda gradient: back.append(len(gradient)))
        return found

    result = Sampler(checkpoint=checkpoint, decode_chunk=2).map_chunks(sine, inputs, kept)
    assert_close(result, inputs.sin())
    chunks = {0: [0], 1: [1], 5: [2, 2, 1], 6: [2, 2, 2]}[rows]
    assert sizes == chunks
    assert_close(torch.autograd.grad(result.sum(), inputs)[0], inputs.cos())
    assert back[0] == chunks[-1]  # the last is the first on the way back
    again = [size for i, size in enumerate(chunks) if sum(chunks[i:]) > kept] if checkpoint else []
    assert sorted(sizes) == sorted(chunks + again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1, but got 0"),
        ({"steps": 5, "steps_max": 4}, r"`steps_max` must be at least `steps` \(5\), but got 4"),
        ({"decode_chunk": 0}, "`decode_chunk` must be at least 1, but got 0"),
        ({"decode_kept": -1}, "`decode_kept` must be at least 0, but got -1"),
        ({"images_at_once": 0}, "`images_at_once` must be at least 1, but got 0"),
    ],
)
def test_sampler_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**options)


def test_sampler_is_configured_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Sampler, "sampler")
    text = "sampler: {steps: 8, guidance_scale: 3, gradient: {coupled: true, steps: random, count: 2}}"
    sampler = parser.instantiate_classes(parser.parse_string(text)).sampler
    assert (sampler.steps, sampler.guidance_scale, sampler.checkpoint) == (8, 3.0, True)
    assert sampler.gradient == GradientPath(coupled=True, steps="random", count=2)
    with pytest.raises(ArgumentError, match="weights"):
        parser.parse_string("sampler: {gradient: {weights: equal}}")


def test_number_of_prompts_must_fit(toy: Toy) -> None:
    with pytest.raises(ValueError, match="one for each of the 3 images; got 2"):
        Sampler()(toy, ["a", "b"], toy_noise(3))


SCHEDULERS = ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "PNDMScheduler"]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_same_seeds_give_the_images_of_the_pipeline(folder: Path, scheduler: str, guidance_scale: float) -> None:
    prompt, seeds = "a photo of a nurse, a person", [3, 1, 4]
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    expected = pipeline(
        prompt,
        num_images_per_prompt=len(seeds),
        num_inference_steps=5,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images

    model = StableDiffusion(str(folder), scheduler)
    model.load()
    sampler = Sampler(steps=5, guidance_scale=guidance_scale, decode_chunk=2)
    with torch.no_grad():
        images = sampler(model, prompt, model.noise(torch.tensor(seeds)))
        again = sampler(model, prompt, model.noise(torch.tensor(seeds)))
    assert expected.std() > 0.05
    assert_close(images, expected, rtol=1e-4, atol=1e-5)
    assert_close(again, images, rtol=0, atol=0)


@pytest.mark.parametrize("scheduler", SCHEDULERS[:3])
@pytest.mark.parametrize("path", PATHS[:3])
def test_stable_diffusion_trains_only_the_adapter(folder: Path, scheduler: str, path: GradientPath) -> None:
    model, adapter = StableDiffusion(str(folder), scheduler), TextEncoderLoRA(rank=2)
    model.load()
    adapter.attach(model)
    noise = model.noise(torch.arange(3))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    gradients = []
    for checkpoint in (True, False):
        sampler = Sampler(steps=3, gradient=path, checkpoint=checkpoint, decode_chunk=2)
        sampler(model, "a chef", noise).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in adapter.parameters()])
        assert all(gradient.abs().sum() > 0 for gradient in gradients[-1])
        trained = set(adapter.parameters())
        assert all(parameter.grad is None for parameter in model.parameters() if parameter not in trained)
        for parameter in adapter.parameters():
            parameter.grad = None
    assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights_dtype", ["bfloat16", "float16"])
def test_half_precision_weights_leave_latents_and_gradients_in_float32(folder: Path, weights_dtype: str) -> None:
    model, adapter = StableDiffusion(str(folder), weights_dtype=weights_dtype), TextEncoderLoRA(rank=2)
    model.load()
    adapter.attach(model)
    images = Sampler(steps=2)(model, "a chef", model.noise(torch.arange(2)))
    images.sum().backward()
    assert images.dtype == torch.float32 and images.isfinite().all()
    assert all(parameter.grad.dtype == torch.float32 for parameter in adapter.parameters())


class Stay(TorchDispatchMode):
    """Refuses to copy a tensor from one device to another once the network has been called, until decoding."""

    inside = False

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        target = (options or {}).get("device")
        if self.inside and function is torch.ops.aten._to_copy.default and target is not None:
            assert arguments[0].device == torch.device(target), "copied within the loop"
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("scheduler", SCHEDULERS[:3])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_sampling_and_its_way_back_make_no_gpu_wait(
    folder: Path, scheduler: str, checkpoint: bool, monkeypatch
) -> None:
    """On a device whose tensors have no values, who asks for one fails; so does who copies between the calls."""
    monkeypatch.setattr("fairness_dft.sampling.sampler.noise_sources", lambda *_: {})  # read once, before the loop
    monkeypatch.setattr("fairness_dft.sampling.replay._Precision", Mock(return_value=Mock(autocast=nullcontext)))
    model, adapter = StableDiffusion(str(folder), scheduler), TextEncoderLoRA(rank=2)
    model.load()
    adapter.attach(model)
    model.to("meta")
    guided, decode = model.guided, model.decode
    with Stay() as stay:
        monkeypatch.setattr(model, "guided", lambda *inputs: setattr(stay, "inside", True) or guided(*inputs))
        monkeypatch.setattr(model, "decode", lambda latents: setattr(stay, "inside", False) or decode(latents))
        texts = [encode_prompts(model, prompt) for prompt in ("a chef", "a nurse")]
        for at_once in (None, 2):  # two cuts across the texts
            sampler = Sampler(steps=3, checkpoint=checkpoint, images_at_once=at_once)
            latents, _ = sampler.sample(model, texts, model.noise(torch.arange(3)))
            images = sampler.decode(model, latents)
    with pytest.raises(RuntimeError, match="meta"):
        images.max().item()
    images.sum().backward()
    assert all(parameter.grad.device.type == "meta" for parameter in adapter.parameters())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_gpu_is_not_waited_for_while_sampling(folder: Path, checkpoint: bool, monkeypatch) -> None:
    """What is done before the first and after the last call of the network may wait; between them nothing does."""
    model, trained = StableDiffusion(str(folder)), TextEncoderLoRA(rank=2)
    model.load()
    trained.attach(model)
    model.to("cuda")
    calls, guided, decode = [], model.guided, model.decode

    def called(*arguments):
        calls.append(torch.cuda.set_sync_debug_mode("error"))
        return guided(*arguments)

    monkeypatch.setattr(model, "guided", called)
    monkeypatch.setattr(model, "decode", lambda latents: torch.cuda.set_sync_debug_mode("default") or decode(latents))
    sampler = Sampler(steps=4, checkpoint=checkpoint)
    try:
        sampler(model, "a chef", model.noise(torch.arange(3))).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 4 and all(parameter.grad.isfinite().all() for parameter in trained.parameters())
