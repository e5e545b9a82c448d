"""CIRR test-server files of what a system ranks."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dafm_ray.errors import DataError
from dafm_ray.evaluation.metrics import Ints, Scores, group_scores
from dafm_ray.evaluation.submission import SubmissionCheck, check_content
from dafm_ray.evaluation.submission_format import LENGTHS, SERVED, TEST_QUERIES, submission_text
from dafm_ray.files import replacing
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.candidates import columns_in, positions_in
from dafm_ray.fusion.rank import masked_scores, top_candidates
from dafm_ray.progress import progress
from dafm_ray.tiles.store import TileStore

Lists = dict[str, list[str]]
"""Pair id -> names, best first."""


def write_submission(
    store: TileStore, system: Fusion, out: Path, metrics: Sequence[str] = tuple(LENGTHS)
) -> dict[Path, SubmissionCheck]:
    """Write `METRIC.json` for each metric once all are known to be sound; ties in stored order.

    Args:
        store: complete tiles of any split of CIRR.
        system: what ranks.
        out: folder of the files.
        metrics: keys of `LENGTHS`.

    Returns:
        The files and what their check found odd.

    Raises:
        DataError: the store is of something else, is incomplete or damaged, lacks groups, ranks
            too few candidates of a query, or the server would refuse a file.
        MachineError: a file cannot be written.
    """
    _refuse_others(store, metrics)
    contents: dict[Path, str] = {}
    checks: dict[Path, SubmissionCheck] = {}
    for metric, lists in _ranked(store, system, metrics).items():
        file = out / f"{metric}.json"
        contents[file] = submission_text(metric, lists)
        checks[file] = check_content(contents[file].encode(), store.queries, store.gallery_ids)
        if checks[file].faults:
            found = "\n".join(f"  {line}" for line in checks[file].lines())
            raise DataError(f"{file} is not written, the server would refuse it:\n{found}")
    manifest = store.manifest
    if manifest.dataset["split"] != SERVED or manifest.queries_size != TEST_QUERIES:
        note = (
            f"odd: {manifest.queries_size:,} queries of {manifest.title}; the server ranks the "
            f"{TEST_QUERIES:,} of {SERVED} and refuses others"
        )
        checks = {file: replace(one, notes=(*one.notes, note)) for file, one in checks.items()}
    for file, content in contents.items():
        with replacing(file) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return checks


def _refuse_others(store: TileStore, metrics: Sequence[str]) -> None:
    store.refuse_incomplete()
    manifest = store.manifest
    if (manifest.dataset["name"], manifest.protocol) != ("cirr", "cirr"):
        raise DataError(
            f"{store.uri} holds {manifest.title} under protocol {manifest.protocol}; the server "
            "ranks cirr under cirr"
        )
    if "recall_subset" in metrics:
        store.refuse_shortlist("A ranking within each query's set (recall_subset)")
    alone = [query.id for query in store.queries if not query.group]
    if "recall_subset" in metrics and alone:
        raise DataError(
            f"{len(alone):,} queries of {store.uri} have no group to rank (first: {alone[0]!r}); "
            "take the queries from the annotations, or write recall alone"
        )


def _ranked(store: TileStore, system: Fusion, metrics: Sequence[str]) -> dict[str, Lists]:
    ranked: dict[str, Lists] = {metric: {} for metric in metrics}
    with progress("rank", store.size("queries"), unit="query") as shown:
        for chunk in masked_scores(store):
            queries = store.queries[chunk.rows.start : chunk.rows.stop]
            fused_BN = system(chunk.scores_MBN, np.array(chunk.rows))
            groups_BG = columns_in(store, chunk.rows, [query.group for query in queries])
            for metric, lists in ranked.items():
                first_BK = _first(metric, fused_BN, groups_BG)
                first_BK = positions_in(store, chunk.rows, first_BK)
                for query, columns in zip(queries, first_BK.tolist(), strict=True):
                    names = [store.gallery_ids[n] for n in columns if n >= 0]
                    _refuse_few(system, metric, query.id, len(names))
                    lists[query.id] = names
            shown.advance(len(chunk.rows))
    return ranked


def _first(metric: str, fused_BN: Scores, groups_BG: Ints) -> Ints:
    """(B, K) positions of the first candidates a metric lists, -1 where none is left."""
    if metric == "recall":
        return top_candidates(fused_BN, LENGTHS[metric])
    members_BG, scores_BG = group_scores(fused_BN, groups_BG)
    first_BK = top_candidates(scores_BG, LENGTHS[metric])
    return np.where(first_BK >= 0, np.take_along_axis(members_BG, first_BK, axis=1), -1)


def _refuse_few(system: Fusion, metric: str, query: str, ranked: int) -> None:
    if ranked < LENGTHS[metric]:
        whose = "its set" if metric == "recall_subset" else "the gallery"
        raise DataError(
            f"{system.name} ranks only {ranked} images of {whose} for query {query!r}, {metric} "
            f"lists {LENGTHS[metric]}; add a model that scores the others, or write the other "
            "metric alone"
        )
