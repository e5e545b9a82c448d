from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dafm_ray.errors import DataError
from dafm_ray.finetune.triplets import (
    CUT,
    LEFT_OUT,
    Triplets,
    epoch_batches,
    learnable,
    load_batches,
    shifted,
)
from dafm_ray.models.registry import load_model
from tests.samples import image_folder, open_folder


@pytest.fixture
def triplets(tmp_path):
    dataset = open_folder(str(image_folder(tmp_path, images=20, queries=12)))
    return Triplets([dataset], load_model("clip4cir:sum@random-tiny"))


def test_a_batch_is_reference_target_and_text(triplets):
    [batch] = load_batches(triplets, [[2, 0, 5]], 0)
    query = triplets.triplets[0]
    image = triplets.datasets[0].source.open(query.target)
    assert torch.equal(batch.targets_B3HW[1], triplets.model.preprocess(image))
    assert batch.captions_B[1] == triplets.model.caption(query.captions)
    assert batch.target_ids_B[1] == triplets.datasets[0].gallery.position(query.target)


def test_every_image_may_ask_for_itself(triplets):
    more = Triplets(triplets.datasets, triplets.model, identity=True)
    assert len(more) == len(triplets) + 20
    reference, target, caption, position, _ = more[len(triplets) + 7]
    assert torch.equal(reference, target)
    assert caption == triplets.model.caption([""])
    assert position == 7
    assert more[3][2:] == triplets[3][2:]


def test_a_full_cache_changes_nothing(triplets):
    small = Triplets(triplets.datasets, triplets.model, cache_bytes=5000)
    for _ in range(2):
        assert all(torch.equal(small[n][0], triplets[n][0]) for n in range(12))
    assert len(small._cache) == 1


@given(st.integers(0, 5), st.sampled_from([1, 2, 4]))
def test_workers_share_the_batches_of_one_worker(seed, workers):
    whole = epoch_batches(50, 8, seed, 3, 0, 1)
    shares = [epoch_batches(50, 8, seed, 3, rank, workers) for rank in range(workers)]
    assert len(whole) == 6
    assert [[n for part in parts for n in part] for parts in zip(*shares, strict=True)] == whole
    assert len({n for batch in whole for n in batch}) == 48


def test_epochs_differ():
    assert epoch_batches(50, 8, 0, 0, 0, 1) != epoch_batches(50, 8, 0, 1, 0, 1)


def test_shifts_move_by_at_most_so_many_pixels():
    torch.manual_seed(0)
    image = torch.zeros(64, 3, 16, 16)
    image[:, :, 8, 8] = 1
    rows, columns = np.nonzero(shifted(image, 3)[:, 0].numpy())[1:]
    assert set(rows) == set(range(5, 12))
    assert set(columns) == set(range(5, 12))
    assert shifted(image, 0) is image


def test_without_targets_there_is_nothing_to_learn(tmp_path):
    root = image_folder(tmp_path)
    (root / "queries.jsonl").write_text('{"id": "q", "reference": "000.png", "text": "x"}')
    with pytest.raises(DataError, match="no query with a target"):
        Triplets([open_folder(str(root))], load_model("clip4cir:sum@random-tiny"))


def test_an_image_that_cannot_be_read_is_listed_and_another_triplet_stands_in(tmp_path):
    root = image_folder(tmp_path, images=20, queries=12)
    (root / "004.png").unlink()
    (root / "004.png").write_bytes(b"no picture")
    triplets = Triplets([open_folder(str(root))], load_model("clip4cir:sum@random-tiny"))
    needing = [n for n, t in enumerate(triplets.triplets) if "004.png" in (t.reference, t.target)]
    assert needing
    for n in range(12):
        *item, unfit = triplets[n]
        stand_in = n
        while stand_in in needing:
            stand_in = (stand_in + 1) % 12
        assert item[3] == triplets[stand_in][3]
        assert {one.item for one in unfit} == ({"004.png"} if n in needing else set())


def test_without_a_readable_image_training_ends(tmp_path):
    root = image_folder(tmp_path)
    for file in root.glob("*.png"):
        file.write_bytes(b"no picture")
    triplets = Triplets([open_folder(str(root))], load_model("clip4cir:sum@random-tiny"))
    with pytest.raises(DataError, match="no triplet has images that can be read"):
        triplets[0]


def test_texts_that_are_empty_or_too_long_are_listed(triplets):
    [dataset] = triplets.datasets
    first, second, *rest = dataset.queries
    queries = (replace(first, captions=(" ",)), replace(second, captions=("red " * 90,)), *rest)
    found, unfit = learnable([replace(dataset, queries=queries)], triplets.model)
    assert len(found) == 11
    assert {(one.item, one.what) for one in unfit} == {(first.id, LEFT_OUT), (second.id, CUT)}


def test_equal_targets_have_one_id(triplets):
    """Pictures that both answer a query are no negatives of each other."""
    [dataset] = triplets.datasets
    one, other = dataset.queries[0].targets[0], dataset.queries[3].targets[0]
    queries = [
        replace(query, targets=tuple(dict.fromkeys((*query.targets, one, other))))
        if {one, other} & set(query.targets)
        else query
        for query in dataset.queries
    ]
    found = Triplets([replace(dataset, queries=tuple(queries))], triplets.model).triplets
    assert len({t.target_id for t in found if {t.target} & {one, other}}) == 1


def test_ids_of_several_data_sets_differ(triplets):
    both = Triplets([*triplets.datasets, *triplets.datasets], triplets.model)
    assert len(both) == 24
    assert both[12][3] == both[0][3] + 20
    assert torch.equal(both[12][0], both[0][0])
