"""P7: `dafm --help`, seconds."""

import statistics
import subprocess
import sys

from benchmarks.measure import seconds


def run() -> float:
    """Median wall-clock seconds of five starts."""
    command = [sys.executable, "-m", "dafm_ray", "--help"]
    return statistics.median(
        seconds(lambda: subprocess.run(command, capture_output=True, check=True)) for _ in range(5)
    )
