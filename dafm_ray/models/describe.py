"""What a family is and costs, without its weights; and whether a weights file fits it."""

import inspect
from collections import Counter
from collections.abc import Iterator

import torch

from dafm_ray.errors import ConfigError
from dafm_ray.models.base import FrozenModel, ModelId
from dafm_ray.models.checkpoints import read_checkpoint
from dafm_ray.models.registry import family, load_model

FLOAT_BYTES = 4


def describe(name: str) -> Iterator[str]:
    """Lines about a family: what its variants read, and what the published size costs.

    Args:
        name: `family` or `family:variant`.

    Raises:
        ConfigError: no such family or variant.
    """
    found, variants = _named(name)
    label = name.partition(":")[0]
    yield f"{label}: {_first_paragraph(found)}"
    yield f"weights: {_first_paragraph(found.load)}"
    for variant in variants:
        try:
            with torch.device("meta"):
                model = found.load(ModelId(label, variant, "random"))
        except ConfigError as error:
            yield f"{label}:{variant}: {error}"
            continue
        model.module.eval()
        side = _side(model)
        with torch.inference_mode(), torch.device("meta"):
            features = model.encode_gallery(torch.empty(1, 3, side, side))
        shape = " x ".join(str(size) for size in features.shape[1:])
        size = FLOAT_BYTES * features[0].numel()
        yield (
            f"{label}:{variant}: {model.parameters / 1e6:,.1f} M parameters, {side} pixels, "
            f"{shape} floats ({size:,} bytes) a gallery item"
        )


def check(name: str, weights: str) -> Iterator[str]:
    """Lines about a weights file: what it holds, and that it fits.

    Args:
        name: `family:variant`.
        weights: as in a model id.

    Raises:
        ConfigError: no such family or variant.
        DataError: the file cannot be read, or lacks, adds or mis-shapes tensors; they are named.
    """
    _, variants = _named(name)
    label, colon, _ = name.partition(":")
    if not colon and len(variants) > 1:
        choices = ", ".join(f"{label}:{variant}" for variant in variants)
        raise ConfigError(f"{name!r} has several variants; name one of {choices}")
    checkpoint = read_checkpoint(weights)
    sections = Counter(key.split(".")[0] for key in checkpoint.tensors)
    types = Counter(str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values())
    for what, counts in (("holds", sections), ("types", types)):
        yield f"{what}: " + ", ".join(f"{key} ({n:,} tensors)" for key, n in counts.most_common(8))
    model = load_model(f"{label}:{variants[0]}@{weights}")
    size = f"{model.parameters / 1e6:,.1f} M parameters, {_side(model)} pixels"
    yield f"fits {label}:{variants[0]}: {size}"


def _named(name: str) -> tuple[type[FrozenModel], tuple[str, ...]]:
    label, colon, variant = name.partition(":")
    found = family(label)
    if not colon:
        return found, found.variants
    if not found.offers(variant):
        raise ConfigError(f"{label} offers the variants {', '.join(found.variants)}")
    return found, (variant,)


def _side(model: FrozenModel) -> int:
    from PIL import Image

    with torch.device("cpu"):
        return int(model.preprocess(Image.new("RGB", (64, 64))).shape[-1])


def _first_paragraph(thing: object) -> str:
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
