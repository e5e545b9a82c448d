"""What `--working-dir .` sends to a cluster, packed by Ray's own function."""

import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[2]
WEIGHTS = "dafm_ray/demo/weights/"


@pytest.fixture(scope="module")
def sent(tmp_path_factory) -> dict[str, int]:
    """Files of the package and their compressed sizes."""
    file = tmp_path_factory.mktemp("package") / "working_dir.zip"
    create_package(str(ROOT), file, include_gitignore=True, include_parent_dir=False, excludes=[])
    with zipfile.ZipFile(file) as package:
        return {member.filename: member.compress_size for member in package.infolist()}


def test_everything_a_job_needs_is_sent(sent):
    patterns = ("dafm_ray/**/*.py", "dafm_ray/**/*.j2", f"{WEIGHTS}*", "jobs/*.py", "configs/*")
    for pattern in patterns:
        needed = {str(file.relative_to(ROOT)) for file in ROOT.glob(pattern)}
        assert needed
        assert needed <= set(sent)


def test_nothing_else_is_sent(sent):
    folders = {name.split("/")[0] for name in sent if "/" in name}
    assert folders <= {"dafm_ray", "jobs", "configs", "deploy"}


def test_the_package_is_small(sent):
    weights = sum(size for name, size in sent.items() if name.startswith(WEIGHTS))
    assert weights < 12_000_000
    assert sum(sent.values()) - weights < 2_000_000
