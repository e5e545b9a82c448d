"""Composed retrieval without training for it, on the two towers of a CLIP model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from dafm_ray.errors import ConfigError, DataError
from dafm_ray.models.base import RANDOM, Contrast, FrozenModel, ModelId, Terms, scratch_sizes, unit
from dafm_ray.models.captions import join_capitalised, join_stripped
from dafm_ray.models.checkpoints import Checkpoint, load_strictly, read_checkpoint
from dafm_ray.models.clip4cir import towers_of
from dafm_ray.models.clip_towers import (
    RN50X4,
    TINY,
    TowerSizes,
    build_towers,
    token_ids,
    tokenize,
    vocabulary_of,
)
from dafm_ray.models.initialisation import seeded
from dafm_ray.models.inversion import (
    PLACEHOLDER,
    PREFIX,
    STEPS,
    Phi,
    Towers,
    encode_with_words,
    optimised_words,
)
from dafm_ray.models.open_clip_tags import HEADER, OpenClipModel, is_tag
from dafm_ray.models.preprocess import target_pad, to_tensor

IMAGE_SHARE = 0.5
"""Share of the image in `sum`; `sum=0.3` has another one."""

TEMPLATE = "that {}"
"""What follows the pseudo-word in a query's sentence."""

_ORDERS = "\n"
"""Stands between the orders of a query's captions."""


class Weights(nn.Module):
    """CLIP's towers, and the network of textual inversion where a variant has one."""

    def __init__(self, towers: nn.Module, phi: Phi | None) -> None:
        super().__init__()
        self.CLIP = towers
        self.Phi = phi


class OwnTowers:
    """Towers from a file that says how to build them, as CLIP4CIR's and our own.

    Args:
        module: an `open_clip.model.CLIP`.
        sizes: of the towers.
        vocabulary: sorted CLIP ids that a small model knows; None for all.
    """

    def __init__(
        self, module: nn.Module, sizes: TowerSizes, vocabulary: Sequence[int] | None
    ) -> None:
        self.module: Any = module
        self.sizes = sizes
        self.vocabulary = vocabulary
        self.context_length = sizes.context_length
        self.embed_dim = sizes.embed_dim

    @property
    def token_embedding(self) -> nn.Embedding:
        """Words of the text encoder."""
        embedding: nn.Embedding = self.module.token_embedding
        return embedding

    def preprocess(self, image: Image.Image) -> Tensor:
        """TargetPad 1.25, bicubic resize, centre crop, CLIP statistics."""
        return to_tensor(image, self.sizes.image_size, target_pad)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, T) int64; longer ones are cut."""
        return tokenize(texts, self.context_length, self.vocabulary)

    def cuts(self, text: str) -> bool:
        """Whether a text has more tokens than the context, its start and end included."""
        return len(token_ids(text)) + 2 > self.context_length

    def encode_images(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), not normalised."""
        features: Tensor = self.module.encode_image(images_B3HW)
        return features

    def encode_tokens(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) -> (B, D), not normalised."""
        features: Tensor = self.module.encode_text(tokens_BT)
        return features

    def header(self) -> dict[str, Any]:
        """What a weights file must say so that the towers can be built again."""
        return {"sizes": self.sizes.to_json(), "vocabulary": self.vocabulary}


class ZeroShot(FrozenModel):
    """Queries from CLIP's two towers: `image` or `text` alone, their `sum` (`sum=0.3`: the image
    counts three tenths), the image as a word of the sentence by a network (`searle`) or by an
    optimisation (`oti`; `oti=100`: of a hundred steps), or the text feature before its projection
    (`hidden`).

    Reads any model of open_clip, as `ViT-L-14/openai`, and the towers of every file that CLIP4CIR's
    loader reads. `searle` adds a file with the network, as in `zeroshot:searle@clip.pt+phi.pt`.
    """

    variants = ("image", "text", "sum", "searle", "oti", "hidden")
    module: Weights

    def __init__(self, towers: Towers, variant: str, phi: Phi | None = None) -> None:
        name, _, option = variant.partition("=")
        self.variant = name
        self.share = float(option) if option and name == "sum" else IMAGE_SHARE
        self.steps = int(option) if option and name == "oti" else STEPS
        self.towers = towers
        self.module = Weights(towers.module, phi)
        if name == "hidden":
            self._refuse_unprojectable()

    @classmethod
    def offers(cls, variant: str) -> bool:
        """The variants, `sum=SHARE` with a share of the image from 0 to 1, and `oti=STEPS`."""
        name, equals, option = variant.partition("=")
        if not equals:
            return name in cls.variants
        try:
            if name == "oti":
                return int(option) >= 1
            return name == "sum" and 0 <= float(option) <= 1
        except ValueError:
            return False

    @classmethod
    def load(cls, model_id: ModelId) -> Self:
        """Load a model of open_clip by its tag, towers from the files of CLIP4CIR and our own, or
        random ones; `searle` needs `Phi` beside them.
        """
        if model_id.weights in RANDOM:
            sizes = TINY if model_id.weights == "random-tiny" else RN50X4
            own = OwnTowers(seeded(0, lambda: build_towers(sizes)), sizes, None)
            return cls(own, model_id.variant, _new_phi(own, 0) if _inverts(model_id) else None)
        towers, beside = _towers_at(model_id.weights)
        return cls(towers, model_id.variant, _phi_of(beside) if _inverts(model_id) else None)

    @classmethod
    def start(
        cls,
        model_id: ModelId,
        scratch: Mapping[str, Any],
        captions: Sequence[Sequence[str]],
        seed: int,
    ) -> Self:
        """`scratch` holds `towers` (fields of `TowerSizes`). A network of textual inversion that
        the weights do not hold is new.
        """
        towers: Towers
        if model_id.weights == "scratch":
            spoken = [join_stripped(texts) for texts in captions]
            vocabulary = vocabulary_of([*spoken, PREFIX, PLACEHOLDER, TEMPLATE])
            sizes = scratch_sizes(TowerSizes, scratch, len(vocabulary))
            towers = OwnTowers(seeded(seed, lambda: build_towers(sizes)), sizes, vocabulary)
            beside = Checkpoint({})
        else:
            towers, beside = _towers_at(model_id.weights)
        phi = None
        if _inverts(model_id):
            has = any(key.startswith("Phi.") for key in beside.tensors)
            phi = _phi_of(beside) if has else _new_phi(towers, seed)
        return cls(towers, model_id.variant, phi)

    @property
    def uses_reference(self) -> bool:
        """False for the text alone."""
        return self.variant not in ("text", "hidden")

    def header(self) -> dict[str, Any]:
        """What a weights file must say besides its tensors so that it can be built again."""
        return self.towers.header()

    def preprocess(self, image: Image.Image) -> Tensor:
        """As the towers were trained."""
        return self.towers.preprocess(image)

    def caption(self, captions: Sequence[str]) -> str:
        """As CLIP4CIR joins them; for a pseudo-word, both orders of the captions, a line each."""
        if self.variant not in ("searle", "oti"):
            return join_capitalised(captions)
        orders = dict.fromkeys([join_stripped(captions), join_stripped(captions[::-1])])
        return _ORDERS.join(orders)

    def cuts(self, caption: str) -> bool:
        """Whether a sentence is longer than the context of the towers."""
        begin = f"{PREFIX} {PLACEHOLDER} " if self.variant in ("searle", "oti") else ""
        read = TEMPLATE if begin else "{}"
        return any(self.towers.cuts(begin + read.format(one)) for one in caption.split(_ORDERS))

    def encode_gallery(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), L2-normalised."""
        return unit(self.towers.encode_images(images_B3HW))

    def encode_texts(self, texts_B: Sequence[str]) -> Tensor:
        """B texts -> (B, D), not normalised."""
        device = next(self.module.parameters()).device
        return self.towers.encode_tokens(self.towers.tokens(texts_B).to(device))

    def encode_queries(
        self, references_R3HW: Tensor, reference_index_B: Tensor, captions_B: Sequence[str]
    ) -> Tensor:
        """(B, D), L2-normalised; see `compose`."""
        if not self.uses_reference:
            return self.compose(None, captions_B)
        features_RD = self.towers.encode_images(references_R3HW)
        if self.variant == "oti":
            words_RW = optimised_words(self.towers, features_RD, self.steps)
            return self.read(words_RW[reference_index_B], captions_B)
        return self.compose(features_RD[reference_index_B], captions_B)

    def compose(self, image_BD: Tensor | None, captions_B: Sequence[str]) -> Tensor:
        """Queries from the image features of their references.

        Args:
            image_BD: not normalised; None for the text alone.
            captions_B: from `caption`.

        Returns:
            (B, D), L2-normalised.
        """
        if self.variant == "hidden":
            with _without_projection(self.towers.module):
                return unit(self.encode_texts(captions_B))
        if self.variant == "text" or image_BD is None:
            return unit(self.encode_texts(captions_B))
        if self.variant == "image":
            return unit(image_BD)
        if self.variant == "sum":
            text_BD = unit(self.encode_texts(captions_B))
            return unit(self.share * unit(image_BD) + (1 - self.share) * text_BD)
        return self.read(self.words(image_BD), captions_B)

    def words(self, image_BD: Tensor) -> Tensor:
        """(B, D) image features -> (B, W) pseudo-words."""
        assert self.module.Phi is not None
        words_BW: Tensor = self.module.Phi(image_BD)
        return words_BW

    def read(self, words_BW: Tensor, captions_B: Sequence[str]) -> Tensor:
        """ "a photo of $ that {caption}" with a pseudo-word, averaged over the orders of the
        captions: (B, D), L2-normalised.
        """
        readings = [
            (b, order) for b, caption in enumerate(captions_B) for order in caption.split(_ORDERS)
        ]
        own_M = torch.tensor([b for b, _ in readings], device=words_BW.device)
        rests = [TEMPLATE.format(order) for _, order in readings]
        text_MD = unit(encode_with_words(self.towers, rests, words_BW[own_M]))
        total_BD = text_MD.new_zeros(len(captions_B), text_MD.shape[1])
        return unit(total_BD.index_add(0, own_M, text_MD))

    def terms(
        self,
        references_B3HW: Tensor,
        captions_B: Sequence[str],
        targets_B3HW: Tensor,
        logit_scale: float,
        weights: Mapping[str, float],
    ) -> Terms:
        """Contrast with CLIP's own scale; `text` also asks for the text of each image, as CLIP was
        trained.
        """
        scale = self.logit_scale()
        candidates = self.encode_gallery(targets_B3HW)
        if self.variant == "text":
            texts = self.compose(None, captions_B)
            return Terms(
                {
                    "text": Contrast(0.5, scale, texts, candidates),
                    "image": Contrast(0.5, scale, candidates, texts),
                }
            )
        index_B = torch.arange(len(references_B3HW), device=references_B3HW.device)
        queries = self.encode_queries(references_B3HW, index_B, captions_B)
        return Terms({"rank": Contrast(1.0, scale, queries, candidates)})

    def logit_scale(self) -> Tensor:
        """CLIP's factor on cosines, at most 100."""
        scale: Tensor = self.towers.module.logit_scale
        return scale.exp().clamp(max=100)

    def _refuse_unprojectable(self) -> None:
        with torch.no_grad():
            text_width = self.compose(None, [""]).shape[1]
        if text_width != self.towers.embed_dim:
            raise ConfigError(
                f"zeroshot:hidden skips the text projection, so the text width ({text_width}) must "
                f"be the embedding width ({self.towers.embed_dim}); take towers that have it so"
            )


def _inverts(model_id: ModelId) -> bool:
    return model_id.variant == "searle"


def _towers_at(weights: str) -> tuple[Towers, Checkpoint]:
    """The towers, and what the files hold besides."""
    first, _, rest = weights.partition("+")
    if is_tag(first):
        beside = read_checkpoint(rest) if rest else Checkpoint({}, where=first)
        return OpenClipModel.load(first), beside
    checkpoint = read_checkpoint(weights)
    if HEADER in checkpoint.metadata:
        towers = OpenClipModel.recorded(checkpoint.metadata[HEADER], checkpoint.where)
        load_strictly(towers.module, checkpoint.section("CLIP"), checkpoint.where)
        return towers, checkpoint
    module, sizes = towers_of(checkpoint)
    return OwnTowers(module, sizes, checkpoint.metadata.get("vocabulary")), checkpoint


def _new_phi(towers: Towers, seed: int) -> Phi:
    word_width = towers.token_embedding.weight.shape[1]
    return seeded(seed, lambda: Phi(towers.embed_dim, word_width))


def _phi_of(checkpoint: Checkpoint) -> Phi:
    tensors = checkpoint.section("Phi")
    try:
        width = tensors["layers.0.weight"].shape[1]
        phi = Phi(width, tensors["layers.6.weight"].shape[0])
    except KeyError as error:
        raise DataError(
            f"{checkpoint.where} holds no network of textual inversion: {error}"
        ) from None
    load_strictly(phi, tensors, checkpoint.where)
    return phi


@contextmanager
def _without_projection(towers: nn.Module) -> Iterator[None]:
    """Within the block, texts are not projected into the joint space."""
    text: Any = towers if hasattr(towers, "text_projection") else towers.text
    projection = text.text_projection
    text.text_projection = None
    try:
        yield
    finally:
        text.text_projection = projection
