import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dafm_ray.cli import main
from dafm_ray.config import DatasetConfig, load_config
from dafm_ray.datasets.base import Query
from dafm_ray.errors import ConfigError
from dafm_ray.finetune.config import MineConfig, MiningConfig
from dafm_ray.finetune.mining import mine_negatives
from dafm_ray.finetune.negatives import NEVER, Known, Mined, draw, mine
from dafm_ray.search.index import Block, FlatIndex, pooled
from dafm_ray.search.sharded import ShardedIndex
from tests.samples import image_folder

CANDIDATES, QUERIES, WIDTH = 40, 11, 6
IDS = [f"c{n}" for n in range(CANDIDATES)]


def unit(values):
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def problem(seed, vectors=()):
    """A gallery with near-duplicates, and queries with up to two targets."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((CANDIDATES, *vectors, WIDTH))
    features[1::4] = features[::4] + 0.1 * rng.standard_normal(features[1::4].shape)
    queries = []
    for q in range(QUERIES):
        reference, *others = (IDS[n] for n in rng.permutation(CANDIDATES)[:7])
        excluded = (reference,) if q % 2 else ()
        targets = tuple(others[: 1 + q % 2])
        queries.append(
            Query(f"q{q}", reference, ("",), targets, excluded, (reference, *others[:5]))
        )
    return [Block(IDS, unit(features))], queries, unit(rng.standard_normal((QUERIES, WIDTH)))


def first_targets(index, features_QD, known):
    return index.scores(features_QD, known.targets_QT[:, :1])[:, 0]


def brute_force(features, queries, features_QD, target_scores_Q, mining):
    several = features if features.ndim == 3 else features[:, None]
    images = pooled(several)
    rows = []
    for query, feature_D, target_score in zip(queries, features_QD, target_scores_Q, strict=True):
        scores_N = (several @ feature_D).max(1)
        positives = [IDS.index(id) for id in (*query.targets, query.reference)]
        never = {*positives, *(IDS.index(id) for id in query.excluded)}
        allowed = [n for n in np.argsort(-scores_N, kind="stable") if n not in never]
        row = []
        for place, n in enumerate(allowed, 1):
            keep = mining.ranks[0] <= place <= mining.ranks[1]
            keep &= mining.near_duplicate == 1 or all(
                images[n] @ images[p] <= mining.near_duplicate for p in positives
            )
            keep &= mining.same_group == "keep" or IDS[n] not in query.group
            keep &= mining.margin is None or scores_N[n] <= target_score - mining.margin
            keep &= mining.cap is None or scores_N[n] <= mining.cap
            if keep:
                row.append((n, place))
        rows.append(row)
    return rows


@settings(max_examples=40)
@given(
    seed=st.integers(0, 99),
    vectors=st.sampled_from([(), (3,)]),
    ranks=st.sampled_from([(1, 10), (4, 8), (1, 36), (20, 30)]),
    near_duplicate=st.sampled_from([1.0, 0.95, 0.5]),
    same_group=st.sampled_from(["keep", "drop"]),
    margin=st.sampled_from([None, 0.05, -0.1]),
    cap=st.sampled_from([None, 0.5]),
)
def test_every_rule_against_brute_force(seed, vectors, **rules):
    blocks, queries, features_QD = problem(seed, vectors)
    mining = MiningConfig(**rules)
    index = FlatIndex(blocks)
    known = Known.of(queries, IDS)
    target_scores_Q = first_targets(index, features_QD, known)
    mined = mine(features_QD, index, known, target_scores_Q, mining)
    expected = brute_force(blocks[0].features, queries, features_QD, target_scores_Q, mining)
    width = mining.ranks[1] - mining.ranks[0] + 1
    assert mined.columns_QW.shape == mined.scores_QW.shape == (QUERIES, width)
    for q, row in enumerate(expected):
        kept = mined.columns_QW[q] >= 0
        assert (~kept[len(row) :]).all()
        found = zip(mined.columns_QW[q][kept], mined.ranks_QW[q][kept], strict=True)
        assert list(found) == row
    assert mined.without.tolist() == [q for q, row in enumerate(expected) if not row]
    kept = sum(len(row) for row in expected)
    assert sum(mined.removed.values()) - mined.removed[NEVER] == QUERIES * width - kept


def test_what_is_removed_is_counted_by_its_rule():
    blocks, queries, features_QD = problem(0)
    index, known = FlatIndex(blocks), Known.of(queries, IDS)
    target_scores_Q = first_targets(index, features_QD, known)

    def removed(**rules):
        rules = MiningConfig(ranks=(1, 36), **rules)
        counts = mine(features_QD, index, known, target_scores_Q, rules).removed
        return {rule: count for rule, count in counts.items() if count and rule != NEVER}

    assert removed() == {}
    for rule, value in (
        ("near_duplicate", 0.9),
        ("same_group", "drop"),
        ("margin", 0.1),
        ("cap", 0.3),
    ):
        assert set(removed(**{rule: value})) == {rule}
    groups = [len(set(query.group) - {*query.targets, query.reference}) for query in queries]
    assert sum(groups) - removed(same_group="drop")["same_group"] < QUERIES
    whole = mine(features_QD, index, known, target_scores_Q, MiningConfig(ranks=(1, 36)))
    never = [len({*query.targets, query.reference}) for query in queries]
    assert sum(never) - 2 * QUERIES <= whole.removed[NEVER] <= sum(never)


@pytest.mark.timeout(120)
def test_shards_mine_alike(local_ray):
    blocks, queries, features_QD = problem(1, (3,))
    index, known = FlatIndex(blocks), Known.of(queries, IDS)
    mining = MiningConfig(ranks=(2, 30), near_duplicate=0.8, same_group="drop", margin=0.0)
    target_scores_Q = first_targets(index, features_QD, known)
    with ShardedIndex(blocks, CANDIDATES, 3) as sharded:
        np.testing.assert_array_equal(first_targets(sharded, features_QD, known), target_scores_Q)
        one = mine(features_QD, sharded, known, target_scores_Q, mining)
    other = mine(features_QD, index, known, target_scores_Q, mining)
    assert one.removed == other.removed
    np.testing.assert_array_equal(one.columns_QW, other.columns_QW)
    np.testing.assert_array_equal(one.scores_QW, other.scores_QW)


def test_a_window_behind_the_gallery_is_refused():
    blocks, queries, features_QD = problem(0)
    index, known = FlatIndex(blocks), Known.of(queries, IDS)
    mining = MiningConfig(ranks=(1, 38))
    with pytest.raises(ConfigError, match=r"ends at 38, and a query has 37 .* gallery of 40"):
        mine(features_QD, index, known, np.zeros(QUERIES), mining)


def test_images_that_are_not_in_the_index_are_no_columns():
    query = Query("q", "gone", ("",), ("c1", "lost"), ("gone",), ("c1", "c2", "gone"))
    known = Known.of([query, replace(query, id="r", reference="c0", targets=("c3",))], IDS)
    assert known.targets_QT.tolist() == [[1], [3]]
    assert known.references_Q.tolist() == [-1, 0]
    assert known.groups_QG.tolist() == [[1, 2], [1, 2]]


def drawable():
    columns_QW = np.full((30, 8), -1)
    for q in range(30):
        columns_QW[q, : q % 9] = 10 * q + np.arange(q % 9)
    nothing = np.zeros(columns_QW.shape)
    return Mined(columns_QW, nothing, nothing, {})


@given(st.integers(0, 5), st.integers(0, 3), st.permutations(range(30)), st.integers(1, 30))
def test_a_draw_depends_on_seed_epoch_and_query_alone(seed, epoch, order, split):
    mined, mining = drawable(), MiningConfig(ranks=(1, 8), count=3)
    whole = draw(mined.columns_QW, mining, seed, epoch, np.arange(30))
    parts = [np.array(order[:split]), np.array(order[split:], np.int64)]
    drawn = np.concatenate([draw(mined.columns_QW, mining, seed, epoch, part) for part in parts])
    np.testing.assert_array_equal(drawn, whole[np.array(order)])
    for q, row in enumerate(whole):
        found = row[row >= 0]
        assert len(set(found.tolist())) == min(3, q % 9)
        assert set(found.tolist()) <= set(mined.columns_QW[q].tolist())


def test_epochs_and_seeds_draw_anew_and_all_of_the_window():
    mined, mining = drawable(), MiningConfig(ranks=(1, 8), count=3)
    draws = {
        draw(mined.columns_QW, mining, s, e, np.arange(30)).tobytes()
        for s in (0, 1)
        for e in range(3)
    }
    assert len(draws) == 6
    eight = np.concatenate(
        [draw(mined.columns_QW, mining, 0, e, np.array([8]))[0] for e in range(60)]
    )
    assert set(eight.tolist()) == set(range(80, 88))
    first = draw(mined.columns_QW, replace(mining, sampling="first"), 0, 5, np.array([2, 8]))
    assert first.tolist() == [[20, 21, -1], [80, 81, 82]]


@pytest.mark.parametrize("near", ["query", "positive"])
def test_the_job_writes_what_it_mined(tmp_path, capsys, near):
    root = image_folder(tmp_path / "images", 20, 9)
    (root / "019.png").write_bytes(b"")
    file = tmp_path / "job.yaml"
    file.write_text(
        f"dataset: {{name: folder, root: {root}}}\nmodel: clip4cir:sum@random-tiny\n"
        f"index: {tmp_path / 'index'}\nout: {tmp_path / 'out'}\ndevice: cpu\n"
        f"negatives: {{near: {near}, ranks: [1, 10], margin: 0.0}}\n"
    )
    assert main(["negatives", "--config", str(file)]) == 4
    printed = capsys.readouterr().out
    counts = json.loads((tmp_path / "out" / "negatives.json").read_text())
    table = pq.read_table(tmp_path / "out" / "negatives.parquet").to_pandas()
    assert list(table) == ["query", "target", "negative", "rank", "score", "target_score"]
    assert len(table) == counts["negatives"] == 90 - counts["removed"]["margin"]
    assert f"{counts['negatives']} negatives of 9 queries" in printed
    assert (table["score"] <= table["target_score"]).all()
    assert (table["negative"] != table["target"]).all()
    assert set(counts["without"]) == {f"q{n}" for n in range(9)} - set(table["query"])
    if near == "positive":
        np.testing.assert_allclose(table["target_score"], 1, atol=1e-6)


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("local_ray")
def test_the_job_mines_with_shards(tmp_path):
    root = image_folder(tmp_path / "images", 20, 9)
    mining = MiningConfig(ranks=(1, 10), near_duplicate=0.99)
    config = MineConfig(
        dataset=DatasetConfig("folder", root=str(root)),
        model="sprc:base@random-tiny",
        index=str(tmp_path / "index"),
        out=str(tmp_path / "one"),
        negatives=mining,
        device="cpu",
    )
    mine_negatives(config)
    sharded = replace(config, out=str(tmp_path / "two"), negatives=replace(mining, shards=2))
    assert mine_negatives(sharded).counts["index"] == "built now"
    one, two = (pq.read_table(tmp_path / name / "negatives.parquet") for name in ("one", "two"))
    assert one.equals(two)


def test_the_configuration_that_ships_is_valid():
    assert load_config(MineConfig, "configs/negatives_icons.yaml").negatives.ranks == (1, 50)
