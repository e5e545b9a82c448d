"""Rankings of queries as rows of a Parquet file that other tools read."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from dafm_ray.evaluation.metrics import Ints, Scores

SCHEMA = pa.schema(
    [
        pa.field("query", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("candidate", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)


def ranking_rows(
    queries: Sequence[str], candidates: Sequence[str], columns_BK: Ints, scores_BK: Scores
) -> pa.RecordBatch:
    """A row a ranked candidate, in `SCHEMA`.

    Args:
        queries: (B,) ids.
        candidates: (N,) ids.
        columns_BK: the first candidates of each query, -1 behind the last.
        scores_BK: theirs.
    """
    rows, places = np.nonzero(columns_BK >= 0)
    return pa.record_batch(
        [
            pa.array(queries).take(pa.array(rows)),
            pa.array(places + 1, pa.int32()),
            pa.array(candidates).take(pa.array(columns_BK[rows, places])),
            pa.array(scores_BK[rows, places].astype(np.float32)),
        ],
        schema=SCHEMA,
    )
