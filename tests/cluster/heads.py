"""Heads of a test's own: free ports, a token, ended by process so that no other Ray is."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        url: of its dashboard.
        environment: of everybody who has its token.
    """

    url: str
    environment: Mapping[str, str]

    def ray(self, *arguments: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [str(BIN / "ray"), *map(str, arguments)],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=170,
        )

    def dafm_submit(self, *job: object, **more: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "dafm_ray", "submit", *map(str, job), "--address", self.url],
            cwd=ROOT,
            env={**self.environment, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def ended(process: "subprocess.Popen[str]", within: float = 170) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    out, err = process.communicate(timeout=within)
    return process.returncode, out, err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_head(
    options: Sequence[str], gcs_port: int | None = None, **more: str
) -> Iterator[Head]:
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",  # jobs run `python`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        **more,
    }
    dashboard = free_port()
    ports = {
        "port": gcs_port or free_port(),
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", *options]
    process = subprocess.Popen(
        [*command, *(f"--{name}={port}" for name, port in ports.items())],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 90
        while not _answers(f"{url}/api/version"):
            assert process.poll() is None, "the head ended"
            assert time.monotonic() < deadline, "the head did not come up"
            time.sleep(0.5)
        yield Head(url, environment)
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        for member in [psutil.Process(process.pid), *family]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=20)


def _answers(url: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    try:
        with urllib.request.urlopen(request, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
