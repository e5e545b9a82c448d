import json

import pytest
import torch
from safetensors.torch import save_file

from dafm_ray.cli import main
from dafm_ray.errors import DataError
from dafm_ray.models.checkpoints import TRAINED_ON, trained_on
from dafm_ray.report.audits.stacking import audit_stacking
from tests.samples import labelled_dataset, matrix_store, score_matrix, score_store


def weights(file, *labels):
    header = {TRAINED_ON: json.dumps(labels)} if labels else {}
    save_file({"w": torch.zeros(1)}, file, metadata=header)
    return str(file)


def made(root, file, split, signal=1.0):
    dataset = labelled_dataset(300, 400, split=split)
    return matrix_store(root, dataset, {f"zeroshot:image@{file}": score_matrix(dataset, 0, signal)})


def test_weights_that_learned_from_the_queries_are_a_leak(tmp_path, capsys):
    file = weights(tmp_path / "w.safetensors", "labelled train", "labelled val")
    store = made(tmp_path / "s", file, "val")
    assert audit_stacking(store).leaks
    assert main(["audit", "stacking", store.uri]) == DataError.exit_code
    assert "image learned from these queries" in capsys.readouterr().out
    assert not audit_stacking(made(tmp_path / "t", file, "test")).leaks


def test_weights_that_say_nothing(tmp_path):
    assert trained_on(weights(tmp_path / "w.safetensors")) == []
    assert trained_on(str(tmp_path / "nowhere.safetensors")) == []
    (tmp_path / "broken.safetensors").write_text("no tensors")
    assert trained_on(str(tmp_path / "broken.safetensors")) == []
    assert trained_on("random") == []


def test_several_files_are_joined(tmp_path):
    one, two = (weights(tmp_path / f"{n}.safetensors", "a", n) for n in "bc")
    assert trained_on(f"{one}+{two}") == ["a", "b", "c"]


def test_a_model_that_is_better_on_what_it_saw_is_suspicious(tmp_path):
    file = weights(tmp_path / "w.safetensors")
    seen, new = made(tmp_path / "s", file, "val", 3.0), made(tmp_path / "t", file, "test", 1.5)
    found = audit_stacking(seen, new)
    assert not found.leaks
    assert found.details["image"]["ci95"][0] > 0
    assert "What image learned from is not known" in found.notes[1]
    assert "beyond chance: image" in found.notes[2]
    assert "No model is better" in audit_stacking(new, seen).notes[2]


def test_queries_are_not_their_own_control(tmp_path):
    store = made(tmp_path / "s", weights(tmp_path / "w.safetensors"), "val")
    with pytest.raises(DataError, match=r"holds queries of .* hold other queries out"):
        audit_stacking(store, store)


def test_other_models_cannot_be_compared(tmp_path):
    store = made(tmp_path / "s", weights(tmp_path / "w.safetensors"), "val")
    other = score_store(tmp_path / "t", labelled_dataset(20, 9, split="test"))
    with pytest.raises(DataError, match="does not hold the model image"):
        audit_stacking(store, other)
