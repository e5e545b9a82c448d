"""The negatives job: which hard negatives a mining finds, before anything is trained on them."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dafm_ray.config import to_yaml
from dafm_ray.datasets.base import Dataset, Query
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.errors import DataError
from dafm_ray.files import replacing, write_text
from dafm_ray.finetune.config import MineConfig
from dafm_ray.finetune.negatives import Known, Mined, mine
from dafm_ray.models.base import FrozenModel
from dafm_ray.progress import StatusWriter, progress, status_writer
from dafm_ray.runs import CONFIG
from dafm_ray.search.encode import encode_queries, open_model, write_quarantine
from dafm_ray.search.gallery import identity_of, open_index
from dafm_ray.search.index import Floats, Index, Unusable
from dafm_ray.storage import open_storage, results

NEGATIVES, COUNTS = "negatives.parquet", "negatives.json"


@dataclass(frozen=True)
class Mining:
    """A finished mining.

    Attributes:
        out: path or URI of the results.
        counts: what `negatives.json` says.
        failures: images and queries that could not be used.
    """

    out: str
    counts: dict[str, Any]
    failures: int


def mine_negatives(config: MineConfig) -> Mining:
    """Mine every query that has a target, its first one; writes `negatives.parquet` (a row a
    negative), `negatives.json`, `config.yaml` and, if something could not be used,
    `quarantine.csv` to `config.out`; meanwhile `status.json`.

    Raises:
        ConfigError: the window ends behind the gallery, the scores are no inner products, or a URI
            cannot be opened.
        DataError: no query has a target that can be used, or the kept index is damaged.
        MachineError: no such device, or the results cannot be written.
    """
    dataset = load_dataset(config.dataset)
    labelled = [query for query in dataset.queries if query.targets]
    mining, storage = config.negatives, open_storage(config.out)
    status = status_writer(storage)
    identity = identity_of(config.model)
    model, device = open_model(config.model, config.device)
    with open_index(
        model, identity, dataset, config.index, device, config.batch, mining.shards, status
    ) as (index, built):
        there = set(index.ids)
        lost = [
            Unusable(query.id, f"target {query.targets[0]} cannot be used")
            for query in labelled
            if query.targets[0] not in there
        ]
        queries = [query for query in labelled if query.targets[0] in there]
        if mining.near == "query":
            queries, features_QD, unusable = _encoded(
                model, dataset, queries, device, config.batch, status
            )
            lost += unusable
        if not queries:
            raise DataError("no query has a target and a reference that can be used")
        known = Known.of(queries, index.ids)
        target_Q = known.targets_QT[:, 0]
        if mining.near == "positive":
            features_QD = index.images(target_Q)
        target_scores_Q = index.scores(features_QD, target_Q[:, None])[:, 0]
        mined = mine(features_QD, index, known, target_scores_Q, mining)
    counts = {
        "dataset": asdict(config.dataset),
        "model": config.model,
        "identity": identity,
        "gallery": len(index.ids),
        "index": "built now" if built else "reused",
        "queries": len(queries),
        "negatives": int((mined.columns_QW >= 0).sum()),
        "removed": dict(mined.removed),
        "without": [queries[q].id for q in mined.without],
    }
    with results(config.out, COUNTS) as out:
        with replacing(out / NEGATIVES) as file:
            pq.write_table(_table(mined, queries, index, target_scores_Q), file)
        write_text(out / COUNTS, json.dumps(counts, indent=1) + "\n")
        write_text(out / CONFIG, to_yaml(config))
    return Mining(config.out, counts, write_quarantine(storage, index.unusable, lost))


def _encoded(
    model: FrozenModel,
    dataset: Dataset,
    queries: list[Query],
    device: str,
    batch: int,
    status: StatusWriter,
) -> tuple[list[Query], Floats, list[Unusable]]:
    """The queries that can be encoded, their features, and the others."""
    parts, lost = [], []
    with progress("encode queries", len(queries), 0, "query", status) as shown:
        for start in range(0, len(queries), batch):
            some = queries[start : start + batch]
            features_BD, unusable = encode_queries(model, dataset, some, device)
            parts.append(features_BD)
            lost += unusable
            shown.advance(len(some), len(unusable))
    if not parts:
        return [], np.empty((0, 0), np.float32), lost
    features_QD = np.concatenate(parts)
    usable = np.flatnonzero(~np.isnan(features_QD).any(axis=1))
    return [queries[q] for q in usable], features_QD[usable], lost


def _table(mined: Mined, queries: list[Query], index: Index, target_scores_Q: Floats) -> pa.Table:
    rows, places = np.nonzero(mined.columns_QW >= 0)
    ids = pa.array([query.id for query in queries], pa.string())
    targets = pa.array([query.targets[0] for query in queries], pa.string())
    candidates = pa.array(index.ids, pa.string())
    return pa.table(
        {
            "query": ids.take(pa.array(rows)),
            "target": targets.take(pa.array(rows)),
            "negative": candidates.take(pa.array(mined.columns_QW[rows, places])),
            "rank": pa.array(mined.ranks_QW[rows, places], pa.int32()),
            "score": pa.array(mined.scores_QW[rows, places]),
            "target_score": pa.array(target_scores_Q[rows].astype(np.float32)),
        }
    )
