from dataclasses import replace

import pytest

from dafm_ray.config import DatasetConfig, ModelConfig, PrecomputeConfig
from dafm_ray.tiles.estimate import ModelPlan, Plan, amount, duration

POOL = ModelConfig("a", "clip4cir:sum@random", actors=2, num_gpus=0.5, batch=64, precision="bf16")


def planned(images, queries, **changes):
    config = PrecomputeConfig(DatasetConfig("cirr"), (POOL,), "s3://bucket/store", **changes)
    model = ModelPlan(POOL, 100.0, 1024, 1024, 1e-9, 3e-9)
    return Plan(config, images, queries, queries, 16, 1, 0.004, (model,), None)


def test_bytes_and_seconds_are_multiplied_out():
    small = planned(2_000, 4_000)
    assert small.feature_bytes == 6_000 * 1024
    assert small.tile_bytes == 2_000 * 4_000 * 4
    assert small.stages["decoding"] == pytest.approx(6_000 * 0.004 / 4)
    assert small.encode_s == small.stages["encoding with a"] == pytest.approx(6_000 / 200)
    assert small.score_s == pytest.approx(8e6 * 1e-9 / 16)
    assert small.limit == "encoding with a (30.0 s)"
    assert not small.advice
    assert replace(small, decode_s=0.4).limit.startswith("decoding")


def test_all_scores_of_a_large_gallery_are_advised_against():
    large = planned(1_000_000, 50_000)
    [advice] = large.advice
    assert "200 GB" in advice
    assert "Set shortlist: 200, which keeps at most 121 MB" in advice
    short = planned(1_000_000, 50_000, shortlist=200)
    assert not short.advice
    assert short.store_bytes < large.store_bytes / 100
    assert short.score_s == pytest.approx(5e10 * 3e-9 / 16)


def test_a_full_disk_is_seen_before_the_job_starts():
    tight = replace(planned(2_000, 4_000), free_bytes=1_000_000)
    assert tight.advice[0].startswith("It does not fit: 38.1 MB are needed and 1 MB are free")


def test_shortlists_are_advised_only_where_they_help():
    def advised(plan, free):
        return any("Set shortlist" in text for text in replace(plan, free_bytes=free).advice)

    wide = planned(20_000, 4_000)
    assert wide.tile_bytes == 320_000_000
    assert wide.shortlist_bytes(200) == 4_000 * 201 * 12
    assert advised(wide, 100_000_000)
    assert not advised(wide, 10_000_000), "shortlists do not fit either"
    assert not advised(wide, 10**12)
    narrow = planned(1_000, 4_000)
    assert narrow.tile_bytes < 2 * narrow.shortlist_bytes(200)
    assert not advised(narrow, narrow.store_bytes - 1), "shortlists are hardly smaller"


def test_what_a_store_holds_is_not_counted_again():
    whole = planned(2_000, 4_000)
    there = replace(whole.models[0], features_left=0.0, scores_left=0.25)
    other = replace(whole.models[0], features_left=0.5)
    found = replace(whole, models=(there, other), blocks=384, blocks_there=123)
    assert found.feature_bytes == 6_000 * 1024 / 2
    assert found.tile_bytes == 2_000 * 4_000 * 4 * 1.25
    assert found.score_s == pytest.approx(8e6 * 1e-9 / 16 * 1.25)
    assert found.stages["decoding"] == pytest.approx(6_000 * 0.004 / 4 / 2)
    text = "\n".join(found.lines())
    assert "more at s3://bucket/store; 123 of 384 blocks are there" in text
    assert "most of it waits for" in text
    short = planned(2_000, 4_000, shortlist=50)
    model = replace(short.models[0], scores_left=0.5)
    assert replace(short, models=(model,)).score_bytes == short.score_bytes / 2
    done = replace(whole, models=(replace(there, scores_left=0.0, rate=0.0),))
    assert (done.store_bytes, done.encode_s, done.score_s, done.advice) == (0, 0, 0, [])
    assert "nothing is left to do" in "\n".join(done.lines())


def test_unpacked_images_are_a_part_of_the_store():
    plain = planned(2_000, 4_000)
    found = replace(plain, unpacked_bytes=1_250_000)
    assert found.store_bytes == plain.store_bytes + 1_250_000
    assert "images    unpacked, 1.25 MB, once" in "\n".join(found.lines())
    assert "unpacked" not in "\n".join(plain.lines())


def test_credentials_of_the_store_are_not_shown():
    made = planned(2_000, 4_000)
    config = replace(made.config, store="s3://key:secret@bucket/store")
    lines = replace(made, config=config, free_bytes=1).lines()
    assert sum("s3://bucket/store" in line for line in lines) == 2
    assert "secret" not in "\n".join(lines)


def test_scores_on_gpus_share_the_gpus():
    assert planned(2_000, 4_000, scoring_gpus=0.5).score_s == pytest.approx(8e6 * 1e-9 / 2)


def test_units():
    assert [amount(n) for n in (512, 1_500, 2.5e9, 4e15)] == [
        "512 B",
        "1.5 kB",
        "2.5 GB",
        "4,000 TB",
    ]
    assert [duration(s) for s in (3, 130, 8000, 200_000)] == [
        "3.0 s",
        "2.2 min",
        "2.2 hours",
        "2.3 days",
    ]
