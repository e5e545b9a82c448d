"""BERT's lower-casing word pieces, as the BLIP families use them."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dafm_ray.errors import DataError
from dafm_ray.models.torchvision_ops import make_torchvision_importable

PUBLISHED = "bert-base-uncased"
"""Vocabulary of every published BLIP model; 30,522 words."""

ADDED = ("[DEC]", "[ENC]")
"""Tokens that BLIP appends to the vocabulary; BLIP-2 appends the first alone."""


SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def words_in(texts: Sequence[str]) -> list[str]:
    """The vocabulary of a small model: the words of its training texts, and letters for others."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    words = sorted({word for text in texts for word in re.findall(r"[a-z0-9]+", text.lower())})
    pieces = [*letters, *(f"##{letter}" for letter in letters), *words]
    return list(dict.fromkeys([*SPECIAL, *pieces]))


def tiny_vocabulary(size: int) -> list[str]:
    """A vocabulary of letters, padded to leave room for added tokens; for random models."""
    words = words_in([])
    return words + [f"[unused{n}]" for n in range(size - len(words) - len(ADDED))]


class WordPieces:
    """Texts to token ids.

    Args:
        words: the vocabulary in order, or None for the published one, which transformers finds in
            its cache or downloads.
    """

    def __init__(self, words: Sequence[str] | None = None) -> None:
        self.words = words

    def refuse_unfit(self, embeddings: int) -> None:
        """DataError unless a model with so many embeddings can have learned these words."""
        if self.words is None:
            return
        missing = [word for word in SPECIAL if word not in self.words]
        if missing or not 0 <= embeddings - len(self.words) <= len(ADDED):
            lacks = f" and lacks {', '.join(missing)}" if missing else ""
            raise DataError(
                f"the vocabulary has {len(self.words)} words{lacks}; the weights know "
                f"{embeddings}, up to {len(ADDED)} of them added. Is it a file of another model?"
            )

    @cached_property
    def _tokenizer(self) -> Any:
        make_torchvision_importable()
        from transformers import BertTokenizer

        if self.words is not None:
            tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(self.words)})
        else:
            try:
                tokenizer = BertTokenizer.from_pretrained(PUBLISHED)
            except (OSError, ValueError):
                raise DataError(
                    f"the vocabulary of {PUBLISHED} is not in the cache and cannot be downloaded; "
                    "add its file to the weights, as in weights.pt+vocab.txt"
                ) from None
        tokenizer.add_tokens(list(ADDED), special_tokens=True)
        return tokenizer

    @property
    def encoder_token(self) -> int:
        """Id of `[ENC]`."""
        return int(self._tokenizer.convert_tokens_to_ids(ADDED[1]))

    def __call__(
        self, texts: Sequence[str], max_length: int | None = None, pad_to: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokenise a batch.

        Args:
            texts: B texts.
            max_length: longer ones are cut and keep their end token.
            pad_to: length of every row; by default that of the longest.

        Returns:
            (B, T) int64 ids and (B, T) int64 mask, 0 where a row is padded.
        """
        encoded = self._tokenizer(
            list(texts),
            padding="max_length" if pad_to else "longest",
            max_length=pad_to or max_length,
            truncation=(pad_to or max_length) is not None,
            return_tensors="pt",
        )
        return encoded["input_ids"].to(torch.int64), encoded["attention_mask"].to(torch.int64)
