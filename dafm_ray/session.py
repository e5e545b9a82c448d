"""Connecting to Ray: the cluster a job was submitted to, or a local one of our own."""

import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from dafm_ray.errors import ConfigError, DafmError, MachineError

if TYPE_CHECKING:
    from dafm_ray.progress import Progress

Row = dict[str, Any]
"""A row of a Ray Data pipeline."""

CPU_RESOURCE = "DAFM_CPU_RESOURCE"
"""Environment variable that names a custom resource of the nodes for work without a GPU: decoding,
scoring, training of fusions and trials. It keeps them off machines that are paid for their GPU."""

SOME = 0.001
"""Of that resource: no node runs out of it."""

PATIENCE_S = 60.0
"""An encoder may take so long to load its model, or Ray to start anew what a lost node held."""

_OBJECT_STORE_BYTES = 2_000_000_000


def ensure_ray() -> None:
    """Connect once; a local Ray that this starts ends with the process.

    A job submitted to a cluster finds it through RAY_ADDRESS. Without one, a Ray of this machine
    alone is started, bound to loopback.
    """
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(log_to_driver=False)
        except ConnectionError:
            raise MachineError(
                f"no Ray answers at RAY_ADDRESS={address}; start it, or unset RAY_ADDRESS to run "
                "on this machine alone"
            ) from None
        return
    # Ray's own log lines of a private session; errors still reach the caller as exceptions.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=_OBJECT_STORE_BYTES,
    )


def explained(action: Callable[[], Row], row: Row) -> Row:
    """Run one stage on a row; a `DafmError` travels on in the row's `error` instead of being lost.

    Ray keeps the text of an exception raised in a worker, not the exception.
    """
    if row.get("error"):
        return {"error": row["error"]}
    try:
        return {**action(), "error": b""}
    except DafmError as error:
        return {"error": pickle.dumps(error)}


def finished(row: Row) -> Row:
    """The row at the end of its stages; raises the error it carries, if any."""
    if row["error"]:
        raise pickle.loads(row["error"])
    return row


def available_cpus() -> float:
    """CPUs of the whole cluster; of one that grows, those of DAFM_MAX_CPUS, if that is set.

    Raises:
        ConfigError: the variable is no number.
    """
    return _of_cluster("CPU", 1)


def available_gpus() -> float:
    """GPUs of the whole cluster; of one that grows, those of DAFM_MAX_GPUS, if that is set.

    Raises:
        ConfigError: the variable is no number.
    """
    return _of_cluster("GPU", 0)


@contextmanager
def watched(shown: "Progress", patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Say when nothing goes on because nodes were lost: Ray waits for others without a word.

    Args:
        shown: of the stage.
        patience_s: seconds without a finished item after which the nodes are counted.
    """
    import ray

    def there() -> tuple[float, ...]:
        return tuple(float(ray.cluster_resources().get(what, 0)) for what in ("CPU", "GPU"))

    before = there()
    ended = threading.Event()

    def watch() -> None:
        done = -1
        while not ended.wait(patience_s):
            now = there()
            if shown.done == done and any(n < b for n, b in zip(now, before, strict=True)):
                with suppress(MachineError):  # status.json cannot be written; others say so
                    shown.wait(
                        f"nothing was finished for {patience_s:.0f} s, and of {before[0]:g} CPUs "
                        f"and {before[1]:g} GPUs that this began with {now[0]:g} and {now[1]:g} "
                        "are left; it goes on when a node joins (`ray status` says what is asked "
                        "for), or stop it and start it again for what is left"
                    )
            done = shown.done

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _of_cluster(resource: str, without: float) -> float:
    """Ray does not tell how far an autoscaler may go; a cluster of a head alone has nothing yet."""
    import ray

    name = f"DAFM_MAX_{resource}S"
    try:
        limit = float(os.environ.get(name) or 0)
    except ValueError:
        raise ConfigError(
            f"{name}={os.environ[name]} must be the number of {resource}s that the cluster may "
            "grow to"
        ) from None
    return max(float(ray.cluster_resources().get(resource, without)), limit)


def cpu_resources() -> dict[str, float]:
    """What work without a GPU asks for beside CPUs; see `CPU_RESOURCE`.

    Nodes of a cluster that grows from nothing may not be there yet; that is said, and waited for.
    """
    import logging

    import ray

    name = os.environ.get(CPU_RESOURCE)
    if not name:
        return {}
    if name not in ray.cluster_resources():
        logging.getLogger(__name__).warning(
            "no node offers the resource %r (%s) yet; waiting for one", name, CPU_RESOURCE
        )
    return {name: SOME}


def quiet_data() -> None:
    """Turn off Ray Data's own progress bars; the caller shows one of its own."""
    import logging

    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


def one_thread() -> None:
    """Pin torch to one thread in a worker: spinning threads on a busy machine cost up to 10 x."""
    import torch

    torch.set_num_threads(1)
