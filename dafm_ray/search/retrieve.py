"""The retrieve job: rank every query of a data set with one model and an index, no tiles."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.parquet as pq

from dafm_ray.config import RetrieveConfig, to_yaml
from dafm_ray.datasets.base import title_of
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.errors import DataError
from dafm_ray.files import replacing, write_text
from dafm_ray.progress import progress, status_writer
from dafm_ray.search.encode import encode_queries, open_model, write_quarantine
from dafm_ray.search.gallery import identity_of, open_index
from dafm_ray.search.index import Unusable
from dafm_ray.search.latency import latency
from dafm_ray.search.ranked import Ranked, first_candidates
from dafm_ray.search.rankings import SCHEMA, ranking_rows
from dafm_ray.storage import open_storage, results

RANKINGS, METRICS, LATENCY = "rankings.parquet", "metrics.json", "latency.json"


@dataclass(frozen=True)
class Retrieval:
    """A finished retrieval.

    Attributes:
        out: path or URI of the results.
        metrics: what `metrics.json` says.
        latency: what `latency.json` says.
        failures: images and queries that could not be used.
    """

    out: str
    metrics: dict[str, Any]
    latency: dict[str, Any]
    failures: int


def retrieve(config: RetrieveConfig) -> Retrieval:
    """Rank every query; writes `rankings.parquet`, `metrics.json`, `latency.json`, `config.yaml`
    and, if something could not be used, `quarantine.csv` to `config.out`; meanwhile `status.json`.

    Excluded candidates are in no ranking. A target that is not among the first `top` is a miss, so
    only what the first `top` decide is counted; the members of a query's group are all scored.

    Raises:
        ConfigError: the model's scores are no inner products, or a URI cannot be opened.
        DataError: no image or no query can be used, or the kept index is damaged.
        MachineError: no such device, or the results cannot be written.
    """
    dataset = load_dataset(config.dataset)
    storage = open_storage(config.out)
    status = status_writer(storage)
    identity = identity_of(config.model)
    model, device = open_model(config.model, config.device)
    title = title_of(dataset.name, dataset.split, dataset.category)
    about = {"dafm_ray.store": title, "dafm_ray.system": config.model}
    lost: list[Unusable] = []
    with (
        results(config.out, METRICS) as out,
        open_index(
            model,
            identity,
            dataset,
            config.index,
            device,
            config.batch,
            config.shards,
            status,
        ) as (index, built),
    ):
        ranked = Ranked(index, dataset)
        with (
            replacing(out / RANKINGS) as file,
            pq.ParquetWriter(file, SCHEMA.with_metadata(about)) as writer,
            progress("retrieve", len(dataset.queries), 0, "query", status) as shown,
        ):
            for start in range(0, len(dataset.queries), config.batch):
                queries = dataset.queries[start : start + config.batch]
                features_BD, unusable = encode_queries(model, dataset, queries, device)
                first_BK = first_candidates(
                    index, features_BD, ranked.excluded(queries), config.top
                )
                ids = [query.id for query in queries]
                writer.write_batch(ranking_rows(ids, index.ids, *first_BK))
                ranked.add(queries, features_BD, *first_BK)
                lost += unusable
                shown.advance(len(queries), len(unusable))
        unusable_ids = {id for id, _ in lost}
        usable = [query for query in dataset.queries if query.id not in unusable_ids]
        if not usable:
            raise DataError(f"no query can be used; {lost[0].id}: {lost[0].reason}")
        measured = {
            **latency(model, dataset, usable, ranked, device, config.top),
            "gallery": len(index.ids),
            "top": config.top,
            "shards": config.shards,
            "index": "built now" if built else "reused",
        }
        metrics = {
            "dataset": asdict(config.dataset),
            "protocol": dataset.protocol,
            "reference": dataset.policy,
            "model": config.model,
            "identity": identity,
            "gallery": len(dataset.gallery),
            "top": config.top,
            "texts_cut": [q.id for q in dataset.queries if model.cuts(model.caption(q.captions))],
            **ranked.counted(config.top),
        }
        write_text(out / METRICS, json.dumps(metrics, indent=1) + "\n")
        write_text(out / LATENCY, json.dumps(measured, indent=1) + "\n")
        write_text(out / "config.yaml", to_yaml(config))
    failures = write_quarantine(storage, index.unusable, lost)
    return Retrieval(config.out, metrics, measured, failures)
