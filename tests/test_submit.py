"""What `dafm submit` finds wrong before a cluster is asked; the rest is in cluster/."""

import re
import shlex
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from dafm_ray import job as jobs_module
from dafm_ray import submit
from dafm_ray.cli import main
from dafm_ray.config import load_config, to_yaml
from dafm_ray.errors import ConfigError
from dafm_ray.submit import JOBS, Submission

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_address(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_every_job_has_a_script_that_runs_it():
    functions = {name for name in vars(jobs_module) if name.endswith("_job")} - {
        "run_job",
        "plan_job",
    }
    assert {script.stem for script in (ROOT / "jobs").glob("*.py")} == set(JOBS)
    assert {f"{name}_job" for name in JOBS} == functions
    for name, kind in JOBS.items():
        script = (ROOT / "jobs" / f"{name}.py").read_text()
        assert f"run_job({kind.__name__}, {name}_job" in script


def test_a_configuration_below_the_working_directory_is_sent_along(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = Submission("precompute", Path("configs/icons.yaml"), ["store=s3://b/a b"]).command()
    assert command == (
        "python jobs/precompute.py --config configs/icons.yaml --set 'store=s3://b/a b'"
    )
    absolute = Submission("precompute", ROOT / "configs/icons.yaml", working_dir=ROOT)
    assert "--config configs/icons.yaml" in absolute.command()
    assert Submission("precompute", absolute.config, working_dir=ROOT, plan=True).command() == (
        "python jobs/precompute.py --config configs/icons.yaml --plan"
    )
    elsewhere = Submission("precompute", Path("/on/the/cluster.yaml"))
    assert elsewhere.command().endswith("--config /on/the/cluster.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "configs/icons.yaml", "--set", "stoer=x"], "did you mean 'store'"),
        (["--config", "configs/nothing.yaml"], "cannot read the configuration"),
        (["--config", "../job.yaml"], "lies outside"),
        (["--config", "configs/icons.yaml", "--working-dir", "docs"], "there is no jobs/"),
        (["--config", "configs/icons.yaml", "--runtime-env", "no.yaml"], "cannot read no.yaml"),
        (["--config", "configs/icons.yaml", "--runtime-env", "LICENSE"], "LICENSE is not YAML"),
    ],
)
def test_what_is_wrong_is_said_before_a_cluster_is_asked(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["submit", "precompute", *arguments, "--address", "http://127.0.0.1:9"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("file", ["README.md", "docs/cluster.md"])
def test_commands_of_the_documents_are_sound_and_name_no_path_of_the_copy(file, monkeypatch):
    sent: list[Submission] = []
    monkeypatch.setattr("dafm_ray.cli.submit", lambda submission, *_: sent.append(submission))
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^dafm (submit .*)$", (ROOT / file).read_text(), re.M)
    assert commands
    for command in commands:
        main(shlex.split(command, comments=True))
        sent[-1].command()
        config = load_config(JOBS[sent[-1].job], sent[-1].config, sent[-1].overrides)
        assert "runs/" not in to_yaml(config)
    if file == "docs/cluster.md":
        assert {submission.job for submission in sent} == set(JOBS)


def test_places_that_end_with_the_copy_are_warned_of(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    Submission("precompute", Path("configs/icons.yaml")).command()
    assert "warning: store: runs/icons/test is relative" in capsys.readouterr().err
    places = ["index=/shared/index", "out=s3://bucket/ranks"]
    Submission("retrieve", Path("configs/retrieve_icons.yaml"), places).command()
    assert not capsys.readouterr().err


def test_a_job_that_reserves_cpus_stays_off_gpu_nodes(monkeypatch):
    monkeypatch.setenv("DAFM_CPU_RESOURCE", "cpu_node")
    assert list(Submission("evaluate", Path("x"), cpus=4).resources) == ["cpu_node"]
    assert not Submission("evaluate", Path("x"), cpus=4, gpus=1).resources
    assert not Submission("evaluate", Path("x")).resources


def test_a_plan_is_of_a_precompute():
    with pytest.raises(ConfigError, match="--plan is of precompute"):
        Submission("evaluate", ROOT / "configs/icons_evaluate.yaml", plan=True).command()


def test_no_cluster_ends_with_5(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    job = ["submit", "precompute", "--config", "configs/icons.yaml"]
    assert main([*job, "--address", "http://127.0.0.1:9"]) == 5
    assert "no Ray cluster answers at http://127.0.0.1:9;" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "body"), [(200, b"hello"), (200, b"{}"), (503, b"")])
def test_a_server_that_is_no_ray_ends_with_5(status, body, monkeypatch, capsys):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(ROOT)
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        job = ["submit", "precompute", "--config", "configs/icons.yaml", "--address", address]
        assert main(job) == 5
    finally:
        server.shutdown()
        server.server_close()
    assert f"no Ray cluster answers at {address}" in capsys.readouterr().err


def test_a_job_that_never_ran_ends_with_5(monkeypatch, capsys):
    from ray.job_submission import JobDetails

    message = "runtime_env setup failed: no disk"

    class Client:
        def get_address(self):
            return "http://head"

        def submit_job(self, **_):
            return "raysubmit_1"

        async def tail_job_logs(self, _):
            yield "line\n"

        def get_job_info(self, _):
            return JobDetails(type="SUBMISSION", status="FAILED", entrypoint="", message=message)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(submit, "_connected", lambda _: Client())
    assert main(["submit", "precompute", "--config", "configs/icons.yaml"]) == 5
    captured = capsys.readouterr()
    assert captured.out == "line\n"
    assert message in captured.err
