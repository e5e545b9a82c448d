"""Preferences: what is preferred to what, what learns, and what a run keeps."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import logsigmoid, normalize

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.finetune.config import FinetuneConfig, MiningConfig, PreferenceConfig
from dafm_ray.finetune.dpo import INDEX
from dafm_ray.finetune.losses import preference_loss, smooth_log_rank
from dafm_ray.finetune.objective import total_loss
from dafm_ray.finetune.trainer import build, objective_of, save_weights, train
from dafm_ray.storage import open_storage
from tests.finetune.test_step import VIT
from tests.samples import image_folder

TEXT = ("CLIP.transformer", "CLIP.text_projection")
WINDOW = MiningConfig(ranks=(1, 8))


@pytest.fixture
def config(tmp_path):
    root = image_folder(tmp_path / "images", 24, 16)
    colours = np.random.default_rng(0).integers(0, 255, (24, 3))
    for n, colour in enumerate(colours.tolist()):
        Image.new("RGB", (40, 32), tuple(colour)).save(root / f"{n:03d}.png")
    data = DatasetConfig("folder", root=str(root))
    made = FinetuneConfig(
        train=data,
        validation=data,
        model="zeroshot:sum@scratch",
        out=str(tmp_path / "out"),
        scratch={"towers": VIT},
        batch_size=8,
        epochs=3,
        patience=3,
        learning_rate=1e-2,
    )
    save_weights(build(made), tmp_path / "clip.safetensors")
    return replace(
        made,
        model=f"zeroshot:sum@{tmp_path / 'clip.safetensors'}",
        scratch={},
        parts=TEXT,
        preference=PreferenceConfig("corrected", negatives=WINDOW),
    )


def variant(config, name, **preference):
    model = config.model.replace("zeroshot:sum", f"zeroshot:{name}")
    return replace(config, model=model, preference=PreferenceConfig(**preference))


def opened(config):
    model = build(config)
    objective = objective_of(config, model, 0)
    objective.begin(0)
    return model, objective


def run(config, state=None, stop_after=None):
    model, reports = build(config), []

    def report(metrics, state):
        reports.append((metrics, state))
        if len(reports) == stop_after:
            raise KeyboardInterrupt

    try:
        train(config, model, lambda loss: loss, report, state)
    except KeyboardInterrupt:
        return reports
    return reports


def features(model, dataset, ids):
    gallery = dataset.gallery
    images = [dataset.source.open(gallery.locators[gallery.position(id)]) for id in ids]
    with torch.no_grad():
        return model.encode_gallery(torch.stack([model.preprocess(image) for image in images]))


def test_the_papers_loss_is_the_papers(config):
    """The positive is the reference, the negative its nearest neighbour, the query the text."""
    window = replace(WINDOW, near="positive", sampling="first")
    config = variant(config, "hidden", recipe="paper", negatives=window)
    config = replace(config, preference=replace(config.preference, beta=0.3))
    model, objective = opened(config)
    dataset = load_dataset(config.train)
    ids = dataset.gallery.ids
    images_ND = features(model, dataset, ids)
    batch = next(iter(objective.batches(0)))
    with torch.no_grad():
        found = total_loss(objective(batch), batch.target_ids_B, model)
        expected = []
        for q in batch.queries_B.tolist():
            query = dataset.queries[q]
            text_D = normalize(model.compose(None, [model.caption(query.captions)])[0], dim=0)
            reference_D = images_ND[ids.index(query.reference)]
            nearest = (images_ND @ reference_D).argsort(descending=True).tolist()
            never = {query.reference, *query.targets, *query.excluded}
            negative = next(n for n in nearest if ids[n] not in never)
            margin = model.logit_scale() * (text_D @ (reference_D - images_ND[negative]))
            expected.append(-logsigmoid(0.3 * margin))
    assert float(found) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


def test_with_a_reference_policy_nothing_is_preferred_yet(config):
    model, objective = opened(config)
    batch = next(iter(objective.batches(0)))
    found = total_loss(objective(batch), batch.target_ids_B, model)
    assert float(found) == pytest.approx(math.log(2), abs=1e-6)
    without = replace(config, preference=replace(config.preference, reference_policy=False))
    model, objective = opened(without)
    assert float(total_loss(objective(batch), batch.target_ids_B, model)) != pytest.approx(
        math.log(2), abs=1e-3
    )


def test_negatives_are_never_what_a_query_asks_for_or_begins_with(config):
    _, objective = opened(config)
    dataset = load_dataset(config.train)
    for batch in objective.batches(1):
        for q, target, negatives in zip(
            batch.queries_B, batch.target_ids_B, batch.negatives_BC, strict=True
        ):
            query = dataset.queries[int(q)]
            assert dataset.gallery.ids[int(target)] in query.targets
            named = {dataset.gallery.ids[n] for n in negatives.tolist()}
            assert named
            assert not named & {*query.targets, query.reference, *query.excluded}


@pytest.mark.parametrize("recipe", ["paper", "corrected", "listwise"])
def test_only_the_text_side_learns(config, recipe):
    model_of = {"paper": "hidden"}.get(recipe, "sum")
    window = replace(WINDOW, sampling="first", every=20)
    config = variant(config, model_of, recipe=recipe, negatives=window)
    config = replace(config, epochs=12, patience=12, learning_rate=1e-3)
    before = build(config).module.state_dict()
    model = build(config)
    learning = {name for name, p in model.module.named_parameters() if p.requires_grad}
    assert learning == {name for name in before if name.startswith(TEXT)}
    assert len(learning) == 13
    reports = []
    train(config, model, lambda loss: loss, lambda metrics, state: reports.append(metrics))
    for key, tensor in model.module.state_dict().items():
        moved = not torch.equal(before[key], tensor)
        # Skipping the projection leaves it without a gradient.
        assert moved == (key in learning and (recipe != "paper" or "projection" not in key)), key
    assert reports[-1]["loss"] < reports[0]["loss"]


@pytest.mark.parametrize("near", ["query", "positive"])
def test_a_resumed_run_equals_an_unbroken_one(config, near):
    """The negatives of an epoch may be mined under the weights of an earlier one."""
    mining = replace(WINDOW, every=2, near=near)
    config = replace(config, preference=replace(config.preference, negatives=mining), epochs=5)
    whole = run(replace(config, patience=5))
    broken = run(replace(config, patience=5), stop_after=3)
    resumed = run(replace(config, patience=5), state=broken[-1][1])
    assert [m for m, _ in whole] == [m for m, _ in broken + resumed]


def test_the_index_of_a_run_at_a_uri_lies_there(config, tmp_path, object_store, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    opened(replace(config, out=object_store.uri("run")))
    assert any(
        path.endswith("/index.faiss") for path in open_storage(object_store.uri("run")).list(INDEX)
    )
    assert set(tmp_path.iterdir()) == before


def test_the_index_is_made_once_and_anew_for_other_weights(config, tmp_path, monkeypatch):
    opened(config)
    assert len(list((tmp_path / "out" / INDEX).iterdir())) == 1

    def forbidden(*arguments):
        raise AssertionError("the gallery is encoded again")

    with monkeypatch.context() as patched:
        patched.setattr("dafm_ray.search.gallery.gallery_blocks", forbidden)
        opened(config)
    other = build(replace(config, model="zeroshot:sum@scratch", scratch={"towers": VIT}, seed=9))
    save_weights(other, tmp_path / "clip.safetensors")
    opened(config)
    assert len(list((tmp_path / "out" / INDEX).iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ("",)}, "name parts of the text side alone"),
        ({"parts": ("CLIP.visual",)}, "name parts of the text side alone"),
        ({"preference": PreferenceConfig("corrected")}, "ranks ends at 50, and a query has"),
        (
            {"preference": PreferenceConfig("corrected", negatives=replace(WINDOW, shards=2))},
            "leave negatives.shards out",
        ),
    ],
)
def test_wrong_configurations(config, change, message):
    with pytest.raises(ConfigError, match=message):
        opened(replace(config, **change))


@pytest.mark.parametrize("model", ["zeroshot:image", "zeroshot:oti", "clip4cir:sum"])
def test_only_texts_and_sums_learn_preferences(config, model):
    with pytest.raises(ConfigError, match="preference trains the text side of zeroshot:text"):
        opened(replace(config, model=config.model.replace("zeroshot:sum", model)))


def test_queries_that_the_rules_leave_no_negative_are_listed(config):
    mining = replace(WINDOW, cap=-2.0)
    with pytest.raises(DataError, match="leave no query a negative"):
        opened(replace(config, preference=replace(config.preference, negatives=mining)))
    _, whole = opened(config)
    cosines = whole._candidates_ND @ whole._candidates_ND.T
    near = float(cosines.fill_diagonal_(-1).amax(1).median())
    mining = replace(WINDOW, ranks=(1, 1), near_duplicate=near, near="positive")
    _, objective = opened(replace(config, preference=replace(config.preference, negatives=mining)))
    without = [one.item for one in objective.unfit]
    assert 0 < len(without) < 16
    batches = list(objective.batches(0))
    assert all(one.reason == "the rules leave it no negative" for one in objective.unfit)
    assert sum(int((batch.negatives_BC < 0).sum()) for batch in batches) == len(without)


def test_an_image_that_cannot_be_read_leaves_its_queries_out(config, tmp_path):
    (tmp_path / "images" / "001.png").write_bytes(b"no picture")
    _, objective = opened(config)
    assert [one.item for one in objective.unfit] == ["001.png"]
    dataset = load_dataset(config.train)
    lost = sum("001.png" in (q.reference, *q.targets) for q in dataset.queries)
    assert lost
    assert len(objective._captions_Q) == len(dataset.queries) - lost


@pytest.mark.parametrize("candidates", ["batch", "gallery"])
def test_the_listwise_loss_is_the_smooth_rank_in_the_querys_own_gallery(config, candidates):
    """Two data sets of one picture each: neither is ranked against the other's candidates."""
    preference = PreferenceConfig("listwise", candidates=candidates, tau=0.1)
    both = (config.train, config.train)
    config = replace(config, train=both, preference=preference, batch_size=16)
    model, objective = opened(config)
    dataset = load_dataset(config.validated_on[0])
    ids = dataset.gallery.ids
    images_ND = features(model, dataset, ids)
    batch = next(iter(objective.batches(0)))
    asked = [divmod(int(q), len(dataset.queries)) for q in batch.queries_B]
    assert {place for place, _ in asked} == {0, 1}
    expected = []
    with torch.no_grad():
        found = total_loss(objective(batch), batch.target_ids_B, model)
        for (place, q), target in zip(asked, batch.target_ids_B.tolist(), strict=True):
            query = dataset.queries[q]
            image_1D = images_ND[ids.index(query.reference)][None]
            query_D = model.compose(image_1D, [model.caption(query.captions)])[0]
            rivals = set(range(len(ids)))
            if candidates == "batch":
                rivals = {t - place * len(ids) for t in batch.target_ids_B.tolist()} & rivals
            never = {query.reference, *query.targets, *query.excluded}
            rivals = {n for n in rivals if ids[n] not in never}
            own = images_ND[target - place * len(ids)] @ query_D
            ahead = [torch.sigmoid((images_ND[n] @ query_D - own) / 0.1) for n in rivals]
            expected.append(math.log1p(float(sum(ahead))))
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-4)


def test_losses_by_hand():
    margin = torch.tensor([[1.0, -2.0], [3.0, 9.0]])
    there = torch.tensor([[True, True], [True, False]])
    one = [math.log1p(math.exp(-0.5 * m)) for m in (1.0, -2.0, 3.0)]
    expected = ((one[0] + one[1]) / 2 + one[2]) / 2
    assert float(preference_loss(margin, 0.5, there)) == pytest.approx(expected)
    nothing = torch.zeros_like(there)
    assert float(preference_loss(margin, 0.5, nothing)) == 0
    scores = torch.tensor([[1.0, 2.0, 0.0, 5.0]])
    never = torch.tensor([[True, False, False, True]])
    sharp = smooth_log_rank(scores, torch.tensor([0]), never, 1e-3)
    assert float(sharp) == pytest.approx(math.log(2))
