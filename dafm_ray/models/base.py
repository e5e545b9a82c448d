"""The FrozenModel contract: everything the rest of the package knows of a sub-model.

Shape letters: B batch, R distinct references, Q queries, N candidates, D feature width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dafm_ray.errors import ConfigError

RANDOM = frozenset({"random", "random-tiny"})
"""Weights that are no file: random ones of the published size, or of a tiny one, for tests."""


@dataclass(frozen=True)
class ModelId:
    """`family:variant@weights`, as in `clip4cir:combiner@clip.pt+combiner.pt`.

    Attributes:
        family: a row of the registry.
        variant: what the family offers, as `sum` or `combiner`.
        weights: a path, a URI, a `package://` address, several of them joined with `+`, an
            open_clip tag `architecture/pretrained`, `random` (published size) or `random-tiny`.
    """

    family: str
    variant: str
    weights: str

    @staticmethod
    def parse(text: str) -> "ModelId":
        """Parse an id; ConfigError says what is missing."""
        family, colon, rest = text.partition(":")
        variant, at, weights = rest.partition("@")
        if not (colon and at and family and variant and weights):
            raise ConfigError(
                f"{text!r} is not a model id; write family:variant@weights, "
                "as in clip4cir:sum@weights.safetensors"
            )
        return ModelId(family, variant, weights)

    def __str__(self) -> str:
        return f"{self.family}:{self.variant}@{self.weights}"


@dataclass(frozen=True)
class Contrast:
    """Queries that shall find their own target among the targets of the batch.

    Attributes:
        weight: of its cross-entropy in the loss.
        scale: factor on the scores before the softmax.
        queries: (B, ...) features.
        candidates: (B, ...) features of the targets, row by row.
    """

    weight: float
    scale: Tensor | float
    queries: Tensor
    candidates: Tensor


@dataclass(frozen=True)
class Terms:
    """What a family's training loss is made of.

    Attributes:
        contrasts: cross-entropies against the targets of all workers.
        penalties: name -> (weight, value) of what concerns this worker's batch alone.
    """

    contrasts: Mapping[str, Contrast]
    penalties: Mapping[str, tuple[float, Tensor]] = field(default_factory=dict)


class FrozenModel(ABC):
    """A composed-retrieval model with fixed weights.

    `encode_*` leave gradients as the caller set them, so that the fine-tune jobs use the same
    code as the frozen pools. Results for one item do not depend on its batch, to rounding.

    Attributes:
        variants: what may stand after the family's name.
        runs_here: False where another process computes, on what it takes for itself.
        loss_weights: what a training job may set under `loss`, with the published values.
        module: the weights; moved, frozen and put in evaluation mode by the caller.
    """

    variants: ClassVar[tuple[str, ...]]
    runs_here: ClassVar[bool] = True
    loss_weights: ClassVar[Mapping[str, float]] = {}
    module: nn.Module

    @classmethod
    def gpus_elsewhere(cls) -> float:
        """GPUs that the other process of a model takes."""
        return 0.0

    @classmethod
    def offers(cls, variant: str) -> bool:
        """Whether the family knows a variant."""
        return variant in cls.variants

    @property
    def parameters(self) -> int:
        """How many weights there are."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def uses_reference(self) -> bool:
        """Whether queries need their reference image; text-only models say False."""
        return True

    @classmethod
    @abstractmethod
    def load(cls, model_id: ModelId) -> Self:
        """Build the model and load its weights on the CPU.

        Raises:
            DataError: the weights do not fit.
        """

    @classmethod
    def start(
        cls,
        model_id: ModelId,
        scratch: Mapping[str, Any],
        captions: Sequence[Sequence[str]],
        seed: int,
    ) -> Self:
        """Build the model to be trained: weights that exist are loaded, new parts are random.

        Args:
            model_id: weights `scratch` start from nothing.
            scratch: sizes of what is new, as the family documents them.
            captions: of every training query, for a vocabulary.
            seed: of the initialisation.
        """
        raise ConfigError(f"{model_id.family} cannot be trained")

    def terms(
        self,
        references_B3HW: Tensor,
        captions_B: Sequence[str],
        targets_B3HW: Tensor,
        logit_scale: float,
        weights: Mapping[str, float],
    ) -> Terms:
        """The training loss of a batch of triplets: in-batch contrast unless a family has more.

        Args:
            references_B3HW: reference of each query.
            captions_B: joined captions.
            targets_B3HW: target of each query.
            logit_scale: of families that do not learn theirs.
            weights: `loss_weights` with the job's own values.
        """
        index_B = torch.arange(len(references_B3HW), device=references_B3HW.device)
        queries = self.encode_queries(references_B3HW, index_B, captions_B)
        candidates = self.encode_gallery(targets_B3HW)
        return Terms({"rank": Contrast(1.0, logit_scale, queries, candidates)})

    def header(self) -> dict[str, Any]:
        """What a weights file must say besides its tensors so that `load` can build the model."""
        return {}

    @abstractmethod
    def preprocess(self, image: Image.Image) -> Tensor:
        """One decoded image in its stored colour mode -> (3, H, W) float32."""

    @abstractmethod
    def caption(self, captions: Sequence[str]) -> str:
        """Join the captions of one query as this model was trained."""

    def cuts(self, caption: str) -> bool:
        """Whether a joined caption is longer than the model reads; False where it cannot say."""
        return False

    @abstractmethod
    def encode_gallery(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, ...) candidate features, any fixed shape per item."""

    @abstractmethod
    def encode_queries(
        self, references_R3HW: Tensor, reference_index_B: Tensor, captions_B: Sequence[str]
    ) -> Tensor:
        """Fuse references and texts into query features.

        Args:
            references_R3HW: the distinct reference images of the batch.
            reference_index_B: int64, which of them each query uses.
            captions_B: joined captions, from `caption`.

        Returns:
            (B, ...) query features.
        """

    @staticmethod
    def score(query_features: Tensor, gallery_features: Tensor) -> Tensor:
        """(Q, ...) and (N, ...) -> (Q, N) scores, higher is better. Needs no weights.

        The dot product of (Q, D) and (N, D), unless a family has another.
        """
        return query_features @ gallery_features.T


def unit(features: Tensor) -> Tensor:
    """(..., D) -> each vector L2-normalised, in float32 under any autocast: half precision would
    leave lengths that differ by some tenths of a percent, and so the scores.
    """
    return F.normalize(features.float(), dim=-1)


Sizes = TypeVar("Sizes")


def scratch_sizes(
    kind: type[Sizes],
    scratch: Mapping[str, Any],
    vocab_size: int,
    known: Mapping[str, int] | None = None,
) -> Sizes:
    """Sizes of new towers, from `scratch.towers` of a training job.

    Args:
        kind: the family's dataclass of sizes.
        scratch: of the job.
        vocab_size: of the vocabulary.
        known: sizes of a tower that exists, which `scratch.towers` need not repeat.

    Raises:
        ConfigError: a size is missing, unknown or impossible.
    """
    try:
        towers = dict(scratch["towers"])
        sizes = kind(**{**(known or {}), **towers, "vocab_size": vocab_size})
    except (KeyError, TypeError, ValueError) as error:
        fields = f"the fields of {kind.__name__}"
        raise ConfigError(f"scratch.towers must hold {fields}: {error}") from None
    for key, value in (known or {}).items():
        if towers.get(key, value) != value:
            found = f"scratch.towers.{key} is {towers[key]}"
            raise ConfigError(f"{found}, but {value} in scratch.vision; leave it out")
    for key, value in towers.items():
        several = value if isinstance(value, list) else [value]
        # A patch of 0 stands for a convolutional tower.
        if not all(type(n) is int and n >= (key != "patch_size") for n in several):
            raise ConfigError(f"scratch.towers.{key} is {value}; it must be whole and above 0")
    for part, whole in (
        *((key, key.replace("heads", "width")) for key in towers if key.endswith("heads")),
        ("patch_size", "image_size"),
    ):
        if towers.get(part) and whole in towers and towers[whole] % towers[part]:
            raise ConfigError(f"scratch.towers.{whole} must be a multiple of {part}")
    return sizes
