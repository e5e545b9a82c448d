import subprocess
import sys

IN_SEVERAL_THREADS = """
import sys, time, torch
from concurrent.futures import ThreadPoolExecutor
from dafm_ray.models.torchvision_ops import make_torchvision_importable

def is_whole(wait):
    time.sleep(wait)
    make_torchvision_importable()
    return not sys.modules["torchvision"].__spec__._initializing

with ThreadPoolExecutor(8) as threads:
    assert all(threads.map(is_whole, [0.02 * n for n in range(8)]))
import open_clip
"""


def test_threads_that_load_models_at_once_wait_for_each_other():
    done = subprocess.run(
        [sys.executable, "-c", IN_SEVERAL_THREADS],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
