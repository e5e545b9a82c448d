import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dafm_ray.config import DatasetConfig, EvaluateConfig
from dafm_ray.datasets.base import Dataset, Gallery
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.report.evaluate import evaluate
from dafm_ray.tiles.ingest import ingest
from dafm_ray.tiles.store import TileStore
from tests.samples import labelled_dataset, score_matrix, score_store

SPEC = {"split": "val", "protocol": "cirr", "reference": "mask"}


def score_folder(
    folder: Path, dataset: Dataset, models=("a", "b"), seed=None, dtype=np.float32, **spec
) -> Path:
    """What a user would dump; rows and columns in an order of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(dataset.queries)) if seed is not None else slice(None)
    columns = rng.permutation(len(dataset.gallery)) if seed is not None else slice(None)
    queries = [
        {
            "id": q.id,
            "reference": q.reference,
            "targets": list(q.targets),
            "captions": list(q.captions),
            "group": list(q.group) or None,
            "fold_group": q.fold_group,
        }
        for q in dataset.queries
    ]
    files = {
        "scores": {**SPEC, "dataset": dataset.name, **spec},
        "queries": queries,
        "query_ids": np.array([q.id for q in dataset.queries])[rows].tolist(),
        "gallery_ids": np.array(dataset.gallery.ids)[columns].tolist(),
    }
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    for m, model in enumerate(models):
        scores = score_matrix(dataset, m).astype(dtype)
        np.save(folder / f"{model}.npy", scores[rows][:, columns])
    return folder


def change(folder: Path, name: str, edit) -> None:
    file = folder / f"{name}.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(edit(values)))


def whole(store: TileStore, model: str) -> np.ndarray:
    return np.concatenate([store.scores(model, q) for q in range(len(store.tile_rows))])


@pytest.fixture(scope="module")
def cirr_val(reference_material, tmp_path_factory):
    folder = reference_material / "scores" / "cirr_val"
    return ingest(str(folder), str(tmp_path_factory.mktemp("ingest") / "store"))


def test_real_scores_give_every_integer_that_was_counted_elsewhere(
    cirr_val, reference_material, tmp_path
):
    """Four models and the mean of z-scores; best, worst, hash order and expected hits."""
    expected = json.loads((reference_material / "scores/cirr_val/expected.json").read_text())
    out = tmp_path / "report"
    table = evaluate(
        EvaluateConfig(store=cirr_val.store.uri, out=str(out), fusions=("mean@zscore",), cases=2)
    ).table
    rows = {row.name: row for row in table.rows}
    names = {"mean_of_z_scores": "mean@zscore"}
    counted = 0
    for name, columns in expected["systems"].items():
        row = rows[names.get(name, name)]
        for column, luck in columns.items():
            assert row.hits_best[column] == luck["best"]
            assert row.hits_worst[column] == luck["worst"]
            assert row.hits[column] == luck["hash"]
            assert row.hits_expected[column] == pytest.approx(luck["expected"], abs=6e-4)
            counted += 1
    assert counted == 5 * 7
    assert "cirr val, protocol cirr, reference masked, 4,181 queries, gallery of 2,297" in (
        table.caption
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["systems"][0]["metrics"]["Rmean"] == pytest.approx(37.29, abs=0.01)


def test_the_official_order_is_kept_apart(cirr_val, reference_material):
    listed = json.loads((reference_material / "scores/cirr_val/gallery_ids.json").read_text())
    store = cirr_val.store
    assert [listed[n] for n in store.source_order] == list(store.gallery_ids)
    assert store.gallery_ids != tuple(listed)
    assert store.manifest.score_type == "float16"


def test_server_files_become_reciprocal_ranks(reference_material, tmp_path):
    named = DatasetConfig("cirr", "test1", annotations=str(reference_material / "data" / "cirr"))
    done = ingest(str(reference_material / "golden/rank_lists"), str(tmp_path / "s"), named)
    assert len(done.coverage) == 4
    assert len(done.notes) == 4
    for system in done.coverage:
        scores = whole(done.store, system.model)
        present = ~np.isnan(scores)
        assert (present.sum(axis=1) == 50).all()
        assert np.array_equal(
            np.sort(scores[present].reshape(-1, 50)[:, ::-1], axis=1)[:, ::-1],
            np.broadcast_to((1 / np.arange(1, 51)).astype(np.float32), (4148, 50)),
        )
        assert system.missing == pytest.approx(1 - 50 / 2315)
        assert system.empty_queries == 0
    with pytest.raises(DataError, match="no query has a target"):
        evaluate(EvaluateConfig(store=done.store.uri, out=str(tmp_path / "r")))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10_000), st.sampled_from([np.float32, np.float16]))
def test_any_order_of_rows_and_columns_gives_the_same_store(tmp_path, seed, dtype):
    dataset = labelled_dataset(23, 11)
    folder = score_folder(tmp_path / f"{seed}{dtype.__name__}", dataset, seed=seed, dtype=dtype)
    store = ingest(str(folder), str(folder / "store")).store
    assert store.gallery_ids == dataset.gallery.ids
    assert store.queries == dataset.queries
    for m, model in enumerate("ab"):
        scores = whole(store, model)
        assert scores.dtype == dtype
        assert np.array_equal(scores, score_matrix(dataset, m).astype(dtype))


def test_a_second_run_computes_nothing_and_new_models_are_added(tmp_path):
    dataset = labelled_dataset(23, 11)
    folder = score_folder(tmp_path / "f", dataset, seed=1)
    out = str(tmp_path / "s")
    first = ingest(str(folder), out).store.finished()
    assert ingest(str(folder), out).store.finished() == first
    np.save(folder / "c.npy", np.load(folder / "a.npy"))
    store = ingest(str(folder), out).store
    assert store.models == ("a", "b", "c")
    assert np.array_equal(whole(store, "a"), whole(store, "c"))
    np.save(folder / "c.npy", np.load(folder / "b.npy"))
    with pytest.raises(DataError, match="holds model 'c' with other scores"):
        ingest(str(folder), out)


@pytest.mark.parametrize("name", ["query_ids", "gallery_ids"])
def test_the_same_file_under_other_ids_is_another_system(tmp_path, name):
    """A first run with ids in the wrong order must not stay when they are corrected."""
    folder = score_folder(tmp_path / "f", labelled_dataset(23, 11), models=("a",))
    right = (folder / f"{name}.json").read_text()
    change(folder, name, lambda ids: ids[::-1])
    ingest(str(folder), str(tmp_path / "s"))
    (folder / f"{name}.json").write_text(right)
    with pytest.raises(DataError, match="holds model 'a' with other scores"):
        ingest(str(folder), str(tmp_path / "s"))


def test_a_damaged_tile_is_written_again(tmp_path):
    dataset = labelled_dataset(23, 11)
    folder = score_folder(tmp_path / "f", dataset, models=("a",))
    ingest(str(folder), str(tmp_path / "s"))
    tile = next((tmp_path / "s" / "scores").rglob("*.arrow"))
    data = bytearray(tile.read_bytes())
    data[len(data) // 2] ^= 1
    tile.write_bytes(data)
    store = ingest(str(folder), str(tmp_path / "s")).store
    assert all(problem == "" for _, problem in store.verify())
    assert np.array_equal(whole(store, "a"), score_matrix(dataset, 0))


@pytest.mark.parametrize(
    "other",
    [{"protocol": "folder"}, {"split": "test"}, {"name": "another"}],
)
def test_a_store_keeps_its_protocol_and_data_set(tmp_path, other):
    dataset = labelled_dataset(23, 11)
    ingest(str(score_folder(tmp_path / "f", dataset)), str(tmp_path / "s"))
    dataset = replace(dataset, name=other.get("name", dataset.name))
    spec = {key: value for key, value in other.items() if key != "name"}
    folder = score_folder(tmp_path / "g", dataset, models=("c",), **spec)
    with pytest.raises(DataError, match="one store has one protocol"):
        ingest(str(folder), str(tmp_path / "s"))


def test_a_folder_of_scores_may_call_its_data_set_folder(tmp_path):
    """The split of an own folder is its path, that of a score folder is said; both may repeat."""
    dataset = replace(labelled_dataset(23, 11), name="folder")
    folder = score_folder(tmp_path / "f", dataset, protocol="folder")
    first = ingest(str(folder), str(tmp_path / "s")).store.finished()
    assert ingest(str(folder), str(tmp_path / "s")).store.finished() == first


def test_weights_are_not_tuned_on_the_same_queries_over_another_gallery(tmp_path):
    whole_split = keep(labelled_dataset(40, 10, policy="keep"))
    named = {id for q in whole_split.queries for id in (q.reference, *q.targets)}
    fewer = Gallery.from_source({id: "" for id in whole_split.gallery.ids if id in named})
    uris = []
    for protocol, gallery in (
        ("fashioniq", whole_split.gallery),
        ("fashioniq-val-split", fewer),
    ):
        dataset = replace(whole_split, gallery=gallery)
        folder = score_folder(tmp_path / protocol, dataset, protocol=protocol, reference="keep")
        uris.append(ingest(str(folder), str(tmp_path / f"store-{protocol}")).store.uri)
    with pytest.raises(DataError, match="would be a leak"):
        evaluate(EvaluateConfig(store=uris[0], tune_on=uris[1], out=str(tmp_path / "r")))


def test_missing_scores_stay_missing_and_are_counted(tmp_path):
    dataset = labelled_dataset(20, 10)
    folder = score_folder(tmp_path / "f", dataset, models=("a",))
    scores = np.load(folder / "a.npy")
    scores[2] = np.nan
    scores[3, :5] = np.nan
    np.save(folder / "a.npy", scores)
    done = ingest(str(folder), str(tmp_path / "s"))
    assert np.array_equal(whole(done.store, "a"), scores, equal_nan=True)
    assert done.coverage[0].empty_queries == 1
    assert done.coverage[0].missing == pytest.approx(25 / 200)


def test_mixed_types_are_kept_in_the_wider_one(tmp_path):
    dataset = labelled_dataset(20, 10)
    folder = score_folder(tmp_path / "f", dataset)
    np.save(folder / "b.npy", score_matrix(dataset, 1).astype(np.float16))
    store = ingest(str(folder), str(tmp_path / "s")).store
    assert store.manifest.score_type == "float32"
    narrow = score_folder(tmp_path / "n", dataset, models=("c",), dtype=np.float16)
    before = ingest(str(narrow), str(tmp_path / "narrow")).store.manifest
    with pytest.raises(DataError, match="keeps float16, which would make ties"):
        ingest(str(folder), str(tmp_path / "narrow"))
    assert TileStore(str(tmp_path / "narrow")).manifest == before


def strangers(ids):
    return [f"x{n}" for n in range(7)] + ids[7:]


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (
            "query_ids",
            strangers,
            r"do not hold 'x0', 'x1', 'x2', 'x3', 'x4' and 2 more",
        ),
        ("gallery_ids", strangers, r"gallery_ids.json does not hold '.*', '.*' and 2 more"),
        ("query_ids", lambda ids: ids[1:], "is 11 x 23, but query_ids.json names 10 queries"),
        ("query_ids", lambda ids: [*ids[1:], ids[1]], "stands twice"),
        ("query_ids", lambda ids: [[id] for id in ids], "must be a list of ids"),
        ("queries", lambda qs: qs[1:], "a.npy: the queries do not hold 'val-q"),
        (
            "queries",
            lambda qs: [*qs, {**qs[0], "id": "new"}],
            "no scores of the queries 'new'",
        ),
        ("queries", lambda qs: [{"id": "val-q0"}], "entry 0: 'reference' is missing"),
        (
            "queries",
            lambda qs: [{**qs[0], "targets": ["elsewhere"]}],
            "does not hold 'elsewhere'",
        ),
        ("queries", lambda qs: [*qs, qs[0]], "stands twice"),
        ("queries", lambda qs: {}, "must hold a list"),
        (
            "queries",
            lambda qs: [{**qs[0], "target": "x"}],
            "no key 'target'; did you mean",
        ),
        (
            "queries",
            lambda qs: [{**qs[0], "targets": [qs[0]["reference"]]}],
            "a target is the reference",
        ),
        (
            "queries",
            lambda qs: [{**qs[0], "group": qs[0]["targets"]}],
            "does not hold the reference",
        ),
        ("queries", lambda qs: [{**qs[0], "excluded": qs[0]["targets"]}], "a target is excluded"),
        ("queries", lambda qs: [{**qs[0], "targets": False}], "must be a list of strings"),
        ("queries", lambda qs: [{**qs[0], "category": 3}], "'category' must be text"),
        ("queries", lambda qs: [{**qs[0], "fold_group": "\ud800"}], "not Unicode text"),
        ("gallery_ids", lambda ids: [*ids[1:], "\ud800"], "not Unicode text"),
        ("gallery_ids", lambda ids: [*ids[1:], True], "must be a list of ids"),
    ],
)
def test_ids_that_do_not_align_are_named(tmp_path, name, edit, message):
    folder = score_folder(tmp_path / "f", labelled_dataset(23, 11), models=("a",))
    change(folder, name, edit)
    with pytest.raises(DataError, match=message):
        ingest(str(folder), str(tmp_path / "s"))
    assert not (tmp_path / "s" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: {**s, "protocl": "cirr"}, "unknown key 'protocl'; did you mean 'protocol'"),
        (lambda s: {**s, "protocol": "circo"}, "no protocol 'circo'"),
        (lambda s: {**s, "reference": "drop"}, "'reference'"),
        (lambda s: {**s, "reference": "keep"}, "protocol 'cirr' has the reference 'mask'"),
        (lambda s: {"dataset": "x"}, "is missing"),
    ],
)
def test_scores_json_is_checked(tmp_path, edit, message):
    folder = score_folder(tmp_path / "f", labelled_dataset(23, 11))
    change(folder, "scores", edit)
    with pytest.raises(ConfigError, match=message):
        ingest(str(folder), str(tmp_path / "s"))


def test_infinite_scores_are_named(tmp_path):
    dataset = labelled_dataset(23, 11)
    folder = score_folder(tmp_path / "f", dataset, models=("a",))
    scores = np.load(folder / "a.npy")
    scores[4, 3] = -np.inf
    np.save(folder / "a.npy", scores)
    with pytest.raises(DataError, match=f"query '{dataset.queries[4].id}' and candidate '"):
        ingest(str(folder), str(tmp_path / "s"))


def test_targets_that_a_system_did_not_score_are_said(tmp_path):
    dataset = labelled_dataset(20, 10)
    folder = score_folder(tmp_path / "f", dataset, models=("a",))
    scores = np.load(folder / "a.npy")
    for q in (1, 5):
        scores[q, dataset.gallery.position(dataset.queries[q].targets[0])] = np.nan
    np.save(folder / "a.npy", scores)
    uri = ingest(str(folder), str(tmp_path / "s")).store.uri
    report = evaluate(EvaluateConfig(store=uri, out=str(tmp_path / "r"), fusions=())).report
    assert "a did not score the target of 2 queries; they count as misses." in report.read_text()


def test_folders_without_scores_are_named(tmp_path):
    with pytest.raises(DataError, match="no score folder"):
        ingest(str(tmp_path / "nowhere"), str(tmp_path / "s"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no scores\.json"):
        ingest(str(tmp_path / "empty"), str(tmp_path / "s"))
    folder = score_folder(tmp_path / "f", labelled_dataset(23, 11), models=())
    with pytest.raises(DataError, match="holds no scores: no"):
        ingest(str(folder), str(tmp_path / "s"))


def test_scores_join_a_store_of_the_same_data_set(tmp_path):
    """A computed model and one made elsewhere are fused like any two."""
    dataset = labelled_dataset(23, 11)
    store = score_store(tmp_path / "s", dataset, models=("computed",))
    folder = score_folder(tmp_path / "f", dataset, models=("made",), seed=3)
    joined = ingest(str(folder), store.uri).store
    assert joined.models == ("computed", "made")
    assert joined.missing() == []
    other = score_folder(tmp_path / "g", labelled_dataset(24, 11), models=("made",))
    with pytest.raises(DataError, match="was made for another gallery"):
        ingest(str(other), store.uri)


def test_fashioniq_policy_keeps_the_reference_and_averages_categories(tmp_path):
    """Ingested categories, evaluated together: recalls are means of the categories' recalls."""
    uris: list[str] = []
    for n, category in enumerate(("dress", "shirt")):
        dataset = labelled_dataset(60, 20 + 30 * n, split=category, policy="keep")
        queries = tuple(replace(query, group=()) for query in dataset.queries)
        dataset = replace(dataset, name="fashioniq", queries=queries)
        folder = score_folder(
            tmp_path / category,
            dataset,
            protocol="fashioniq",
            reference="keep",
            category=category,
        )
        uris.append(ingest(str(folder), str(tmp_path / f"store-{category}")).store.uri)
    out = tmp_path / "report"
    table = evaluate(EvaluateConfig(store=tuple(uris), out=str(out), fusions=("rrf",))).table
    assert "Mean over 2 categories without weights (dress 20, shirt 50 queries)" in table.caption
    assert "reference kept" in table.caption
    for row in table.rows:
        assert list(row.hits) == [
            *("dress R@10", "dress R@50", "shirt R@10", "shirt R@50", "R@10", "R@50")
        ]
        for k in (10, 50):
            counts = [row.hits[f"{name} R@{k}"] for name in ("dress", "shirt")]
            assert row.hits[f"R@{k}"] == sum(counts)
            mean = 100 * (counts[0] / 20 + counts[1] / 50) / 2
            assert row.metrics[f"R@{k}"] == pytest.approx(mean, abs=1e-3)
            low, high = row.ci95[f"R@{k}"]
            assert low <= row.metrics[f"R@{k}"] <= high
        mean = (row.metrics["R@10"] + row.metrics["R@50"]) / 2
        assert row.metrics["Rmean"] == pytest.approx(mean, abs=1e-3)
    text = (out / "table.md").read_text()
    assert text.count("| fashioniq |") == len(table.rows)
    alone = evaluate(EvaluateConfig(store=uris[0], out=str(tmp_path / "one"), fusions=())).table
    assert "One category alone (dress 20 queries), no mean" in alone.caption
    with pytest.raises(DataError, match="name a store once"):
        evaluate(EvaluateConfig(store=(uris[0], uris[0]), out=str(tmp_path / "x")))


def test_fashioniq_has_one_gallery_a_category(tmp_path):
    dataset = labelled_dataset(20, 10, policy="keep")
    spec = {"protocol": "fashioniq", "reference": "keep"}
    folder = score_folder(tmp_path / "f", dataset, **spec)
    change(
        folder,
        "queries",
        lambda rows: [
            {**row, "category": "dress" if n % 2 else "shirt"} for n, row in enumerate(rows)
        ],
    )
    with pytest.raises(DataError, match="one gallery a category"):
        ingest(str(folder), str(tmp_path / "s"))


def keep(dataset: Dataset, **changes: object) -> Dataset:
    queries = tuple(replace(query, group=()) for query in dataset.queries)
    return replace(dataset, queries=queries, **changes)


def test_stores_that_do_not_belong_together_are_refused(tmp_path):
    def store(name, dataset, **spec):
        folder = score_folder(tmp_path / name, dataset, models=("a",), **spec)
        return ingest(str(folder), str(tmp_path / f"store-{name}")).store.uri

    def together(*uris):
        evaluate(EvaluateConfig(store=uris, out=str(tmp_path / "r"), fusions=()))

    fiq = {"protocol": "fashioniq", "reference": "keep"}
    dress = keep(labelled_dataset(20, 10, split="a", policy="keep"))
    shirt = keep(labelled_dataset(20, 10, split="b", policy="keep"))
    named = store("dress", dress, **fiq, split="val", category="dress")
    other_split = store("test", shirt, **fiq, split="test", category="shirt")
    with pytest.raises(DataError, match="has split 'val'"):
        together(named, other_split)
    again = store("again", shirt, **fiq, split="val", category="dress")
    with pytest.raises(DataError, match="category 'dress' has several galleries"):
        together(named, again)
    unnamed = store("unnamed", shirt, **fiq, split="val")
    with pytest.raises(DataError, match="some queries have no category"):
        together(named, unnamed)
    one = store("one", labelled_dataset(20, 10, split="a"), split="val")
    two = store("two", labelled_dataset(20, 10, split="b"), split="val")
    with pytest.raises(DataError, match="search other galleries"):
        together(one, two)
    free = keep(labelled_dataset(20, 10, split="c", policy="keep"))
    kept = store("kept", free, protocol="folder", reference="keep", split="val")
    masked = store(
        "masked", keep(labelled_dataset(20, 10, split="d")), protocol="folder", split="val"
    )
    with pytest.raises(DataError, match="reference policy"):
        together(kept, masked)


def test_a_missing_group_takes_the_subset_recall_away_and_says_so(tmp_path):
    folder = score_folder(tmp_path / "f", labelled_dataset(20, 10), models=("a",))
    change(folder, "queries", lambda rows: [{**rows[0], "group": None}, *rows[1:]])
    uri = ingest(str(folder), str(tmp_path / "s")).store.uri
    table = evaluate(EvaluateConfig(store=uri, out=str(tmp_path / "r"), fusions=())).table
    assert "Rmean" not in table.metrics
    assert "Subset recalls are left out: 1 queries have no group" in table.caption
