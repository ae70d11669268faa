"""Layers of frozen networks: what PyTorch's layers compute, with less kept for the way back."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny import build_tiny_pipeline
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from benchmarks.authors import layers_that_keep
from fairness_dft.diffusion.stable_diffusion import StableDiffusion
from fairness_dft.networks.frozen_layers import (
    FrozenConv2d,
    GroupNormSiLU,
    forget_inputs,
    join_activations,
    keeping_activations,
)
from fairness_dft.sampling.sampler import Sampler

CONVOLUTIONS = (
    dict(kernel_size=3, padding=1),
    dict(kernel_size=(3, 1), stride=(2, 1), bias=False),
    dict(kernel_size=3, padding=2, dilation=2, groups=2),
    dict(kernel_size=3, padding="same"),
    dict(kernel_size=3, padding=1, padding_mode="reflect"),
)


def kept_by(function: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What a function returns, and how many bytes are kept for its way back, weights aside."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = function()
    return outputs, sum(kept.values())


def gradient_of(outputs: Tensor, inputs: Tensor) -> Tensor:
    weights = torch.linspace(-1, 2, outputs.numel()).view(outputs.shape).to(outputs)
    return torch.autograd.grad((outputs * weights).sum(), inputs)[0]


def frozen_convolution(**options) -> tuple[nn.Conv2d, nn.Conv2d]:
    """PyTorch's, and ours with the same weights."""
    plain = nn.Conv2d(4, 6, **options).requires_grad_(False)
    ours = copy.deepcopy(plain)
    forget_inputs(ours)
    assert type(ours) is FrozenConv2d
    return plain, ours


LAYOUTS = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images", [0, 2])
def test_a_frozen_convolution_is_pytorchs(options: dict, layout: torch.memory_format, images: int) -> None:
    plain, ours = (layer.to(memory_format=layout) for layer in frozen_convolution(**options))
    inputs = torch.randn(images, 4, 9, 8).to(memory_format=layout).requires_grad_()
    assert_close(ours(inputs), plain(inputs))
    assert_close(gradient_of(ours(inputs), inputs), gradient_of(plain(inputs), inputs))


def test_a_single_image_without_a_batch_is_convolved_too() -> None:
    plain, ours = frozen_convolution(kernel_size=3)
    image = torch.randn(4, 6, 6, requires_grad=True)
    assert_close(gradient_of(ours(image), image), gradient_of(plain(image), image))


def test_its_gradient_is_that_of_finite_differences() -> None:
    _, ours = frozen_convolution(kernel_size=3, stride=2, padding=1)
    assert torch.autograd.gradcheck(ours.double(), torch.randn(1, 4, 5, 5, dtype=torch.double, requires_grad=True))


def test_its_inputs_are_not_kept() -> None:
    plain, ours = frozen_convolution(kernel_size=3, padding=1)
    leaf = torch.randn(2, 4, 8, 8, requires_grad=True)
    inputs = leaf * 1.0  # which keeps nothing itself
    assert kept_by(lambda: plain(inputs))[1] == inputs.nbytes
    assert kept_by(lambda: ours(inputs))[1] == 0


@pytest.mark.parametrize("learned", ["weight", "bias"])
def test_a_convolution_that_learns_has_its_gradient(learned: str) -> None:
    plain, ours = frozen_convolution(kernel_size=3)
    inputs = torch.randn(2, 4, 8, 8, requires_grad=True)
    found = []
    for layer in (plain, ours):
        parameter = getattr(layer, learned).requires_grad_()
        outputs = layer(inputs)
        found.append(torch.autograd.grad(outputs.square().sum(), (inputs, parameter)))
    assert_close(found[1], found[0])


def normalization(**options) -> tuple[nn.Module, GroupNormSiLU]:
    """PyTorch's, and ours with the same weights."""
    plain = nn.GroupNorm(2, 4, **options).requires_grad_(False)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    ours = copy.deepcopy(plain)
    ours.__class__ = GroupNormSiLU
    return nn.Sequential(plain, nn.SiLU()), ours


@pytest.mark.parametrize("options", [{}, dict(affine=False), dict(eps=0.1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_normalisation_with_its_activation_is_pytorchs(options: dict, layout: torch.memory_format) -> None:
    plain, ours = normalization(**options)
    inputs = torch.randn(2, 4, 6, 5).to(memory_format=layout).requires_grad_()
    assert_close(ours(inputs), plain(inputs))
    assert_close(gradient_of(ours(inputs), inputs), gradient_of(plain(inputs), inputs))


def test_of_a_normalisation_only_the_inputs_are_kept() -> None:
    plain, ours = normalization()
    inputs = torch.randn(2, 4, 8, 8, requires_grad=True)
    statistics = 2 * 2 * 2 * inputs.element_size()  # mean and deviation of each group
    assert kept_by(lambda: plain(inputs))[1] == 2 * inputs.nbytes + statistics
    assert kept_by(lambda: ours(inputs))[1] == inputs.nbytes


def test_where_activations_are_kept_a_normalisation_keeps_what_pytorchs_does() -> None:
    plain, ours = normalization()
    inputs = torch.randn(2, 4, 8, 8, requires_grad=True)
    with keeping_activations():
        outputs, size = kept_by(lambda: ours(inputs))
    assert size == kept_by(lambda: plain(inputs))[1] > kept_by(lambda: ours(inputs))[1]
    assert_close(gradient_of(outputs, inputs), gradient_of(plain(inputs), inputs))


def test_its_gradient_is_that_of_finite_differences_too() -> None:
    _, ours = normalization()
    assert torch.autograd.gradcheck(ours.double(), torch.randn(1, 4, 3, 3, dtype=torch.double, requires_grad=True))


def test_a_normalisation_that_learns_has_its_gradient() -> None:
    plain, ours = normalization()
    inputs = torch.randn(2, 4, 8, 8, requires_grad=True)
    found = []
    for layer in (plain, ours):
        learned = list(layer.requires_grad_().parameters())
        found.append(torch.autograd.grad(layer(inputs).square().sum(), (inputs, *learned)))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("kind", [normalization, lambda: frozen_convolution(kernel_size=3, padding=1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_layers_under_autocast_are_pytorchs(kind: Callable, dtype: torch.dtype) -> None:
    plain, ours = kind()
    inputs = torch.randn(2, 4, 8, 8, dtype=dtype, requires_grad=True)
    found = []
    for layer in (plain, ours):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = layer(inputs)
        found.append((outputs, gradient_of(outputs, inputs)))
    assert found[1][1].dtype == dtype
    assert_close(found[1], found[0])


@pytest.fixture(scope="module")
def decoders() -> tuple[AutoencoderKL, AutoencoderKL]:
    """An autoencoder with the blocks of Stable Diffusion's as diffusers has it, and ours."""
    torch.manual_seed(0)
    plain = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=4,
    ).requires_grad_(False).eval()  # fmt: skip
    ours = copy.deepcopy(plain)
    forget_inputs(ours)
    join_activations(ours)
    return plain, ours


def test_the_decoder_is_that_of_diffusers(decoders) -> None:
    plain, ours = decoders
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    images = [vae.decode(latents).sample for vae in decoders]
    assert_close(images[1], images[0])
    expected = gradient_of(images[0], latents)
    assert_close(gradient_of(images[1], latents), expected)
    assert_close(ours.encode(images[0]).latent_dist.mean, plain.encode(images[0]).latent_dist.mean)
    with torch.no_grad():
        assert_close(ours.decode(latents).sample, images[0])
    again = checkpoint(lambda z: ours.decode(z).sample, latents, use_reentrant=False)
    assert_close(gradient_of(again, latents), expected)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_the_decoder_keeps_less_than_two_fifths(decoders) -> None:
    """Of a residual block: the inputs of two normalizations, not those of SiLU and convolutions too."""
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    plain, ours = (kept_by(lambda vae=vae: vae.decode(latents).sample)[1] for vae in decoders)
    assert 0.2 * plain < ours < 0.4 * plain


def test_the_authors_networks_keep_what_pytorchs_do(decoders) -> None:
    """The baseline of the benchmarks has nothing of this."""
    plain, ours = decoders
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    own = [type(module) for module in ours.modules()]
    with pytest.raises(KeyError), layers_that_keep(ours):
        (images, kept), (expected, kept_by_plain) = (
            kept_by(lambda vae=vae: vae.decode(latents).sample) for vae in (ours, plain)
        )
        assert kept == kept_by_plain
        assert_close(images, expected)
        raise KeyError
    assert [type(module) for module in ours.modules()] == own


def test_another_activation_stays_as_it_is() -> None:
    vae = AutoencoderKL(act_fn="gelu", block_out_channels=(8,), norm_num_groups=4)
    join_activations(vae)
    blocks = [module for module in vae.modules() if hasattr(module, "nonlinearity")]
    assert blocks and all(isinstance(block.nonlinearity, nn.GELU) for block in blocks)
    assert [type(norm) for norm in (vae.decoder.conv_norm_out, blocks[0].norm1)] == [GroupNormSiLU, nn.GroupNorm]


def test_the_networks_of_a_model_keep_less(tmp_path: Path) -> None:
    model = StableDiffusion(str(build_tiny_pipeline(tmp_path)))
    model.load()
    for network in (model.unet, model.vae):
        assert {type(module) for module in network.modules() if isinstance(module, nn.Conv2d)} == {FrozenConv2d}
    assert any(isinstance(module, GroupNormSiLU) for module in model.vae.modules())
    assert not any(isinstance(module, GroupNormSiLU) for module in model.unet.modules())

    latents, timestep = model.noise(torch.arange(2)), torch.tensor(300)
    conditioning = model.encode(["a chef"]).detach().requires_grad_()
    of_diffusers = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet").requires_grad_(False).eval()
    found = [
        (prediction, gradient_of(prediction, conditioning))
        for prediction in (
            model.denoise(latents, timestep, conditioning),
            of_diffusers(latents, timestep, conditioning.expand(2, -1, -1)).sample,
        )
    ]
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_sampler_that_computes_nothing_again_keeps_the_decoders_activations(tmp_path: Path) -> None:
    model = StableDiffusion(str(build_tiny_pipeline(tmp_path)))
    model.load()
    latents = torch.randn(2, *model.latent_shape, requires_grad=True)
    kept, less = (kept_by(lambda s=s: s.decode(model, latents)) for s in (Sampler(checkpoint=False), Sampler()))
    assert less[1] < 0.7 * kept[1]
    assert_close(gradient_of(less[0], latents), gradient_of(kept[0], latents))
