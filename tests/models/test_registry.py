import subprocess
import sys
import textwrap

import pytest

from dafm_ray.errors import ConfigError
from dafm_ray.models.registry import families, family


def test_unknown_family_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'clip4cir'"):
        family("clip4cri")


def test_every_row_can_be_imported():
    for name in families():
        assert family(name).variants


def test_a_family_of_another_package_is_found_by_its_entry_point(tmp_path):
    (tmp_path / "outside.py").write_text(
        textwrap.dedent("""
        from dafm_ray.models.zeroshot import ZeroShot

        class Outside(ZeroShot):
            variants = ("image",)
        """)
    )
    metadata = tmp_path / "outside-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[dafm_ray.models]\nmine = outside:Outside\n")
    code = (
        "from dafm_ray.models.registry import load_model;"
        "print(load_model('mine:image@random-tiny').variant)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "image", done.stderr
