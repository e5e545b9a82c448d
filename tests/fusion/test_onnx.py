import numpy as np
import onnxruntime
import pytest
import torch

from dafm_ray.cli import main
from dafm_ray.config import NetworkConfig
from dafm_ray.errors import ConfigError
from dafm_ray.fusion.artefact import Artefact, Description, Static, TrainedOn
from dafm_ray.fusion.lightfusion import LightFusion
from dafm_ray.fusion.onnx import Graph, export_onnx
from dafm_ray.fusion.rank import masked_scores
from dafm_ray.tiles.manifest import ModelEntry
from tests.samples import labelled_dataset, score_store

MODELS = ("a", "b", "c")


def artefact(network=NetworkConfig(width=8), **change) -> Artefact:  # noqa: B008
    """Two networks as if training had moved every weight."""
    entries = {name: ModelEntry(f"test:{name}@random", name) for name in MODELS}
    given = {
        "models": MODELS,
        "normalisation": "zscore",
        "bank_t": 1.0,
        "profiles": True,
        "references": (),
        "sees_reference": False,
        "network": network,
        "members": ((0, 0), (1, 0), (2, 0)),
        "new_queries": "scores",
        "folds": 3,
        "seed": 0,
        "convex": tuple(Static(f, dict.fromkeys(MODELS, 1 / 3), 0.5) for f in (0, 1, 2, -1)),
        "stores": (TrainedOn("labelled val", "else", "else", entries),),
        "protocol": "out-of-fold",
        "label": "cirr",
        "mode": "fixed",
        "model_dropout": 0.0,
        **change,
    }
    about = Description(**given)
    networks = []
    for n in range(3):
        network = LightFusion(about.shape(0))
        generator = torch.Generator().manual_seed(n)
        with torch.no_grad():
            for weight in network.parameters():
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
        networks.append(network)
    return Artefact(about, tuple(networks), ({"nothing": 0},))


def test_the_graph_ranks_as_torch_does(tmp_path):
    trained = artefact()
    file = tmp_path / "fusion.onnx"
    export_onnx(trained, file)
    session = onnxruntime.InferenceSession(str(file))
    graph = Graph(trained).eval()
    assert [given.name for given in session.get_inputs()] == ["scores", "hubs", "profiles"]
    for candidates in (5, 300):
        given = {name: torch.randn(candidates, size) for name, size in graph.inputs.items()}
        [found] = session.run(["fused"], {name: value.numpy() for name, value in given.items()})
        with torch.inference_mode():
            expected = graph(*given.values()).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_its_inputs_are_those_of_a_store(tmp_path):
    """What a server would send gives what `dafm rank` gives."""
    trained = artefact()
    trained.save(tmp_path / "fusion", [[(1.0, 0.1)]] * 3)
    assert main(["fuse", "export", str(tmp_path / "fusion")]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "fusion" / "fusion.onnx"))
    store = score_store(tmp_path / "store", labelled_dataset(50, 9), MODELS)
    learned = trained.on(store).learned
    chunk = next(masked_scores(store))
    expected = learned(chunk.scores_MBN, np.array(chunk.rows))[0]
    kept = np.flatnonzero(~np.isnan(expected))
    bank, fold = learned.inputs.bank, int(learned.inputs.bank.fold_of_Q[0])
    reference = np.array([store.positions[store.queries[0].reference]])
    alike = bank.profiles.similarities(reference, np.array([fold]), -1)[:, 0]
    [found] = session.run(
        ["fused"],
        {
            "scores": chunk.scores_MBN[:, 0, kept].T,
            "hubs": bank.without(fold)[:, kept].T,
            "profiles": alike[:, kept].T,
        },
    )
    np.testing.assert_allclose(found, expected[kept], atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"normalisation": "rank"},
        {"network": NetworkConfig(kernel=3)},
        {"network": NetworkConfig(gate=True)},
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, change):
    with pytest.raises(ConfigError, match="exported"):
        export_onnx(artefact(**change), tmp_path / "fusion.onnx")
