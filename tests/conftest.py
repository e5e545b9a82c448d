"""Fixtures every test may use: Ray, reference material, small data."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a loopback-only Ray of the tests' own
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["DAFM_CACHE"] = tempfile.mkdtemp(prefix="dafm-cache-")  # of Ray's workers, too

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from tests.object_store import ObjectStore

atexit.register(shutil.rmtree, os.environ["DAFM_CACHE"], ignore_errors=True)
settings.register_profile("no timing", deadline=None)
settings.load_profile("no timing")
torch.set_num_threads(1)  # spinning threads on a busy machine cost up to 10 x

LONGEST = (
    "demo/test_demo.py",
    "tiles/test_precompute.py",
    "fusion/test_tune.py",
    "fusion/test_train.py",
    "datasets/test_make.py",
    "cluster/test_job_submit.py",
    "finetune/test_trainer.py",
    "faults/test_bad_input.py",
    "tiles/test_unpack.py",
    "report/test_results_on_s3.py",
    "tiles/test_object_store.py",
    "test_cli.py",
)
"""Files that start Ray's workers again and again, the longest first."""

REFERENCE = Path(__file__).parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: the short ones level what two processes have left to do."""
    places = {Path(__file__).parent / file: n for n, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def reference_material() -> Path:
    """Golden numbers and real score matrices, which are not part of the product."""
    if not REFERENCE.is_dir():
        message = f"the reference material is not at {REFERENCE}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return REFERENCE


@pytest.fixture(scope="session")
def golden(reference_material: Path) -> Path:
    return reference_material / "golden"


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for all tests of a session: four logical CPUs, whatever the machine has."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


@pytest.fixture
def object_store() -> Iterator["ObjectStore"]:
    """A real S3-protocol server that can be told to fail."""
    from tests.object_store import ObjectStore

    server = ObjectStore()
    yield server
    server.stop()


@pytest.fixture
def bucket(
    object_store: "ObjectStore", monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> str:
    """A folder on a real S3-protocol server; credentials come from the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    options = f"endpoint_override={object_store.address}&scheme=http"
    return f"s3://stores/{request.node.name}?{options}"
