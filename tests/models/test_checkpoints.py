import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dafm_ray.errors import DataError
from dafm_ray.models.checkpoints import (
    TRAINED_ON,
    load_strictly,
    read_checkpoint,
    trained_on,
    weights_digest,
)
from dafm_ray.models.registry import load_model
from dafm_ray.storage import open_storage


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


def test_a_wrapper_before_every_key_is_taken_off(tmp_path):
    weights = nn.Linear(2, 1).state_dict()
    wrapped = {"state_dict": {f"module.{key}": value for key, value in weights.items()}}
    torch.save(wrapped, tmp_path / "w.pt")
    assert set(read_checkpoint(str(tmp_path / "w.pt")).tensors) == {
        "state_dict.weight",
        "state_dict.bias",
    }


@pytest.mark.parametrize(
    "bad",
    [
        torch.ones(1, 2, dtype=torch.int8),
        torch.ones(1, 2, dtype=torch.complex64),
        torch.tensor([[1.0, float("nan")]]),
        torch.ones(1, 2, device="meta"),
    ],
)
def test_weights_without_usable_numbers_are_named(bad):
    with pytest.raises(DataError, match=r"1 without usable numbers \(weight\)"):
        load_strictly(nn.Linear(2, 1), {"weight": bad, "bias": torch.ones(1)}, "file")


@pytest.mark.parametrize(
    ("name", "content"), [("text.pt", b"hello world"), ("words.txt", b"caf\xe9\n")]
)
def test_files_of_another_kind_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_checkpoint(str(tmp_path / name))
    with pytest.raises(DataError, match="no Python package"):
        read_checkpoint("package://")


OURS = {
    "clip4cir:sum": "clip4cir_sum",
    "tgcir:base": "tgcir",
    "blip4cir:stage1": "blip4cir",
    "sprc:base": "sprc",
}


@pytest.mark.parametrize("family", OURS)
@pytest.mark.parametrize("file", OURS.values())
def test_a_file_of_another_family_is_refused(family, file):
    model = f"{family}@package://dafm_ray.demo/weights/{file}.safetensors"
    if OURS[family] == file:
        load_model(model)
        return
    with pytest.raises(DataError):
        load_model(model)


@pytest.mark.parametrize("words", [["[PAD]", "a"], []])
def test_a_vocabulary_of_another_model_is_refused(golden, tmp_path, words):
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    file = golden / "sprc" / "tuned_clip_arithmetic.pt"
    with pytest.raises(DataError, match="the vocabulary has"):
        load_model(f"sprc:base@{file}+{tmp_path / 'vocab.txt'}")


def test_weights_at_a_uri_are_those_on_disk(object_store, tmp_path, monkeypatch):
    monkeypatch.setenv("DAFM_CACHE", str(tmp_path / "cache"))
    tensors = {"CLIP.a": torch.rand(1000)}
    file = tmp_path / "weights.safetensors"
    save_file(tensors, file, {"n": "3", TRAINED_ON: '["icons train"]'})
    uri = object_store.uri("weights.safetensors")
    open_storage(object_store.uri("")).write("weights.safetensors", pa.py_buffer(file.read_bytes()))
    assert trained_on(uri) == ["icons train"]
    assert not (tmp_path / "cache").exists()  # the header alone was read
    assert weights_digest(uri) == weights_digest(str(file))
    fetched = object_store.count("GET")
    checkpoint = read_checkpoint(f"{uri}+{uri}")
    assert torch.equal(checkpoint.tensors["CLIP.a"], tensors["CLIP.a"])
    assert checkpoint.metadata["n"] == 3
    assert "testing" not in checkpoint.where
    assert object_store.count("GET") == fetched
    with pytest.raises(DataError, match=r"there is no weights file s3://stores/none.pt"):
        read_checkpoint(object_store.uri("none.pt"))
