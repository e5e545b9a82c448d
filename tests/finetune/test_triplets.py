import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dafm_ray.errors import DataError
from dafm_ray.finetune.triplets import Triplets, epoch_batches, load_batches, shifted
from dafm_ray.models.registry import load_model
from tests.samples import image_folder, open_folder


@pytest.fixture
def triplets(tmp_path):
    dataset = open_folder(str(image_folder(tmp_path, images=20, queries=12)))
    return Triplets(dataset, load_model("clip4cir:sum@random-tiny"))


def test_a_batch_is_reference_target_and_text(triplets):
    [batch] = load_batches(triplets, [[2, 0, 5]], 0)
    query = triplets.queries[0]
    image = triplets.dataset.source.open(query.targets[0])
    assert torch.equal(batch.targets_B3HW[1], triplets.model.preprocess(image))
    assert batch.captions_B[1] == triplets.model.caption(query.captions)
    assert batch.target_ids_B[1] == triplets.dataset.gallery.position(query.targets[0])


def test_every_image_may_ask_for_itself(triplets):
    more = Triplets(triplets.dataset, triplets.model, identity=True)
    assert len(more) == len(triplets) + 20
    reference, target, caption, position = more[len(triplets) + 7]
    assert torch.equal(reference, target)
    assert caption == triplets.model.caption([""])
    assert position == 7
    assert more[3][2:] == triplets[3][2:]


def test_a_full_cache_changes_nothing(triplets):
    small = Triplets(triplets.dataset, triplets.model, cache_bytes=5000)
    for _ in range(2):
        assert all(torch.equal(small[n][0], triplets[n][0]) for n in range(12))
    assert len(small._cache) == 1


@given(st.integers(0, 5), st.sampled_from([1, 2, 4]))
def test_workers_share_the_batches_of_one_worker(seed, workers):
    whole = epoch_batches(range(50), 8, seed, 3, 0, 1)
    shares = [epoch_batches(range(50), 8, seed, 3, rank, workers) for rank in range(workers)]
    assert len(whole) == 6
    assert [[n for part in parts for n in part] for parts in zip(*shares, strict=True)] == whole
    assert len({n for batch in whole for n in batch}) == 48


def test_epochs_differ():
    assert epoch_batches(range(50), 8, 0, 0, 0, 1) != epoch_batches(range(50), 8, 0, 1, 0, 1)


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
        Triplets(open_folder(str(root)), load_model("clip4cir:sum@random-tiny"))
