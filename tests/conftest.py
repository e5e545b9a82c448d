"""Fixtures every test may use: Ray, reference material, small data."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a loopback-only Ray of the tests' own
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

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
def bucket(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """A folder on a real S3-protocol server."""
    import boto3
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="stores")
    yield f"s3://stores/{request.node.name}?endpoint_override={host}:{port}&scheme=http"
    server.stop()
