"""`dafm submit`: a job runs on a cluster, and its messages and its exit code come back.

`ray job submit` ends with 1 whatever a failed job ended with.
"""

import asyncio
import logging
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dafm_ray.config import (
    EvaluateConfig,
    FusionConfig,
    PrecomputeConfig,
    RetrieveConfig,
    StudyConfig,
    load_config,
    read_yaml,
)
from dafm_ray.errors import DONE, ConfigError, MachineError
from dafm_ray.finetune.config import FinetuneConfig, MineConfig
from dafm_ray.job import INTERRUPTED, say
from dafm_ray.session import CPU_RESOURCE, SOME
from dafm_ray.uris import is_uri, local_path, shown

JOBS: Mapping[str, type] = {
    "precompute": PrecomputeConfig,
    "evaluate": EvaluateConfig,
    "train_fusion": FusionConfig,
    "tune_fusion": StudyConfig,
    "finetune": FinetuneConfig,
    "retrieve": RetrieveConfig,
    "negatives": MineConfig,
}
"""The scripts of jobs/, and what configures each."""

ADDRESS = "http://127.0.0.1:8265"
"""Where `ray dashboard` and `kubectl port-forward` make a cluster answer."""

_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_POLL_S = 0.5
_SIGNAL = 128
"""A shell adds this to the signal that killed a process."""


@dataclass(frozen=True)
class Submission:
    """What is sent to a cluster.

    Attributes:
        job: one of `JOBS`.
        config: its YAML. One below `working_dir` is sent along; an absolute path elsewhere is read
            by the job, on the cluster.
        overrides: `key=value`, as for every job.
        working_dir: the repository; Ray sends it without what .gitignore and .rayignore name.
        runtime_env: YAML file of a Ray runtime environment.
        cpus: reserved for the job's own process; with 0 it runs on the head.
        gpus: the same.
        plan: of a precompute: only say what it would take.
    """

    job: str
    config: Path
    overrides: Sequence[str] = ()
    working_dir: Path = Path()
    runtime_env: Path | None = None
    cpus: float = 0
    gpus: float = 0
    plan: bool = False

    def command(self) -> str:
        """What the cluster runs, once everything that can be checked here is.

        Raises:
            ConfigError: no such script or file, or a wrong configuration.
        """
        root = self.working_dir.resolve()
        script = f"jobs/{self.job}.py"
        if not (root / script).is_file():
            raise ConfigError(
                f"there is no {script} in {root}; --working-dir is a copy of the repository"
            )
        config = self.config.resolve()
        if config.is_relative_to(root):
            loaded: object = load_config(JOBS[self.job], config, self.overrides)
            if not self.plan:
                _warn_of_copies(loaded)
            config = config.relative_to(root)
        elif not self.config.is_absolute():
            raise ConfigError(
                f"{self.config} lies outside {root}, which is all that is sent; move it there, or "
                "name an absolute path that the cluster can read"
            )
        if self.plan and self.job != "precompute":
            raise ConfigError(f"--plan is of precompute, not of {self.job}")
        overrides = [part for override in self.overrides for part in ("--set", override)]
        plan = ["--plan"] if self.plan else []
        return shlex.join(["python", script, "--config", str(config), *overrides, *plan])

    @property
    def resources(self) -> dict[str, float]:
        """What keeps a job's own process off the nodes with a GPU, where it asks for CPUs alone."""
        name = os.environ.get(CPU_RESOURCE)
        return {name: SOME} if name and self.cpus and not self.gpus else {}

    def environment(self) -> dict[str, Any]:
        """The Ray runtime environment.

        Raises:
            ConfigError: the file cannot be read.
        """
        values = read_yaml(self.runtime_env) if self.runtime_env else {}
        return {**values, "working_dir": str(self.working_dir.resolve())}


def _warn_of_copies(config: Any) -> None:
    """Say what a job would write into Ray's copy of the working directory."""
    written = ("store",) if isinstance(config, PrecomputeConfig) else ("out", "index")
    for key in written:
        where = getattr(config, key, "")
        if where and not is_uri(where) and not local_path(where).is_absolute():
            say(
                f"warning: {key}: {where} is relative, so it lies in Ray's copy of this folder and "
                "is lost with it; name a path that all nodes share, or a URI"
            )


def submit(submission: Submission, address: str, show: Callable[[str], None]) -> int:
    """Run a job on a cluster and follow it; Ctrl-C leaves it running.

    Args:
        submission: what is sent.
        address: URL of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else
            `ADDRESS`.
        show: takes what the job prints.

    Returns:
        The exit code of the job; 130 after Ctrl-C and for a job that somebody stopped.

    Raises:
        ConfigError: see `Submission`.
        MachineError: no cluster answers, it refuses the job, or it is lost on the way.
    """
    command, environment = submission.command(), submission.environment()
    client = _connected(address)
    where = client.get_address()
    try:
        job = client.submit_job(
            entrypoint=command,
            runtime_env=environment,
            entrypoint_num_cpus=submission.cpus or None,
            entrypoint_num_gpus=submission.gpus or None,
            entrypoint_resources=submission.resources or None,
            metadata={"job": submission.job},
        )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise MachineError(f"the cluster at {where} did not take the job: {error}") from None
    at = f"{job} --address {where}"
    say(f"{job}: {shown(command)}")
    try:
        details = asyncio.run(_followed(client, job, show))
    except KeyboardInterrupt:
        say(
            f"{job} goes on without you; to see what it prints: ray job logs --follow {at}; "
            f"to stop it: ray job stop {at}"
        )
        return INTERRUPTED
    except Exception as error:
        raise MachineError(
            f"the cluster at {where} does not answer any more ({error}); {job} may go on: "
            f"ray job status {at}"
        ) from None
    return _exit_code(job, details)


def _connected(address: str) -> Any:
    if not address and not any(os.environ.get(name) for name in _ADDRESSES):
        address = ADDRESS
    if address:
        # With either variable set, Ray would not look at an argument.
        os.environ[_ADDRESSES[0]] = address
    # Ray's client tells of every ignore file, and that .git stays at home.
    logging.disable(logging.INFO)
    logging.getLogger("ray._private.runtime_env.working_dir").setLevel(logging.ERROR)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient()
    except AuthenticationError:
        sent = os.environ.get("RAY_AUTH_MODE") == "token"
        said = "does not take this token" if sent else "asks for its token"
        raise MachineError(
            f"the cluster at {_place()} {said}: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH "
            "to the file of the cluster's own unless that is ~/.ray/auth_token"
        ) from None
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        answer = "" if isinstance(error, ConnectionError) else f" (it said: {error})"
        raise MachineError(
            f"no Ray cluster answers at {_place()}{answer}; start one, forward its dashboard to "
            "this machine, or name it with --address: docs/cluster.md"
        ) from None


def _place() -> str:
    return next(os.environ[name] for name in _ADDRESSES if os.environ.get(name))


async def _followed(client: Any, job: str, show: Callable[[str], None]) -> Any:
    """Show what a job prints until it ends; returns Ray's details of it."""
    async for lines in client.tail_job_logs(job):
        show(lines)
    while not (details := client.get_job_info(job)).status.is_terminal():
        await asyncio.sleep(_POLL_S)
    return details


def _exit_code(job: str, details: Any) -> int:
    status, code = details.status.value, details.driver_exit_code
    if status == "STOPPED":
        say(f"{job} was stopped; finished work is kept, the same command goes on from here")
        return INTERRUPTED
    if status == "SUCCEEDED":
        return DONE
    if code is None:
        raise MachineError(f"{job} did not run to its end: {details.message}")
    say(f"{job} ended with exit code {code}")
    return int(code) if code > 0 else _SIGNAL - int(code)
