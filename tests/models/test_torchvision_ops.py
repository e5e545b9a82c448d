import subprocess
import sys

IN_TWO_THREADS = """
from concurrent.futures import ThreadPoolExecutor
from dafm_ray.models.torchvision_ops import make_torchvision_importable
with ThreadPoolExecutor(4) as threads:
    for done in [threads.submit(make_torchvision_importable) for _ in range(4)]:
        done.result()
import open_clip
"""


def test_threads_that_load_models_at_once_wait_for_each_other():
    done = subprocess.run(
        [sys.executable, "-c", IN_TWO_THREADS],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
