"""What jobs on Ray Train share: their folder, their workers, and what a failure means."""

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dafm_ray.config import load_config, to_yaml
from dafm_ray.errors import ConfigError, DafmError, refusals
from dafm_ray.session import available_cpus, available_gpus

STATUS = "status.json"


def claim(out: Path, config: Any, machine: Collection[str]) -> None:
    """Make a run folder; one of another configuration is refused, one of the same goes on.

    Args:
        out: the folder.
        config: of the job; written there as `config.yaml`.
        machine: keys that may change between two starts of one run.
    """
    written = out / "config.yaml"
    if written.is_file():
        earlier = asdict(load_config(type(config), written))
        changed = [
            key
            for key, value in asdict(config).items()
            if key not in machine and value != earlier[key]
        ]
        if changed:
            raise ConfigError(
                f"{out} holds a run of another configuration ({', '.join(changed)} differ); "
                "choose another `out`, or delete that folder"
            )
    with refusals(out):
        out.mkdir(parents=True, exist_ok=True)
        written.write_text(to_yaml(config), encoding="utf-8")


def refuse_larger(workers: int, cpus_per_worker: int, use_gpu: bool) -> None:
    """ConfigError if the workers do not fit the cluster; Ray Train would wait without a word."""
    for what, needed, there in (
        ("CPUs", workers * cpus_per_worker, available_cpus()),
        ("GPUs", workers * use_gpu, available_gpus()),
    ):
        if needed > there:
            raise ConfigError(
                f"{workers} workers need {needed} {what}, and the cluster has {there:g}; "
                "lower workers or cpus_per_worker, or set use_gpu to false"
            )


def cause(error: Exception) -> Exception:
    """A user's mistake found in a worker, or the failure itself."""
    for failure in getattr(error, "worker_failures", {}).values():
        found = getattr(failure, "_base_exc", failure)
        if isinstance(found, DafmError):
            return found
    return error
