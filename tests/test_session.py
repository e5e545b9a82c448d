"""How large a cluster is."""

import pytest
import ray

from dafm_ray.errors import ConfigError
from dafm_ray.session import available_cpus, available_gpus


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of these resources."""

    def of(**resources: float) -> None:
        monkeypatch.setattr(ray, "cluster_resources", lambda: resources)

    for name in ("DAFM_MAX_CPUS", "DAFM_MAX_GPUS"):
        monkeypatch.delenv(name, raising=False)
    return of


def test_what_is_there_counts(cluster):
    cluster(CPU=8.0, GPU=2.0)
    assert (available_cpus(), available_gpus()) == (8, 2)
    cluster()
    assert (available_cpus(), available_gpus()) == (1, 0)


def test_what_an_autoscaler_may_start_counts(cluster, monkeypatch):
    cluster(CPU=8.0)
    monkeypatch.setenv("DAFM_MAX_CPUS", "64")
    monkeypatch.setenv("DAFM_MAX_GPUS", "4")
    assert (available_cpus(), available_gpus()) == (64, 4)
    cluster(CPU=80.0, GPU=8.0)
    assert (available_cpus(), available_gpus()) == (80, 8)
    monkeypatch.setenv("DAFM_MAX_GPUS", "")
    assert available_gpus() == 8


def test_a_limit_that_is_no_number_is_refused(cluster, monkeypatch):
    cluster(CPU=8.0)
    monkeypatch.setenv("DAFM_MAX_GPUS", "four")
    with pytest.raises(ConfigError, match="DAFM_MAX_GPUS=four"):
        available_gpus()
