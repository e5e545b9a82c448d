"""What a learned fusion sees of a query: one channel a model, hub statistics, what is absent."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dafm_ray.evaluation.metrics import Ints, Scores
from dafm_ray.fusion.bank import Bank
from dafm_ray.fusion.candidates import columns_in, moments_of
from dafm_ray.fusion.folds import NOBODY
from dafm_ray.fusion.normalise import NORMALISATIONS, Moments, zscore
from dafm_ray.fusion.rank import CHUNK_SCORES, scores_of
from dafm_ray.fusion.reference import SIMILARITY, References
from dafm_ray.tiles.store import TileStore

HUB = "hub:"
"""Begins the name of a model's channel of hub statistics."""

PROFILE = "profile:"
"""Begins the name of a model's channel of the similarity of profiles."""


@dataclass(frozen=True)
class Channels:
    """Turns scores into the channels of a network, whatever models there are.

    Attributes:
        models: of the network, in its order; one that a store lacks is a channel of zeros, which
            is the mean of the normalised scores.
        normalisation: of the scores of one query under one model.
        hubs: whether each model has a channel of hub statistics.
        profiles: whether each has one of the similarity of the reference's and the candidate's
            profile.
        references: models that have a channel of the similarity of reference and candidate.
    """

    models: tuple[str, ...]
    normalisation: str = "zscore"
    hubs: bool = False
    profiles: bool = False
    references: tuple[str, ...] = ()

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of the channels after the models'."""
        hubs = [HUB + name for name in self.models] if self.hubs else []
        profiles = [PROFILE + name for name in self.models] if self.profiles else []
        return (*hubs, *profiles, *(SIMILARITY + name for name in self.references))


class Given(NamedTuple):
    """Some queries, before the channels that depend on the fold held out are filled in.

    Attributes:
        rows_B: positions in the store; -1 for a query of no store.
        references_B: position of the reference in the gallery, -1 if it is not there.
        scores_BNM: float32 normalised scores of the network's models, 0 where there is none.
        similarities_BNR: as many for the similarity of the reference.
        present_BM: bool, models that scored the query at all.
        gaps_BNM: bool, candidates that one of these models did not score; None if there are none.
        unseen_BN: bool, candidates that no network sees: they are masked, or no model scored them.
        absent_BN: bool, candidates that are not ranked; more than `unseen_BN` only where networks
            see the reference.
    """

    rows_B: Ints
    references_B: Ints
    scores_BNM: Tensor
    similarities_BNR: Tensor
    present_BM: Tensor
    gaps_BNM: Tensor | None
    unseen_BN: Tensor
    absent_BN: Tensor

    def select(self, places: Ints) -> "Given":
        """Some of the queries."""
        return Given(
            self.rows_B[places],
            self.references_B[places],
            self.scores_BNM[places],
            self.similarities_BNR[places],
            self.present_BM[places],
            None if self.gaps_BNM is None else self.gaps_BNM[places],
            self.unseen_BN[places],
            self.absent_BN[places],
        )


@dataclass(frozen=True)
class Inputs:
    """The channels of the queries of one store.

    Attributes:
        store: complete tiles of all its models, some or all of the network's.
        channels: of the network.
        bank: of the store's models; needed if the channels have hubs or profiles.
        sees_reference: leave the reference's own score at the network's input, where the data set
            masks it; for the audit of the order leak.
    """

    store: TileStore
    channels: Channels
    bank: Bank | None = None
    sees_reference: bool = False

    def read(self, rows_B: Ints) -> Given:
        """Some queries of the store."""
        return self.of(scores_of(self.store, rows_B), rows_B)

    def parts(self, rows: Ints) -> Iterator[Given]:
        """Queries of the store in the order asked for, a bounded number of scores at a time."""
        step = max(1, CHUNK_SCORES // (len(self.channels.models) * self.store.width))
        for start in range(0, len(rows), step):
            yield self.read(rows[start : start + step])

    def of(
        self,
        scores_MBN: Scores,
        rows_B: Ints,
        similarities_RBN: Scores | None = None,
        references_B: Ints | None = None,
    ) -> Given:
        """Queries whose scores are at hand.

        Args:
            scores_MBN: of the store's models; NaN where a candidate was not scored or is masked.
            rows_B: positions in the store; -1 for a query of no store.
            similarities_RBN: of the reference, for queries of no store.
            references_B: its position in the gallery, for queries of no store.
        """
        absent_BN = unseen_BN = np.asarray(np.isnan(scores_MBN).all(axis=0))
        if self.sees_reference:
            scores_MBN = scores_of(self.store, rows_B, masked=False)
            unseen_BN = np.asarray(np.isnan(scores_MBN).all(axis=0))
        moments = self._moments and self._moments.of(rows_B)
        normalised_MBN = NORMALISATIONS[self.channels.normalisation](scores_MBN, moments)
        shape_BN = absent_BN.shape
        scores_BNM = np.zeros((*shape_BN, len(self.channels.models)), np.float32)
        present_BM = np.zeros((len(rows_B), len(self.channels.models)), dtype=bool)
        gaps_BNM = None
        for m, name in enumerate(self.channels.models):
            if name not in self.store.models:
                continue
            own_BN = normalised_MBN[self.store.models.index(name)]
            missing_BN = np.isnan(own_BN)
            scores_BNM[..., m] = np.where(missing_BN, 0, own_BN)
            present_BM[:, m] = ~missing_BN.all(axis=1)
            gaps_BN = (missing_BN > unseen_BN) & present_BM[:, m, None]
            if gaps_BN.any():
                gaps_BNM = np.zeros(scores_BNM.shape, dtype=bool) if gaps_BNM is None else gaps_BNM
                gaps_BNM[..., m] = gaps_BN
        if similarities_RBN is None and self.channels.references:
            similarities_RBN = References(self.store, self.channels.references)(rows_B)
        similarities_BNR = torch.zeros(*shape_BN, 0)
        if similarities_RBN is not None:
            similarities_RBN[:, absent_BN] = np.nan
            similarities_RBN = np.nan_to_num(zscore(similarities_RBN))
            similarities_BNR = torch.from_numpy(similarities_RBN.transpose(1, 2, 0).copy())
        return Given(
            rows_B,
            self._references(rows_B) if references_B is None else references_B,
            torch.from_numpy(scores_BNM),
            similarities_BNR,
            torch.from_numpy(present_BM),
            None if gaps_BNM is None else torch.from_numpy(gaps_BNM),
            torch.from_numpy(unseen_BN),
            torch.from_numpy(absent_BN),
        )

    def complete(self, given: Given, held_out: int = NOBODY) -> Tensor:
        """(B, N, K) channels for a network that a fold was held out from.

        A query's hub statistics come from neither its own fold nor the one held out. Models that
        are not present have zeros in all of their channels.
        """
        present_B1M = given.present_BM.to(torch.float32)[:, None]
        parts = [given.scores_BNM if given.present_BM.all() else given.scores_BNM * present_B1M]
        if self.channels.hubs:
            assert self.bank is not None
            hubs_MBN = self.bank.hubs(given.rows_B, held_out)
            parts.append(self._in_order(hubs_MBN) * present_B1M)
            if given.gaps_BNM is not None:
                parts[-1][given.gaps_BNM] = 0
        if self.channels.profiles:
            assert self.bank is not None
            assert self.bank.profiles is not None
            folds_B = self.bank.folds(given.rows_B)
            alike_MBN = self.bank.profiles.similarities(given.references_B, folds_B, held_out)
            alike_MBN[:, given.absent_BN.numpy()] = np.nan
            parts.append(self._in_order(np.nan_to_num(zscore(alike_MBN))) * present_B1M)
        if self.channels.references:
            parts.append(given.similarities_BNR)
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def places(self, index: int) -> list[int]:
        """The channels of a model of the store that are zero for a query it did not score."""
        name = self.store.models[index]
        channels = [*self.channels.models, *self.channels.extras]
        own = (name, HUB + name, PROFILE + name)
        return [place for place, channel in enumerate(channels) if channel in own]

    def _in_order(self, values_MBN: Scores) -> Tensor:
        """(B, N, M) in the order of the network's models, from that of the store's."""
        in_order_BNM = torch.from_numpy(values_MBN).permute(1, 2, 0)
        if self.store.models == self.channels.models:
            return in_order_BNM
        ordered_BNM = torch.zeros(*in_order_BNM.shape[:2], len(self.channels.models))
        for m, name in enumerate(self.store.models):
            if name in self.channels.models:
                ordered_BNM[..., self.channels.models.index(name)] = in_order_BNM[..., m]
        return ordered_BNM

    def _references(self, rows_B: Ints) -> Ints:
        positions = self.store.positions
        return np.array(
            [positions.get(self.store.queries[q].reference, -1) if q >= 0 else -1 for q in rows_B],
            dtype=np.int64,
        )

    @cached_property
    def _moments(self) -> Moments | None:
        return moments_of(self.store)

    @cached_property
    def source_order(self) -> Tensor:
        """(N,) int64 position of each candidate in the annotation file."""
        return torch.tensor(self.store.source_order)

    def targets(self, rows_B: Ints) -> Tensor:
        """(B, T) int64 columns of the targets, -1 where a query has fewer."""
        targets = [self.store.queries[q].targets for q in rows_B]
        return torch.from_numpy(columns_in(self.store, rows_B, targets))


def labelled_rows(stores: Sequence[TileStore]) -> Ints:
    """(Q, 2) int64: number of the store and position in it, of every query with a target."""
    places = [
        (s, q)
        for s, store in enumerate(stores)
        for q, query in enumerate(store.queries)
        if query.targets
    ]
    return np.array(places, dtype=np.int64).reshape(-1, 2)
