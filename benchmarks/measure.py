"""Timing that survives a noisy machine: alternating runs, medians, ratios."""

import statistics
import time
from collections.abc import Callable


def seconds(action: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def ratio(ours: Callable[[], object], theirs: Callable[[], object], runs: int = 7) -> float:
    """Median of theirs / ours over alternating runs, after one of each that does not count."""
    ours()
    theirs()
    return statistics.median(seconds(theirs) / seconds(ours) for _ in range(runs))
