"""From a decoded image to the input of a frozen network: resize and normalize, differentiably.

The numbers come from the network's own preprocessor_config.json, as Hugging Face writes it.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as Hugging Face writes it


class Preprocessing(nn.Module):
    """Resize to the network's input size and normalize by its mean and standard deviation.

    Args:
        size: Height and width of the network's input, in pixels.
        mean: Mean of each channel, for images in [0, 1].
        deviation: Standard deviation of each channel.
        mode: Interpolation, bilinear or bicubic.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, size: tuple[int, int], mean: list[float], deviation: list[float], mode: str = "bilinear"
    ) -> None:
        super().__init__()
        self.size, self.mode = size, mode
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation)[:, None, None], persistent=False)

    @classmethod
    def from_file(cls, file: str | Path) -> "Preprocessing":
        """Read a preprocessor_config.json.

        Raises:
            ValueError: If the file is not JSON, or lacks a size, a mean or a standard deviation.
        """
        try:
            config = json.loads(Path(file).read_text(encoding="utf-8"))
            crops = config.get("do_center_crop", True) and config.get("crop_size")
            size = crops or config["size"]
            if isinstance(size, dict):
                size = (size["height"], size["width"]) if "height" in size else (size["shortest_edge"],) * 2
            else:
                size = (size, size)
            mode = "bicubic" if config.get("resample") == BICUBIC else "bilinear"
            if not config.get("do_normalize", True):
                return cls(size, [0.0] * 3, [1.0] * 3, mode)
            return cls(size, config["image_mean"], config["image_std"], mode)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from None
        except AttributeError:
            raise ValueError(f"{file} does not contain a JSON object") from None
        except KeyError as missing:
            raise ValueError(f"{file} lacks {missing}, which the preprocessing of images needs") from None

    def forward(self, images: Tensor) -> Tensor:
        """Map images with shape (N, 3, H, W), in [0, 1], to network input with shape (N, 3, h, w)."""
        if images.shape[-2:] != self.size:
            images = interpolate(images, self.size, mode=self.mode, antialias=True, align_corners=False)
        return (images - self.mean) / self.deviation
