"""Image preprocessing of the published models, on PIL and numpy.

Padding, resizing and cropping act on the stored colour mode and the conversion to RGB follows, as
in the published pipelines; palette and RGBA images would come out differently otherwise.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TARGET_RATIO = 1.25

Pad = Callable[[Image.Image], Image.Image]


def target_pad(image: Image.Image) -> Image.Image:
    """CLIP4CIR's TargetPad: zeros until the aspect ratio is 1.25; narrower ratios stay."""
    long, short = max(image.size), min(image.size)
    return image if long / short < TARGET_RATIO else _pad_to(image, long / TARGET_RATIO)


def square_pad(image: Image.Image) -> Image.Image:
    """Zeros around the shorter side until the image is square (one pixel short for odd gaps)."""
    return _pad_to(image, max(image.size))


def no_pad(image: Image.Image) -> Image.Image:
    """CLIP's own transform does not pad."""
    return image


def to_tensor(image: Image.Image, size: int, pad: Pad = target_pad) -> Tensor:
    """Pad, resize the short side (bicubic, antialiased), crop the centre, normalise.

    Args:
        image: any colour mode.
        size: side of the result in pixels.
        pad: `target_pad`, `square_pad` or `no_pad`.

    Returns:
        (3, size, size) float32, CLIP mean and standard deviation.
    """
    cropped = _centre_crop(_resize(pad(image), size), size)
    pixels_HW3 = np.array(cropped.convert("RGB"), dtype=np.float32)
    scaled_3HW = torch.from_numpy(pixels_HW3).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((scaled_3HW - mean) / std).contiguous()


def _pad_to(image: Image.Image, side: float) -> Image.Image:
    horizontal, vertical = (max(int((side - length) / 2), 0) for length in image.size)
    border = (horizontal, vertical, horizontal, vertical)
    return ImageOps.expand(image, border) if any(border) else image


def _resize(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    if width <= height:
        new = (size, int(size * height / width))
    else:
        new = (int(size * width / height), size)
    return image if new == image.size else image.resize(new, Image.Resampling.BICUBIC)


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    # round() rounds half to even, as the published pipelines do.
    left, top = (round((length - size) / 2) for length in image.size)
    return image.crop((left, top, left + size, top + size))
