"""Jobs submitted to a local head that asks for its token, as a user would type it."""

import re
import signal
import subprocess

import pytest

from tests.cluster.heads import ROOT, ended, running_head
from tests.samples import image_folder

pytestmark = pytest.mark.timeout(175)


@pytest.fixture(scope="module")
def head():
    with running_head(["--num-cpus=4", "--object-store-memory=200000000"]) as head:
        yield head


def started(process: "subprocess.Popen[str]") -> str:
    """Waits until the job prints `started`; returns its id."""
    ids = (re.match(r"(raysubmit_\w+): ", line) for line in process.stderr)
    id = next(found[1] for found in ids if found)
    assert "started\n" in process.stdout
    return id


@pytest.fixture
def scripts(tmp_path):
    """A working directory whose only job does what a line of Python says."""

    def write(line: str) -> list[object]:
        folder = tmp_path / "repository"
        (folder / "jobs").mkdir(parents=True)
        (folder / "jobs" / "precompute.py").write_text(f"import os, sys, time\n{line}\n")
        config = folder / "job.yaml"
        config.write_text(
            "{dataset: {name: icons}, store: x, models: [{name: a, id: 'clip4cir:sum@r'}]}"
        )
        return ["precompute", "--config", config, "--working-dir", folder]

    return write


@pytest.fixture
def config(tmp_path):
    images = image_folder(tmp_path / "images", images=20, queries=9)
    file = tmp_path / "job.yaml"
    file.write_text(
        f"dataset: {{name: folder, root: {images}}}\n"
        "models: [{name: sum, id: 'clip4cir:sum@random-tiny'}]\n"
        f"store: {tmp_path / 'store'}\n"
    )
    return file


def test_jobs_run_by_either_command(head, config, tmp_path):
    job = ["python", "jobs/precompute.py", "--config", config]
    done = head.ray("job", "submit", "--address", head.url, "--working-dir", ROOT, "--", *job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"1 models, 9 queries, 20 images; \d+ blocks computed now", done.stdout)
    evaluation = tmp_path / "evaluate.yaml"
    evaluation.write_text(f"store: {tmp_path / 'store'}\nout: {tmp_path / 'out'}\n")
    code, out, err = ended(head.dafm_submit("evaluate", "--config", evaluation, "--cpus", "1"))
    assert code == 0, out + err
    assert "| sum" in out
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_wrong_configuration_ends_the_submission_with_2(head, config):
    config.write_text("dataset: {name: icons}\nstoer: x\nmodels: []\n")
    code, out, err = ended(head.dafm_submit("precompute", "--config", config))
    assert code == 2, out + err
    assert "did you mean 'store'" in out
    assert "ended with exit code 2" in err


def test_two_submissions_on_one_store(head, config, tmp_path):
    both = [head.dafm_submit("precompute", "--config", config) for _ in range(2)]
    (first, second) = sorted((ended(one) for one in both), key=lambda done: done[0])
    assert (first[0], second[0]) == (0, 5), f"{first}\n{second}"
    assert "1 models, 9 queries, 20 images" in first[1]
    assert "another run is writing" in second[1]
    assert (tmp_path / "store" / "status.json").is_file()


@pytest.mark.parametrize(
    ("line", "code"), [("sys.exit(4)", 4), ("os.kill(os.getpid(), 9)", 137)], ids=["4", "killed"]
)
def test_the_exit_code_of_the_job_is_the_submissions(head, scripts, line, code):
    ended_with, out, err = ended(head.dafm_submit(*scripts(f"print('was here'); {line}")))
    assert ended_with == code, out + err
    assert "\nwas here\n" in out


@pytest.mark.slow
def test_an_interrupted_submission_leaves_the_job_and_a_stopped_job_is_told(head, scripts):
    job = scripts("print('started', flush=True); time.sleep(1000)")
    left, followed = head.dafm_submit(*job), head.dafm_submit(*job)
    ids = [started(process) for process in (left, followed)]
    left.send_signal(signal.SIGINT)
    code, _, err = ended(left)
    assert code == 130
    assert f"to stop it: ray job stop {ids[0]} --address {head.url}" in err
    for id in ids:
        stopped = head.ray("job", "stop", id, "--address", head.url)
        assert "was stopped" in stopped.stdout + stopped.stderr
    code, _, err = ended(followed)
    assert code == 130
    assert f"{ids[1]} was stopped" in err


def test_a_cluster_refuses_who_has_no_token(head, scripts):
    job = scripts("sys.exit(0)")
    for wrong, says in (
        ({"RAY_AUTH_MODE": "disabled"}, "asks for its token"),
        ({"RAY_AUTH_TOKEN": "f" * 32}, "does not take this token"),
    ):
        code, _, err = ended(head.dafm_submit(*job, **wrong))
        assert code == 5
        assert f"{says}: set RAY_AUTH_MODE=token" in err
