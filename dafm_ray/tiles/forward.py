"""A sub-model at work: on its device, in its precision, batch by batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dafm_ray.config import Precision
from dafm_ray.errors import DataError, MachineError
from dafm_ray.models.base import FrozenModel
from dafm_ray.tiles.blocks import Array

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

GPU_THREADS = 4
"""Preprocess the next batches while a GPU encodes; on a CPU the one thread is busy anyway."""

Picture = Image.Image | str | Callable[[], Image.Image]
"""A decoded image, why it is unusable, or what decodes it."""

Map = Callable[[Callable[[Picture], Tensor], Iterable[Picture]], Iterable[Tensor]]


def device_of(num_gpus: float) -> str:
    """`cuda` where an actor has a share of a GPU, else `cpu`.

    Raises:
        MachineError: the cluster gave a GPU that torch cannot use.
    """
    if not num_gpus:
        return "cpu"
    if not torch.cuda.is_available():
        raise MachineError(
            "a pool was given a GPU, but torch sees none: install a torch with CUDA, or set "
            "num_gpus to 0"
        )
    return "cuda"


def precision_of(asked: Precision, device: str) -> Precision:
    """`auto` is float32 on CPUs, and on GPUs bfloat16, which cannot overflow, or else float16."""
    if asked != "auto":
        return asked
    if device == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


class Forward:
    """A frozen model on a device; convolutions get the channels-last layout.

    Args:
        model: its weights are moved.
        device: torch device.
        precision: of the forward passes; features are float32 in any.
        batch: items of one pass.

    Raises:
        MachineError: the model does not fit the GPU; also when it is called.
    """

    def __init__(self, model: FrozenModel, device: str, precision: Precision, batch: int) -> None:
        self.model = model
        self.device = device
        self.precision = precision
        self.batch = batch
        if device == "cuda" and precision == "fp32":
            torch.backends.cudnn.allow_tf32 = False  # convolutions would keep 10 bits
        with self._memory():
            model.module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._blank = torch.zeros_like(model.preprocess(Image.new("RGB", (64, 64))))

    def __call__(
        self,
        images: Sequence[Picture],
        image_index: Sequence[int],
        captions: Sequence[Sequence[str]] = (),
    ) -> Array:
        """Features of candidates, or of queries if there are captions.

        Args:
            images: distinct images in the order of their first use, or why one is unusable.
            image_index: which of them each item shows.
            captions: of each query.

        Returns:
            (items, ...) float32; NaN where the image is unusable.

        Raises:
            DataError: features of a usable image are no numbers.
        """
        with self._memory():
            features = self._encode(images, image_index, captions)
        usable = np.ones(len(image_index), dtype=np.bool_)
        if not captions or self.model.uses_reference:
            usable = np.array([not isinstance(images[n], str) for n in image_index])
        if not np.isfinite(features[usable]).all():
            raise DataError(
                f"the model gives features that are no numbers in {self.precision}; "
                "use precision bf16 or fp32, and check its weights"
            )
        features[~usable] = np.nan
        return features

    def _encode(
        self,
        images: Sequence[Picture],
        image_index: Sequence[int],
        captions: Sequence[Sequence[str]],
    ) -> Array:
        texts = [self.model.caption(given) for given in captions]
        prepared: list[Tensor] = []
        parts = []
        with self._mapping() as mapped, torch.inference_mode(), self._autocast():
            stream = iter(mapped(self._prepare, images))
            for start in range(0, len(image_index), self.batch):
                index = image_index[start : start + self.batch]
                used = sorted(set(index))
                while len(prepared) <= used[-1]:
                    prepared.append(next(stream))
                images_R3HW = self._stack([prepared[n] for n in used])
                if texts:
                    index_B = torch.tensor([used.index(n) for n in index], device=self.device)
                    captions_B = texts[start : start + self.batch]
                    parts.append(self.model.encode_queries(images_R3HW, index_B, captions_B))
                else:
                    parts.append(self.model.encode_gallery(images_R3HW))
        features: Array = torch.cat(parts).float().cpu().numpy()
        return features

    @contextmanager
    def _memory(self) -> Iterator[None]:
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            raise MachineError(
                f"the GPU's memory does not hold this model with a batch of {self.batch}; set a "
                "smaller batch (a store that has begun keeps its own: give the model another "
                "name), or let fewer actors share a GPU"
            ) from None

    @contextmanager
    def _mapping(self) -> Iterator[Map]:
        if self.device == "cpu":
            yield map
            return
        with ThreadPoolExecutor(GPU_THREADS) as threads:
            yield threads.map

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST.get(self.precision)
        return torch.autocast(torch.device(self.device).type, dtype, enabled=dtype is not None)

    def _prepare(self, image: Picture) -> Tensor:
        if isinstance(image, str):
            return self._blank
        return self.model.preprocess(image() if callable(image) else image)

    def _stack(self, tensors: Sequence[Tensor]) -> Tensor:
        stacked_R3HW = torch.stack(tuple(tensors))
        return stacked_R3HW.to(self.device, memory_format=torch.channels_last)
