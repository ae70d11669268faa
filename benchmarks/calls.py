"""What the ways of a step take by count: floating point operations of the U-Net, call by call.

    python -m benchmarks.calls --scale sd15-cpu

A call of all images in both branches of guidance is counted forward, forward and back, and with blocks made again, and
a step is put together from that. The unit is a sampling pass of the authors', whose every image has keys of its own.
"""

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.networks import SCALES, parts


def counted(function: Callable[[], None]) -> int:
    """Floating point operations of `function`."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def calls(unet: nn.Module, images: int, size: int, length: int) -> dict[str, float]:
    """Sampling passes of the U-Net in a step, by way.

    Args:
        unet: a `UNet2DConditionModel` in which images can share prompts.
        images: N.
        size: height and width of a latent.
        length: tokens of a prompt.
    """
    latents, timestep = torch.randn(2 * images, 4, size, size), torch.tensor(500)
    # The layers before the first that reads a prompt are not gone back through, so latents need no gradient.
    prompts = {rows: torch.randn(rows, length, unet.config.cross_attention_dim) for rows in (1, 2, 2 * images)}

    @torch.no_grad()
    def forward(rows: int) -> None:
        unet(latents, timestep, prompts[rows])

    def there_and_back(rows: int) -> None:
        unet(latents, timestep, 1 * prompts[rows].requires_grad_()).sample.sum().backward()

    each = counted(lambda: forward(2 * images))
    unet.enable_gradient_checkpointing()
    blocks_again = counted(lambda: there_and_back(2 * images)) / each
    unet.disable_gradient_checkpointing()
    sampling = counted(lambda: forward(2)) / each  # a row for the prompt, and one for the empty one
    again = counted(lambda: there_and_back(1)) / each  # a branch at a time
    kept = counted(lambda: there_and_back(2)) / each
    return {
        "authors": 2 + blocks_again,
        "exact, cold": 2 * sampling + again,
        "exact, warm": sampling + again,
        "exact, activations kept, warm": kept,
        "a quarter of the steps, cold": 2 * sampling + again / 4,
        "a quarter of the steps, warm": sampling + again / 4,
        "a quarter of the steps, activations kept, cold": 1.75 * sampling + kept / 4,
        "a quarter of the steps, activations kept, warm": 0.75 * sampling + kept / 4,
    }


def main() -> None:
    """Count, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=[name for name in SCALES if "gpu" not in name], default="miniature")
    scale = SCALES[parser.parse_args().scale]
    generator = parts(scale)["generator"]
    generator.load()
    found = calls(generator.unet, scale.images, generator.latent_shape[-1], generator.encode([""]).shape[1])
    table = Table("way", "U-Net passes", "of the authors'")
    for name, passes in found.items():
        table.add_row(name, f"{passes:.2f}", f"{passes / found['authors']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
