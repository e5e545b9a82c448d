"""Learning from preferences: Retrieval-DPO as it was published and as it should be, and a listwise
loss that moves the rank itself.

Only the text side learns, so the image features of a gallery stay what they are: they are encoded
once, kept in an index, and negatives are mined from it.

Shape letters: Q queries, B of a batch, C negatives of a query, N candidates, D feature width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dafm_ray.datasets.base import Dataset, Query
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.evaluation.metrics import Ints
from dafm_ray.finetune.config import FinetuneConfig
from dafm_ray.finetune.losses import preference_loss, smooth_log_rank
from dafm_ray.finetune.negatives import Known, Mined, draw, mine
from dafm_ray.finetune.objective import Objective, several_workers
from dafm_ray.finetune.triplets import LEFT_OUT, Unfit, epoch_batches, learnable
from dafm_ray.models.base import FrozenModel, Terms
from dafm_ray.models.zeroshot import ZeroShot
from dafm_ray.search.gallery import gallery_index, identity_of
from dafm_ray.search.index import FlatIndex
from dafm_ray.uris import join

INDEX = "index"
"""Folder of the gallery indexes, in a run's folder."""

VARIANTS = ("text", "sum", "hidden")
_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class QueryRows:
    """B queries by number.

    Attributes:
        queries_B: int64 positions among the queries that are learnt from.
        target_ids_B: int64 rows of the targets among the candidates.
        negatives_BC: int64 rows of the negatives; -1 stands for none.
        batch_ids_M: int64 rows of the different targets of the whole batch of all workers.
    """

    queries_B: Tensor
    target_ids_B: Tensor
    negatives_BC: Tensor
    batch_ids_M: Tensor
    unfit: tuple[Unfit, ...] = ()

    def __len__(self) -> int:
        return len(self.queries_B)

    def rows(self, start: int, stop: int) -> "QueryRows":
        """Some of the queries."""
        part = slice(start, stop)
        return QueryRows(
            self.queries_B[part],
            self.target_ids_B[part],
            self.negatives_BC[part],
            self.batch_ids_M,
        )


@dataclass(frozen=True)
class _Place:
    """The queries of one data set and its gallery, whose first candidate is row `first` of all."""

    queries: list[Query]
    index: FlatIndex
    known: Known
    first: int

    def rows(self, columns: Ints) -> Ints:
        """Columns of this gallery's index to rows of all candidates; -1 stays."""
        return np.where(columns >= 0, columns + self.first, -1)


class Preference(Objective[QueryRows]):
    """DPO on cosines, or the smooth rank of the target.

    Args:
        model: `zeroshot:text`, `zeroshot:sum` or `zeroshot:hidden`, in its starting state.
        config: of the job.
        datasets: of the queries; each query is ranked in the gallery of its own.
        rank: of this worker.

    Raises:
        ConfigError: another model, or its images would learn.
        DataError: no query can be learnt from.
    """

    def __init__(
        self, model: FrozenModel, config: FinetuneConfig, datasets: Sequence[Dataset], rank: int
    ) -> None:
        super().__init__(model)
        if not isinstance(model, ZeroShot) or model.variant not in VARIANTS:
            names = ", ".join(f"zeroshot:{variant}" for variant in VARIANTS)
            raise ConfigError(f"preference trains the text side of {names}; name one in `model`")
        if any(p.requires_grad for p in model.module.CLIP.visual.parameters()):  # type: ignore[union-attr]
            raise ConfigError(
                "preference keeps the images as they are: name parts of the text side alone, as "
                "CLIP.transformer"
            )
        assert config.preference is not None
        self._clip = model
        self._config = config
        self._settings = config.preference
        assert config.preference.negatives is not None
        self._mining = config.preference.negatives
        if self._mining.shards:
            raise ConfigError(
                "preference holds the index itself; leave negatives.shards out, it is for "
                "`dafm negatives`"
            )
        self._rank = rank
        self._places = self._open(datasets)
        vectors = [place.index.vectors for place in self._places]
        self._candidates_ND = torch.from_numpy(np.concatenate(vectors)).to(self.device)
        queries = [query for place in self._places for query in place.queries]
        self._captions_Q = [model.caption(query.captions) for query in queries]
        self._targets_Q = self._rows(lambda known: known.targets_QT[:, 0])
        self._references_Q = self._rows(lambda known: known.references_Q)
        self._columns_QW: Ints | None = None
        self._policy_QD = self._encode() if self._settings.reference_policy else None

    @property
    def steps(self) -> int:
        """Full batches of an epoch."""
        return len(self._captions_Q) // self._config.batch_size

    def begin(self, epoch: int) -> None:
        """Mine the negatives anew where the recipe says so."""
        if self._settings.recipe == "listwise":
            return
        moves = self._mining.near == "query"
        if self._columns_QW is None or (moves and epoch % self._mining.every == 0):
            self._columns_QW = self._mine()
            without = np.flatnonzero((self._columns_QW < 0).all(axis=1))
            ids = [query.id for place in self._places for query in place.queries]
            reason = "the rules leave it no negative"
            self.unfit += [Unfit(ids[q], LEFT_OUT, reason) for q in without]
            if len(without) == len(ids):
                raise DataError("the rules of preference.negatives leave no query a negative")

    def batches(self, epoch: int) -> Iterator[QueryRows]:
        """Queries in an order the seed fixes, with the negatives drawn for this epoch."""
        config, mined = self._config, self._columns_QW
        share = config.batch_size // config.workers
        own = slice(self._rank * share, (self._rank + 1) * share)
        queries = len(self._captions_Q)
        for everyones in epoch_batches(queries, config.batch_size, config.seed, epoch, 0, 1):
            rows = everyones[own]
            drawn = np.zeros((share, 0), np.int64)
            if mined is not None:
                drawn = draw(mined, self._mining, config.seed, epoch, np.array(rows))
            yield QueryRows(
                torch.tensor(rows),
                self._targets_Q[rows],
                torch.from_numpy(drawn),
                torch.unique(self._targets_Q[everyones]),
            )

    def forward(self, batch: QueryRows) -> Terms:
        """The mean of the queries' losses."""
        config, device = self._config, self.device
        dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
        with torch.autocast(device.type, dtype, enabled=config.precision != "fp32"):
            queries_BD = self._compose(batch.queries_B)
        if self._settings.recipe == "listwise":
            loss = self._listwise(queries_BD.float(), batch)
        else:
            loss = self._dpo(queries_BD.float(), batch)
        return Terms({}, {self._settings.recipe: (1.0, loss)})

    def kept(self) -> dict[str, Tensor]:
        """The mined negatives."""
        if self._columns_QW is None:
            return {}
        return {"negatives": torch.from_numpy(self._columns_QW)}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take them back."""
        if "negatives" in kept:
            self._columns_QW = kept["negatives"].numpy()

    def _dpo(self, queries_BD: Tensor, batch: QueryRows) -> Tensor:
        """-log sigmoid(beta (margin - margin of the reference policy)), a mean over negatives."""
        negatives_BC = batch.negatives_BC.to(self.device)
        images = self._references_Q if self._settings.positive == "reference" else self._targets_Q
        positive_BD = self._candidates_ND[images[batch.queries_B].to(self.device)]
        negative_BCD = self._candidates_ND[negatives_BC.clamp(min=0)]
        margin_BC = self._margin(queries_BD, positive_BD, negative_BCD)
        if self._policy_QD is not None:
            policy_BD = self._policy_QD[batch.queries_B.to(self.device)]
            margin_BC = margin_BC - self._margin(policy_BD, positive_BD, negative_BCD)
        assert self._settings.beta is not None
        return preference_loss(margin_BC, self._settings.beta, negatives_BC >= 0)

    def _margin(self, queries_BD: Tensor, positive_BD: Tensor, negative_BCD: Tensor) -> Tensor:
        """(B, C) logit scale times the difference of the cosines."""
        difference_BCD = positive_BD[:, None] - negative_BCD
        cosines_BC = (queries_BD[:, None] * difference_BCD).sum(-1)
        return self._clip.logit_scale().detach() * cosines_BC

    def _listwise(self, queries_BD: Tensor, batch: QueryRows) -> Tensor:
        """Smooth logarithm of the target's rank among the batch or the gallery."""
        targets_B = batch.target_ids_B.to(self.device)
        if self._settings.candidates == "batch":
            columns_M = batch.batch_ids_M.to(self.device)
        else:
            columns_M = torch.arange(len(self._candidates_ND), device=self.device)
        cosines_BM = queries_BD @ self._candidates_ND[columns_M].T
        own_B = (columns_M[None, :] == targets_B[:, None]).int().argmax(1)
        never_BM = self._never(batch.queries_B.numpy(), columns_M)
        assert self._settings.tau is not None
        return smooth_log_rank(cosines_BM, own_B, never_BM, self._settings.tau)

    def _never(self, queries_B: Ints, columns_M: Tensor) -> Tensor:
        """(B, M) candidates that are not ranked against a query's target: of another gallery, its
        other targets, what its protocol excludes and its reference.
        """
        rows_M = columns_M.cpu().numpy()
        never_BM = np.ones((len(queries_B), len(rows_M)), dtype=np.bool_)
        start = 0
        for place in self._places:
            here_b = np.flatnonzero((queries_B >= start) & (queries_B < start + len(place.queries)))
            known = place.known.select(queries_B[here_b] - start)
            inside_M = (rows_M >= place.first) & (rows_M < place.first + len(place.index))
            never_bT = place.rows(known.never)
            among_bM = np.stack([np.isin(rows_M, row) for row in never_bT]) if len(here_b) else None
            if among_bM is not None:
                never_BM[here_b] = ~inside_M | among_bM
            start += len(place.queries)
        return torch.from_numpy(never_BM).to(self.device)

    def _compose(self, queries_B: Tensor) -> Tensor:
        captions = [self._captions_Q[q] for q in queries_B.tolist()]
        if not self._clip.uses_reference:
            return self._clip.compose(None, captions)
        references_B = self._references_Q[queries_B].to(self.device)
        return self._clip.compose(self._candidates_ND[references_B], captions)

    @torch.no_grad()
    def _encode(self) -> Tensor:
        """(Q, D) features of all queries under the present weights."""
        learning = [part for part in self.weights.modules() if part.training]
        self.weights.eval()
        found = [
            self._compose(part).float()
            for part in torch.split(torch.arange(len(self._captions_Q)), _QUERIES_AT_ONCE)
        ]
        for part in learning:
            part.training = True
        return torch.cat(found)

    def _mine(self) -> Ints:
        """(Q, W) rows of the candidates that each query may have as negatives."""
        if self._mining.near == "positive":
            images = self._targets_Q
            if self._settings.positive == "reference":
                images = self._references_Q
            anchors_QD = self._candidates_ND[images.to(self.device)]
        else:
            anchors_QD = self._encode()
        targets_QD = self._candidates_ND[self._targets_Q.to(self.device)]
        scores_Q = (anchors_QD * targets_QD).sum(1).cpu().numpy()
        anchors = anchors_QD.cpu().numpy()
        found, start = [], 0
        for place in self._places:
            part = slice(start, start + len(place.queries))
            mined: Mined = mine(
                anchors[part], place.index, place.known, scores_Q[part], self._mining
            )
            found.append(place.rows(mined.columns_QW))
            start += len(place.queries)
        return np.concatenate(found)

    def _open(self, datasets: Sequence[Dataset]) -> list[_Place]:
        """Index every gallery and keep the queries whose images are in it."""
        identity = identity_of(self._config.model)
        usable, self.unfit = learnable(datasets, self._clip)
        places: list[_Place] = []
        first = 0
        for number, dataset in enumerate(datasets):
            index = self._index(identity, dataset)
            self.unfit += [Unfit(id, LEFT_OUT, reason) for id, reason in index.unusable]
            there = set(index.ids)
            queries = [
                query
                for place, query in usable
                if place == number and query.reference in there and there & set(query.targets)
            ]
            places.append(_Place(queries, index, Known.of(queries, index.ids), first))
            first += len(index)
        if not any(place.queries for place in places):
            raise DataError("no query has a reference and a target that can be read")
        return places

    def _index(self, identity: str, dataset: Dataset) -> FlatIndex:
        """Built by the first worker, read by the others."""
        cache = join(self._config.out, INDEX)
        if several_workers() and self._rank:
            dist.barrier()
        self._clip.module.eval()
        index, _ = gallery_index(self._clip, identity, dataset, cache, str(self.device))
        if several_workers() and not self._rank:
            dist.barrier()
        return index

    def _rows(self, of: Any) -> Tensor:
        """(Q,) rows of all candidates."""
        return torch.from_numpy(
            np.concatenate([place.rows(of(place.known)) for place in self._places])
        )
