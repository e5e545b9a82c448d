"""Any model of open_clip, named `architecture/pretrained`, as in `ViT-B-32/openai`.

`pretrained` is one of open_clip's tags, whose weights it finds in its cache or downloads; a weights
file, as in `ViT-B-32//data/clip.safetensors`; or `random`, for tests.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from dafm_ray.errors import DataError
from dafm_ray.models.initialisation import seeded
from dafm_ray.models.torchvision_ops import make_torchvision_importable

RANDOM_TAG = "random"
HEADER = "open_clip"
"""Key of a weights file's header: what `OpenClipModel.recorded` builds from."""

_NEAR = 0.8
"""Similarity above which a name is taken for a misspelt architecture, not for a folder."""


def is_tag(weights: str) -> bool:
    """Whether weights are `architecture/pretrained`, be the architecture misspelt; a file of that
    path comes first.
    """
    architecture, _, pretrained = weights.partition("/")
    if not (architecture and pretrained) or "://" in weights:
        return False
    return not Path(weights).is_file() and bool(_nearest(architecture))


def tag_digest(weights: str) -> str:
    """SHA-256 over the bytes of the weights and over what else decides on the features; `random`
    is its own digest.

    Raises:
        DataError: see `OpenClipModel.load`.
    """
    source = _Source.of(weights)
    if source.file is None:
        return weights
    settings = [source.architecture, source.quick_gelu, source.preprocess]
    hasher = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    with Path(source.file).open("rb") as file:
        hasher.update(hashlib.file_digest(file, "sha256").digest())
    return hasher.hexdigest()


class OpenClipModel:
    """A model of open_clip with its own pre-processing and tokenizer, on the CPU.

    Args:
        architecture: one of `open_clip.list_models()`.
        module: what `open_clip.create_model` makes of it.
        quick_gelu: its activation.

    Attributes:
        context_length: T of `tokens`.
        embed_dim: D of the features.
        preprocess_config: what `evaluation_transform` takes, plain values.
    """

    def __init__(self, architecture: str, module: nn.Module, quick_gelu: bool) -> None:
        self.architecture = architecture
        self.quick_gelu = quick_gelu
        self.module: Any = module
        known = architecture_config(architecture)
        self.context_length = int(known["text_cfg"]["context_length"])
        self.embed_dim = int(known["embed_dim"])
        visual: Any = module.visual
        self.preprocess_config: dict[str, Any] = dict(visual.preprocess_cfg)

    @classmethod
    def load(cls, weights: str, seed: int = 0) -> Self:
        """Build `architecture/pretrained`.

        Args:
            weights: as in a model id.
            seed: of `random` weights.

        Raises:
            DataError: there is no such architecture or tag, the weights cannot be downloaded, or
                they do not fit.
        """
        return cls._built(_Source.of(weights), weights, seed)

    @classmethod
    def recorded(cls, header: Mapping[str, Any], where: str) -> Self:
        """Build what `header` told, with random weights.

        Raises:
            DataError: the header is damaged, or this open_clip lacks the architecture.
        """
        try:
            source = _Source(
                header["architecture"], None, header["quick_gelu"], header["preprocess"]
            )
        except (KeyError, TypeError):
            raise DataError(f"the header of {where} does not say how to build its towers") from None
        architecture_config(source.architecture)
        return cls._built(source, where, 0)

    @classmethod
    def _built(cls, source: "_Source", where: str, seed: int) -> Self:
        import open_clip

        try:
            module = seeded(
                seed,
                lambda: open_clip.create_model(
                    source.architecture,
                    source.file,
                    device="cpu",
                    force_quick_gelu=source.quick_gelu,
                    force_preprocess_cfg=source.preprocess,
                    pretrained_text=False,
                    weights_only=True,
                ),
            )
        except Exception as error:  # whatever a broken file makes of the loader
            raise DataError(f"open_clip cannot build {where}: {error}") from None
        return cls(source.architecture, module, source.quick_gelu)

    @cached_property
    def _transform(self) -> Any:
        return evaluation_transform(self.preprocess_config)

    @cached_property
    def _tokenizer(self) -> Any:
        import open_clip

        try:
            return open_clip.get_tokenizer(self.architecture)
        except Exception as error:
            raise DataError(
                f"the tokenizer of {self.architecture} is not in the cache and cannot be "
                f"downloaded: {error}"
            ) from None

    @property
    def token_embedding(self) -> nn.Embedding:
        """(vocabulary, width) word embeddings of the text tower."""
        text = getattr(self.module, "text", self.module)
        found: nn.Embedding = (
            text.token_embedding
            if hasattr(text, "token_embedding")
            else text.transformer.get_input_embeddings()
        )
        return found

    def preprocess(self, image: Image.Image) -> Tensor:
        """One decoded image in its stored colour mode -> (3, H, W) float32."""
        tensor: Tensor = self._transform(image)
        return tensor

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, T) int64; a longer text is cut.

        Raises:
            DataError: a tokenizer that is neither here nor can be downloaded.
        """
        ids: Tensor = self._tokenizer(list(texts))
        return ids.to(torch.int64)

    def cuts(self, text: str) -> bool:
        """Whether a text is longer than the context: then a word more changes nothing. One that
        fills it to the last token is taken for longer.
        """
        as_it_is, with_more = self.tokens([text, f"{text} more"])
        return bool(torch.equal(as_it_is, with_more))

    def header(self) -> dict[str, Any]:
        """What a weights file must say so that `recorded` can build the towers again."""
        return {
            HEADER: {
                "architecture": self.architecture,
                "quick_gelu": self.quick_gelu,
                "preprocess": self.preprocess_config,
            }
        }

    def encode_images(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), not normalised."""
        features: Tensor = self.module.encode_image(images_B3HW, normalize=False)
        return features

    def encode_tokens(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) -> (B, D), not normalised."""
        features: Tensor = self.module.encode_text(tokens_BT, normalize=False)
        return features


def evaluation_transform(config: Mapping[str, Any]) -> Any:
    """open_clip's own evaluation transform: a PIL image in any mode -> (3, H, W) float32.

    Args:
        config: fields of open_clip's `PreprocessCfg`: size, mean, std, interpolation, resize_mode.
    """
    make_torchvision_importable()
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**config), is_train=False)


def architecture_config(architecture: str) -> dict[str, Any]:
    """open_clip's configuration: `embed_dim`, `vision_cfg`, `text_cfg` with its context length.

    Raises:
        DataError: no such architecture; names the nearest.
    """
    make_torchvision_importable()
    import open_clip

    config: dict[str, Any] | None = open_clip.get_model_config(architecture)
    if config is None:
        near = _nearest(architecture)
        hint = f"; did you mean {near!r}?" if near else ""
        raise DataError(
            f"open_clip has no architecture {architecture!r}{hint} It lists its own with "
            "open_clip.list_models()"
        )
    config["text_cfg"].setdefault("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    return config


def _nearest(architecture: str) -> str | None:
    make_torchvision_importable()
    import open_clip

    names = {name.lower(): name for name in open_clip.list_models()}
    near = get_close_matches(architecture.lower(), names, n=1, cutoff=_NEAR)
    return names[near[0]] if near else None


@dataclass(frozen=True)
class _Source:
    """What `architecture/pretrained` stands for.

    Attributes:
        file: weights; None for random ones.
        quick_gelu: the activation that the architecture has or the tag was trained with.
        preprocess: where it differs from open_clip's defaults.
    """

    architecture: str
    file: str | None
    quick_gelu: bool
    preprocess: dict[str, Any]

    @staticmethod
    def of(weights: str) -> "_Source":
        architecture, _, pretrained = weights.partition("/")
        quick_gelu = bool(architecture_config(architecture).get("quick_gelu"))
        import open_clip

        tags = {
            tag: open_clip.get_pretrained_cfg(architecture, tag)
            for tag in open_clip.list_pretrained_tags_by_model(architecture)
        }
        found = open_clip.get_pretrained_cfg(architecture, pretrained)
        if found:
            try:
                file = open_clip.download_pretrained(found)
            except Exception as error:  # of urllib, of huggingface_hub
                raise DataError(
                    f"the weights {weights} are not in the cache and cannot be downloaded; name "
                    f"their file, as in {architecture}//data/weights.safetensors: {error}"
                ) from None
            quick_gelu = quick_gelu or bool(found.get("quick_gelu"))
            return _Source(architecture, file, quick_gelu, _preprocess(found))
        if pretrained != RANDOM_TAG and not Path(pretrained).is_file():
            raise DataError(
                f"{pretrained!r} is neither a file nor a tag of {architecture} in open_clip "
                f"(it has: {', '.join(tags) or 'none'})"
            )
        # A file does not say how its images were prepared: as for the tags, if all agree.
        known = [_preprocess(tag) for tag in tags.values()]
        agreed = known[0] if known and all(one == known[0] for one in known) else {}
        file = None if pretrained == RANDOM_TAG else pretrained
        return _Source(architecture, file, quick_gelu, agreed)


def _preprocess(tag: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("mean", "std", "interpolation", "resize_mode")
    return {key: tag[key] for key in keys if tag.get(key) is not None}
