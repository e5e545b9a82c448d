import pytest

from dafm_ray.config import EvaluateConfig
from dafm_ray.report.evaluate import evaluate
from tests.samples import labelled_dataset, matrix_store, score_matrix


def notes(root, **signals):
    dataset = labelled_dataset(80, 400)
    matrices = {
        f"test:{name}@random": score_matrix(dataset, seed, signal)
        for seed, (name, signal) in enumerate(signals.items())
    }
    store = matrix_store(root / "s", dataset, matrices)
    config = EvaluateConfig(store.uri, str(root / "out"), ("mean@zscore",), cases=0)
    return evaluate(config).notes


@pytest.mark.parametrize(
    ("signals", "said"),
    [
        ({"a": 1.5, "b": 1.5}, "Fusing pays: mean@zscore"),
        ({"a": 2.5, "b": 0.0}, "Fusing alike does harm: mean@zscore"),
        ({"a": 1.5, "b": 0.5}, "Fusing alike is not enough: mean@zscore"),
    ],
)
def test_whether_the_models_should_be_fused(tmp_path, signals, said):
    assert any(note.startswith(said) for note in notes(tmp_path, **signals))


def test_one_model_is_not_fused_and_has_no_oracle(tmp_path):
    found = notes(tmp_path, a=1.5)
    assert found[0].startswith("Best single system: a")
    assert not any("Fusing" in note or "noise" in note for note in found)


def test_an_oracle_stands_beside_its_control(tmp_path):
    [note] = [note for note in notes(tmp_path, a=1.5, b=1.5) if "after seeing the answer" in note]
    oracle, control = (float(part.split()[-1]) for part in note.split(" %")[:2])
    assert oracle > control > 0
