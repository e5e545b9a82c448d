import json
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace

import psutil
import pytest
import torch

from dafm_ray.config import DatasetConfig
from dafm_ray.errors import ConfigError, DataError, MachineError
from dafm_ray.finetune.config import FinetuneConfig
from dafm_ray.finetune.trainer import UNFIT, build, finetune, save_weights, train
from dafm_ray.lease import LEASE, writing
from dafm_ray.models.checkpoints import trained_on, weights_digest
from dafm_ray.models.registry import load_model
from dafm_ray.storage import open_storage
from tests.samples import image_folder

TOWERS = {
    "embed_dim": 32,
    "image_size": 64,
    "vision_layers": [1, 1, 1, 1],
    "vision_width": 8,
    "patch_size": 0,
    "context_length": 12,
    "text_width": 32,
    "text_heads": 1,
    "text_layers": 1,
}


@pytest.fixture
def config(tmp_path):
    data = DatasetConfig("folder", root=str(image_folder(tmp_path / "images", 24, 16)))
    return FinetuneConfig(
        train=data,
        validation=data,
        model="clip4cir:sum@scratch",
        out=str(tmp_path / "out"),
        scratch={"towers": TOWERS},
        epochs=4,
        batch_size=8,
        shift=1,
        learning_rate=2e-3,
        logit_scale=20.0,
    )


def run(config, state=None, stop_after=None):
    model, reports = build(config), []

    def report(metrics, state):
        reports.append((metrics, state))
        if len(reports) == stop_after:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        train(config, model, lambda loss: loss, report, state)
    return reports


def test_the_loss_falls_and_training_triplets_are_learnt(config):
    reports = run(replace(config, epochs=12, patience=12))
    assert reports[-1][0]["loss"] < 0.5 * reports[0][0]["loss"]
    assert reports[-1][0]["R@10"] > reports[0][0]["R@10"]


def test_a_resumed_run_equals_an_unbroken_one(config):
    unbroken = run(config)
    broken = run(config, stop_after=2)
    resumed = run(config, state=broken[-1][1])
    assert [m for m, _ in unbroken] == [m for m, _ in broken + resumed]
    weights, again = unbroken[-1][1]["weights"], resumed[-1][1]["weights"]
    assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_only_the_named_parts_learn(config, tmp_path):
    towers = build(config)
    save_weights(towers, tmp_path / "towers.safetensors")
    second = replace(
        config,
        model=f"clip4cir:combiner@{tmp_path / 'towers.safetensors'}",
        scratch={"combiner": {"projection": 16, "hidden": 16}},
        parts=("Combiner",),
        epochs=1,
    )
    before = build(second).module.state_dict()
    model = build(second)
    learning = {name for name, p in model.module.named_parameters() if p.requires_grad}
    assert learning == {name for name in before if name.startswith("Combiner.")}
    train(second, model, lambda loss: loss, lambda metrics, state: None)
    for key, tensor in model.module.state_dict().items():
        same = torch.equal(before[key], tensor)
        assert same == key.startswith("CLIP."), key


def test_training_stops_when_recall_stops_rising(config):
    reports = run(replace(config, epochs=30, patience=2, learning_rate=1e-7))
    best = max(range(len(reports)), key=lambda n: (reports[n][0]["R@10"], -n))
    assert len(reports) == best + 3 < 30


def test_saved_weights_are_a_frozen_model(config, tmp_path):
    model = build(config)
    model.module.eval()
    save_weights(model, tmp_path / "weights.safetensors")
    loaded = load_model(f"clip4cir:sum@{tmp_path / 'weights.safetensors'}")
    assert loaded.sizes == model.sizes
    with torch.inference_mode():
        assert torch.equal(loaded.encode_texts(["change 3"]), model.encode_texts(["change 3"]))


def test_equal_weights_are_equal_files(config, tmp_path):
    model, file = build(config), tmp_path / "weights.safetensors"
    digests = set()
    for _ in range(12):
        save_weights(model, file, learned_from=["icons train", 'a folder called "ünder \n"'])
        digests.add(weights_digest(str(file)))
    assert len(digests) == 1
    assert trained_on(str(file)) == ["icons train", 'a folder called "ünder \n"']


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ("Decoder",)}, "names no parameter"),
        ({"parts": ("", "CLI")}, "'CLI' names no parameter"),
        ({"model": "clip4cir:summ@scratch"}, "offers the variants"),
        ({"scratch": {"towers": {**TOWERS, "text_width": -3}}}, "text_width is -3"),
        ({"scratch": {"towers": {**TOWERS, "text_heads": 3}}}, "multiple of text_heads"),
        ({"scratch": {}}, "scratch.towers"),
        ({"model": "lavis:text@scratch"}, "cannot be trained"),
    ],
)
def test_wrong_configurations(config, change, message):
    with pytest.raises(ConfigError, match=message):
        build(replace(config, **change))


def test_too_few_triplets_and_a_loss_that_is_no_number(config):
    with pytest.raises(DataError, match="do not fill one batch"):
        build(replace(config, batch_size=32))
    with pytest.raises(DataError, match=r"the loss is (nan|inf)"):
        run(replace(config, learning_rate=1e30))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0"),
        ({"logit_scale": -5.0}, "logit_scale"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"gradient_clip": float("inf")}, "gradient_clip"),
        ({"loss": {"itc": -1.0}}, "loss.itc"),
        ({"loader_workers": -1}, "loader_workers"),
        ({"seed": 2**40}, "seed"),
        ({"scratch": {"visionn": "x"}}, "not visionn"),
    ],
)
def test_numbers_no_training_can_use_are_refused(config, change, message):
    with pytest.raises(ConfigError, match=message):
        replace(config, **change)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("change", [{"use_gpu": True}, {"cpus_per_worker": 999}])
def test_workers_that_do_not_fit_the_cluster_are_refused_instead_of_waiting(
    config, tmp_path, change
):
    with pytest.raises(ConfigError, match="the cluster has"):
        finetune(replace(config, **change))
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(170)
@pytest.mark.usefixtures("local_ray")
def test_two_workers_on_ray_train(config, tmp_path):
    config = replace(config, workers=2, epochs=2)
    (tmp_path / "images" / "003.png").write_bytes(b"no picture")
    trained = finetune(config)
    weights = trained.weights
    assert load_model(f"clip4cir:sum@{weights}").sizes.embed_dim == 32
    assert [(one.item, one.what) for one in trained.unfit] == [("003.png", "left out")]
    listed = (tmp_path / "out" / UNFIT).read_text().splitlines()
    assert listed[0] == "item,what,reason"
    assert listed[1].startswith("003.png,left out,")
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2]
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["stage"], status["done"], status["total"]) == ("train", 2, 2)
    with (
        writing(open_storage(config.out)),
        pytest.raises(MachineError, match="another run is writing"),
    ):
        finetune(config)
    with pytest.raises(ConfigError, match=r"another configuration \(epochs differ\)"):
        finetune(replace(config, epochs=3))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("local_ray")
def test_a_killed_worker_costs_at_most_an_epoch(config, tmp_path):
    killed = threading.Event()

    def kill_after_the_first_checkpoint():
        while not list((tmp_path / "out").glob("checkpoints/checkpoint_*/state.pt")):
            time.sleep(0.2)
        for process in psutil.process_iter(["cmdline"]):
            if any("RayTrainWorker" in part for part in process.info["cmdline"] or []):
                process.send_signal(signal.SIGKILL)
                killed.set()

    threading.Thread(target=kill_after_the_first_checkpoint, daemon=True).start()
    finetune(replace(config, epochs=40, patience=40))
    assert killed.is_set()
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert [row["epoch"] for row in history] == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(300)
def test_a_training_on_s3_is_the_training_on_disk(config, object_store, tmp_path):
    config = replace(config, epochs=2)
    local = finetune(config)
    uri = object_store.uri("finetuned")
    trained = finetune(replace(config, out=uri))
    written = open_storage(uri)
    left = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} - {LEASE}
    assert left <= set(written.list(""))
    assert weights_digest(str(trained.weights)) == weights_digest(str(local.weights))
    assert trained_on(str(trained.weights)) == trained_on(str(local.weights))
    load_model(f"clip4cir:sum@{trained.weights}")
    with pytest.raises(ConfigError, match="another configuration"):
        finetune(replace(config, out=uri, epochs=3))
