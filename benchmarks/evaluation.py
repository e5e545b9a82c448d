"""P9: evaluating at the size of CIRR's train split."""

import tempfile

from benchmarks.fusion import CANDIDATES, TRAINED, scores, tile_mb
from benchmarks.measure import most_memory
from dafm_ray.config import EvaluateConfig
from dafm_ray.report.evaluate import evaluate


def memory() -> float:
    """P9: MB of anonymous memory that an evaluation of every query adds beside the largest tile.

    Ranks under every model, fusions and noisy copies, intervals, p-values, the page; scores are
    mapped from disk.
    """
    with scores(TRAINED, CANDIDATES) as store, tempfile.TemporaryDirectory() as out:
        config = EvaluateConfig(store.uri, out, ("mean@zscore", "rrf", "mean@zscore+bank"))
        with most_memory() as added:
            evaluate(config)
        return added[0] - tile_mb(store)
