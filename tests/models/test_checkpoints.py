import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dafm_ray.errors import DataError
from dafm_ray.models.checkpoints import load_strictly, read_checkpoint, weights_digest
from dafm_ray.models.registry import load_model


class Opens:
    """Pickles as a call, as a hostile file would."""

    def __reduce__(self):
        return (print, ("code from the file ran",))


def test_nested_state_dicts_become_prefixed_keys(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"epoch": 7, "CLIP": {"a": torch.ones(1)}, "optimizer": {"x": torch.ones(1)}}, path)
    checkpoint = read_checkpoint(str(path))
    assert set(checkpoint.tensors) == {"CLIP.a"}
    assert set(checkpoint.section("nothing", "CLIP")) == {"a"}


def test_files_are_joined(tmp_path):
    torch.save({"CLIP": {"a": torch.ones(1)}}, tmp_path / "one.pt")
    save_file({"Combiner.b": torch.ones(1)}, tmp_path / "two.safetensors", {"n": "3"})
    checkpoint = read_checkpoint(f"{tmp_path}/one.pt+{tmp_path}/two.safetensors")
    assert set(checkpoint.tensors) == {"CLIP.a", "Combiner.b"}
    assert checkpoint.metadata == {"n": 3}


def test_weights_in_a_package():
    shipped = "package://dafm_ray.demo/weights/clip4cir_sum.safetensors"
    assert read_checkpoint(shipped).section("CLIP")


@pytest.mark.parametrize("value", [nn.Linear(2, 2), {"CLIP": Opens()}], ids=["module", "hostile"])
def test_pickled_objects_are_refused_and_not_run(tmp_path, capsys, value):
    torch.save(value, tmp_path / "module.pt")
    with pytest.raises(DataError, match="Convert it once"):
        read_checkpoint(str(tmp_path / "module.pt"))
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bad.pt", "bad.safetensors"])
def test_unreadable_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(DataError, match=name):
        read_checkpoint(str(tmp_path / name))


def test_a_missing_file_and_a_missing_section(tmp_path):
    with pytest.raises(DataError, match="no weights file"):
        read_checkpoint(str(tmp_path / "no.pt"))
    torch.save({"Other": {"a": torch.ones(1)}}, tmp_path / "other.pt")
    with pytest.raises(DataError, match=r"no CLIP weights \(it holds: Other\)"):
        read_checkpoint(str(tmp_path / "other.pt")).section("CLIP")


def test_what_does_not_fit_is_named():
    layer = nn.Linear(2, 3)
    tensors = {"weight": torch.zeros(3, 3), "scale": torch.zeros(1)}
    with pytest.raises(DataError) as caught:
        load_strictly(layer, tensors, "file.pt")
    message = str(caught.value)
    assert "1 missing (bias)" in message
    assert "1 unexpected (scale)" in message
    assert "weight (3, 3) instead of (3, 2)" in message


def test_narrow_weights_are_upcast():
    layer = nn.Linear(2, 3)
    half = {key: tensor.half() for key, tensor in layer.state_dict().items()}
    load_strictly(layer, half, "file.pt")
    assert layer.weight.dtype == torch.float32


def test_digest_is_of_the_bytes(tmp_path):
    for name, data in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(data)
    a, b, c = (weights_digest(str(tmp_path / name)) for name in "abc")
    assert a == b != c


def test_a_file_may_be_called_random_something(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no weights file random_a\.pt"):
        load_model("clip4cir:sum@random_a.pt")


def test_a_package_that_is_not_there():
    with pytest.raises(DataError, match="no Python package 'no_such_package'"):
        read_checkpoint("package://no_such_package/x.pt")
