"""What jobs on Ray Train share: their folder, their workers, and what a failure means."""

import functools
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import yaml

from dafm_ray.config import parse_config, to_yaml
from dafm_ray.errors import ConfigError, DafmError
from dafm_ray.lease import LEASE, writing
from dafm_ray.progress import STATUS, followed, status_line, status_writer
from dafm_ray.session import available_cpus, available_gpus, cpu_resources
from dafm_ray.storage import Storage, open_storage
from dafm_ray.uris import shown

if TYPE_CHECKING:
    from ray.train import Checkpoint

CONFIG = "config.yaml"
POLL_S = "0.25"
"""Ray Train's controller looks at its workers so often; by default every 2 s, and each report of an
epoch waits for it."""

_CLEANER_STOPS_S = 1.0


@contextmanager
def claimed(out: Storage, config: Any, machine: Collection[str]) -> Iterator[None]:
    """Hold a run folder; one of another configuration is refused, one of the same goes on.

    Args:
        out: the folder.
        config: of the job; written there as `config.yaml`.
        machine: keys that may change between two starts of one run.

    Raises:
        ConfigError: see `refuse_other`.
        MachineError: another process holds it.
    """
    with writing(out):
        if has_begun(out):
            with suppress(FileNotFoundError, NotADirectoryError):
                refuse_other(out.read(CONFIG).to_pybytes(), config, machine, shown(out.uri))
        out.write(CONFIG, pa.py_buffer(to_yaml(config).encode()))
        yield


def has_begun(out: Storage) -> bool:
    """Whether a run left more than what it is: one that was refused at its start is no run."""
    return not {CONFIG, STATUS, LEASE}.issuperset(out.list(""))


def refuse_other(written: bytes, config: Any, machine: Collection[str], where: str) -> None:
    """ConfigError if a run folder was made by another configuration.

    Args:
        written: the folder's `config.yaml`.
        config: of the job.
        machine: keys that may change between two starts of one run.
        where: the folder, for the message.
    """
    earlier = asdict(parse_config(type(config), yaml.safe_load(written), f"{where}/{CONFIG}"))
    changed = [
        key for key, value in asdict(config).items() if key not in machine and value != earlier[key]
    ]
    if changed:
        raise ConfigError(
            f"{where} holds a run of another configuration ({', '.join(changed)} differ); "
            "choose another `out`, or delete that folder"
        )


def refuse_larger(workers: int, cpus_per_worker: int, use_gpu: bool) -> None:
    """ConfigError if the workers do not fit the cluster; Ray Train would wait without a word."""
    for what, needed, there in (
        ("CPUs", workers * cpus_per_worker, available_cpus()),
        ("GPUs", workers * use_gpu, available_gpus()),
    ):
        if needed > there:
            raise ConfigError(
                f"{workers} workers need {needed} {what}, and the cluster has {there:g}; "
                "lower workers or what each takes, or set use_gpu to false"
            )


def run_workers(
    loop: Callable[[dict[str, Any]], None],
    values: dict[str, Any],
    out: Storage,
    epochs: int,
    workers: int,
    cpus_per_worker: int,
    use_gpu: bool,
    stage: str,
) -> "Checkpoint":
    """Run a training loop on Ray Train's workers; a run of the same folder goes on where it was.

    Args:
        loop: what each worker runs; it reports a checkpoint and writes `status.json` every epoch.
        values: its argument.
        out: of the run, for checkpoints and `status.json`.
        epochs: of the progress bar.
        workers: how many.
        cpus_per_worker: CPUs of each.
        use_gpu: one GPU each.
        stage: name of the progress bar.

    Returns:
        The last checkpoint.

    Raises:
        DafmError: a user's mistake that a worker found.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_S)
    from ray.train import (
        CheckpointConfig,
        FailureConfig,
        RunConfig,
        ScalingConfig,
        TrainingFailedError,
    )
    from ray.train.torch import TorchConfig, TorchTrainer

    _end_at_once()
    filesystem, path = out.location
    trainer = TorchTrainer(
        loop,
        train_loop_config=values,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={
                "CPU": float(cpus_per_worker),
                "GPU": float(use_gpu),
                **({} if use_gpu else cpu_resources()),
            },
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
    )
    try:
        with followed(stage, epochs, lambda: out.read(STATUS).to_pybytes(), "epoch"):
            result = trainer.fit()
    except TrainingFailedError as error:
        raise _cause(error) from None
    assert result.checkpoint is not None
    return result.checkpoint


def write_status(out: str, stage: str, done: int, total: int) -> None:
    """Write a run's `status.json`, from one of its workers."""
    status_writer(open_storage(out))(status_line(stage, done, total))


def _end_at_once() -> None:
    """Ray 2.60 waits 12 s at the end of every fit for a helper that asks a dashboard, whether
    there is one or not. It is told to wait 1 s; where Ray has changed, nothing happens.
    """
    from ray.train.v2.api import data_parallel_trainer as trainer

    name = "PlacementGroupCleanerCallback"
    callback = getattr(trainer, name, None)
    if isinstance(callback, type):
        setattr(trainer, name, functools.partial(callback, stop_timeout=_CLEANER_STOPS_S))


def _cause(error: Exception) -> Exception:
    """A user's mistake found in a worker, or the failure itself."""
    for failure in getattr(error, "worker_failures", {}).values():
        found = getattr(failure, "_base_exc", failure)
        if isinstance(found, DafmError):
            return found
    return error
