"""Rankings of all queries under one system, as a Parquet file that other tools read."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dafm_ray.errors import ConfigError
from dafm_ray.files import replacing
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.candidates import positions_in
from dafm_ray.fusion.rank import masked_scores, top_candidates
from dafm_ray.progress import progress
from dafm_ray.search.rankings import SCHEMA, ranking_rows
from dafm_ray.tiles.store import TileStore


def write_rankings(store: TileStore, system: Fusion, top: int, file: Path) -> None:
    """Write the first candidates of every query, a row each, in bounded memory.

    Columns: `query`, `rank` from 1, `candidate`, `score`. Ties stand in the stored order of the
    gallery. Candidates that are excluded, or that no model scored, are left out.

    Args:
        store: complete tiles of all its models.
        system: what ranks.
        top: candidates a query.
        file: Parquet; its metadata (keys `dafm_ray.store`, `dafm_ray.system`) says what it is of.

    Raises:
        ConfigError: top is below 1.
        DataError: the store is incomplete or damaged.
        MachineError: the file cannot be written.
    """
    if top < 1:
        raise ConfigError(f"top must be at least 1, not {top}")
    store.refuse_incomplete()
    about = {"dafm_ray.store": store.manifest.title, "dafm_ray.system": system.name}
    with (
        replacing(file) as temporary,
        pq.ParquetWriter(temporary, SCHEMA.with_metadata(about)) as writer,
        progress("rank", store.size("queries"), unit="query") as shown,
    ):
        for chunk in masked_scores(store):
            queries = [query.id for query in store.queries[chunk.rows.start : chunk.rows.stop]]
            fused_BN = system(chunk.scores_MBN, np.array(chunk.rows))
            first_BK = top_candidates(fused_BN, top)
            scores_BK = np.take_along_axis(fused_BN, first_BK, axis=1)
            positions_BK = positions_in(store, chunk.rows, first_BK)
            writer.write_batch(ranking_rows(queries, store.gallery_ids, positions_BK, scores_BK))
            shown.advance(len(chunk.rows))
