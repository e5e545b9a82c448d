"""How much a candidate looks like the query's reference, under a model's own image features."""

from dataclasses import dataclass

import numpy as np

from dafm_ray.errors import DataError
from dafm_ray.evaluation.metrics import Floats, Ints, Scores
from dafm_ray.search.index import pooled
from dafm_ray.tiles.blocks import Array
from dafm_ray.tiles.store import TileStore, feature_key

SIMILARITY = "reference:"
"""Begins the name of a model's channel of the similarity of reference and candidate."""


@dataclass(frozen=True)
class References:
    """Cosines of gallery features, read block by block from the store.

    Attributes:
        store: holds the gallery features of the models.
        models: R names.
    """

    store: TileStore
    models: tuple[str, ...]

    def refuse_absent(self) -> None:
        """DataError if a model has no gallery features in the store."""
        done = self.store.finished()
        for model in self.models:
            if not done.issuperset(self.store.feature_keys(model, "gallery")):
                raise DataError(
                    f"{self.store.uri} holds no image features of {model}, so there is no "
                    "similarity of reference and candidate; leave it out of `references`, or add "
                    "that similarity as a model"
                )

    def __call__(self, rows_B: Ints) -> Scores:
        """(R, B, N) float32 cosines for some queries; NaN where a reference is not in the gallery.

        The features of an image are averaged over its tokens, if it has several.
        """
        positions = self.store.positions
        at_B = np.array([positions.get(self.store.queries[q].reference, -1) for q in rows_B])
        return np.stack([self._of(model, at_B) for model in self.models])

    def _of(self, model: str, at_B: Ints) -> Scores:
        references_BD = self._rows(model, at_B)
        return self.to(model, references_BD)

    def to(self, model: str, references_BD: Array) -> Scores:
        """(B, N) cosines of pooled features with every candidate of the gallery."""
        parts = [references_BD @ pooled(block).T for block in self._blocks(model)]
        cosines_BN: Scores = np.concatenate(parts, axis=1).astype(np.float32)
        return cosines_BN

    def _blocks(self, model: str) -> list[Array]:
        return [self.store.read(key) for key in self.store.feature_keys(model, "gallery")]

    def _rows(self, model: str, at_B: Ints) -> Floats:
        """(B, D) pooled features of some images; NaN for -1."""
        step = self.store.manifest.grid.encode_block
        found: Floats | None = None
        for number in np.unique(at_B[at_B >= 0] // step):
            block = self.store.read(feature_key(model, "gallery", int(number)))
            asked = np.flatnonzero((at_B >= 0) & (at_B // step == number))
            rows = pooled(block[at_B[asked] % step])
            if found is None:
                found = np.full((len(at_B), rows.shape[1]), np.nan, rows.dtype)
            found[asked] = rows
        return np.full((len(at_B), 1), np.nan) if found is None else found
