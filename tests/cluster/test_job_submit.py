"""`ray job submit` against a local head, as a user would type it."""

import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.samples import image_folder

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"

PORT = 9365

pytestmark = pytest.mark.timeout(175)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


def ray(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(RAY), *arguments],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )


@pytest.fixture(scope="module")
def head():
    """A head of its own ports; ended by process, so that no other Ray on the machine is."""
    command = ["start", "--head", "--block", "--num-cpus=4", "--include-dashboard=true"]
    command += ["--port=9379", f"--dashboard-port={PORT}", "--dashboard-agent-listen-port=9366"]
    command += ["--object-store-memory=200000000", "--disable-usage-stats"]
    process = subprocess.Popen(
        [str(RAY), *command],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{PORT}"
    deadline = time.monotonic() + 90
    while not answers(f"{address}/api/version"):
        assert process.poll() is None, "the head ended"
        assert time.monotonic() < deadline, "the head did not come up"
        time.sleep(0.5)
    yield address
    family = psutil.Process(process.pid).children(recursive=True)
    for member in [psutil.Process(process.pid), *family]:
        member.kill()
    psutil.wait_procs(family, timeout=20)


def submit(head: str, *job: str) -> subprocess.CompletedProcess[str]:
    return ray(
        "job", "submit", "--address", head, "--working-dir", str(ROOT), "--", sys.executable, *job
    )


def test_precompute_and_evaluate_are_submitted(head, tmp_path):
    images = image_folder(tmp_path / "images", images=20, queries=9)
    config = tmp_path / "job.yaml"
    config.write_text(
        f"dataset: {{name: folder, root: {images}}}\n"
        "models: [{name: sum, id: 'clip4cir:sum@random-tiny'}]\n"
        f"store: {tmp_path / 'store'}\n"
    )
    done = submit(head, "jobs/precompute.py", "--config", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"1 models, 9 queries, 20 images; \d+ blocks computed now", done.stdout)
    evaluation = tmp_path / "evaluate.yaml"
    evaluation.write_text(f"store: {tmp_path / 'store'}\nout: {tmp_path / 'out'}\n")
    done = submit(head, "jobs/evaluate.py", "--config", str(evaluation))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_wrong_configuration_reaches_the_submitter(head, tmp_path):
    config = tmp_path / "job.yaml"
    config.write_text("dataset: {name: icons}\nstoer: x\nmodels: []\n")
    done = submit(head, "jobs/precompute.py", "--config", str(config))
    assert done.returncode != 0
    assert "did you mean 'store'" in done.stdout + done.stderr
