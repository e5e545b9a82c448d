"""Textual inversion: an image as a word that a text encoder can read (SEARLE, Baldrati et al.,
ICCV 2023; Agnolucci et al., 2024).

Shape letters: R images, B texts, T tokens, D width of the joint space, W width of a word.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

PREFIX = "a photo of"
"""What stands before the pseudo-word."""

STEPS = 350
"""Of the optimisation of a word."""

PLACEHOLDER = "$"
"""Stands where the pseudo-word is put."""


class Towers(Protocol):
    """An image and a text encoder into one space.

    Attributes:
        module: their weights.
        context_length: tokens of a text.
        embed_dim: D of the joint space.
    """

    module: Any
    context_length: int
    embed_dim: int

    @property
    def token_embedding(self) -> nn.Embedding:
        """Words of the text encoder."""
        ...

    def preprocess(self, image: Image.Image) -> Tensor:
        """One decoded image in its stored colour mode -> (3, H, W) float32."""
        ...

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, T) int64 on the CPU; longer ones are cut."""
        ...

    def cuts(self, text: str) -> bool:
        """Whether a text is longer than the context."""
        ...

    def header(self) -> dict[str, Any]:
        """What a weights file must say so that the towers can be built again."""
        ...

    def encode_images(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), not normalised."""
        ...

    def encode_tokens(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) -> (B, D), not normalised."""
        ...


class Phi(nn.Module):
    """Image feature to pseudo-word: three linear layers, the middle one four times as wide.

    Args:
        width: D of the image features.
        word_width: W of the text encoder's words.
        dropout: between the layers.
    """

    def __init__(self, width: int, word_width: int, dropout: float = 0.5) -> None:
        super().__init__()
        hidden = 4 * width
        self.layers = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, word_width),
        )

    def forward(self, features_RD: Tensor) -> Tensor:
        """(R, D) un-normalised image features -> (R, W)."""
        words_RW: Tensor = self.layers(features_RD)
        return words_RW


def place_of_word(towers: Towers) -> int:
    """Position of the pseudo-word among the tokens of a text that begins with `PREFIX`."""
    without, with_one = towers.tokens([PREFIX, f"{PREFIX} {PLACEHOLDER}"])
    return int((without != with_one).nonzero()[0])


def encode_with_words(towers: Towers, rests_B: Sequence[str], words_BW: Tensor) -> Tensor:
    """Features of "a photo of $ {rest}" with a pseudo-word in place of $.

    Args:
        towers: whose text encoder reads.
        rests_B: what follows the word; may be empty.
        words_BW: the words.

    Returns:
        (B, D), not normalised.
    """
    texts = [f"{PREFIX} {PLACEHOLDER} {rest}".rstrip() for rest in rests_B]
    tokens_BT = towers.tokens(texts).to(words_BW.device)
    with _replaced(towers.token_embedding, place_of_word(towers), words_BW):
        return towers.encode_tokens(tokens_BT)


@contextmanager
def _replaced(embedding: nn.Embedding, place: int, words_BW: Tensor) -> Iterator[None]:
    """Within the block, the embeddings at one position are other words."""

    def put(_module: nn.Module, _ids: object, embedded_BTW: Tensor) -> Tensor:
        word_B1W = words_BW[:, None].to(embedded_BTW.dtype)
        return torch.cat([embedded_BTW[:, :place], word_B1W, embedded_BTW[:, place + 1 :]], dim=1)

    handle = embedding.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def optimised_words(
    towers: Towers,
    features_RD: Tensor,
    steps: int = STEPS,
    learning_rate: float = 2e-2,
    weight_decay: float = 0.01,
    ema: float = 0.99,
) -> Tensor:
    """Optimisation-based inversion: a word for each image whose sentence is most like the image.

    The loss of a word is 1 - cos(text("a photo of $"), image). All words start alike, so that a
    word does not depend on the images it is optimised beside, to rounding.

    Args:
        towers: frozen.
        features_RD: image features; need not be normalised.
        steps: of AdamW.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        ema: of the word over the steps.

    Returns:
        (R, W) averages over the steps.
    """
    # The encoding pools run under inference mode, whose tensors take no gradients.
    with torch.inference_mode(False), torch.enable_grad():
        target_RD = F.normalize(features_RD.detach().clone().float(), dim=-1)
        start_W = towers.token_embedding.weight.detach().float().mean(0)
        word_RW = start_W.repeat(len(target_RD), 1).requires_grad_()
        mean_RW = word_RW.detach().clone()
        optimiser = torch.optim.AdamW([word_RW], lr=learning_rate, weight_decay=weight_decay)
        for _ in range(steps):
            text_RD = encode_with_words(towers, [""] * len(target_RD), word_RW)
            loss = (1 - F.cosine_similarity(text_RD.float(), target_RD)).sum()
            (word_RW.grad,) = torch.autograd.grad(loss, [word_RW])
            optimiser.step()
            mean_RW.lerp_(word_RW.detach(), 1 - ema)
        return mean_RW
