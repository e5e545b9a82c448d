"""Timing that survives a noisy machine (alternating runs, medians, ratios), and memory."""

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")


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


@contextmanager
def most_memory() -> Iterator[list[float]]:
    """MB of anonymous memory that the block adds at most; known at its end."""
    before, added, ended = _anonymous_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            added[0] = max(added[0], _anonymous_mb() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield added
    finally:
        ended.set()
        thread.join()


def _anonymous_mb() -> float:
    [line] = [row for row in STATUS.read_text().splitlines() if row.startswith("RssAnon")]
    return int(line.split()[1]) / 1e3
