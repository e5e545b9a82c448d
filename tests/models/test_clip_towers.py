import json

import pytest
import torch

from dafm_ray.errors import DataError
from dafm_ray.models.clip_towers import (
    END,
    START,
    TINY,
    TowerSizes,
    build_towers,
    token_ids,
    tokenize,
    vocabulary_of,
)


@pytest.fixture(scope="module")
def tokenizer_rows(golden):
    return json.loads((golden / "captions" / "tokenizer.json").read_text())["rows"]


def test_token_ids_equal_openais(tokenizer_rows):
    assert len(tokenizer_rows) == 105
    assert [row["text"] for row in tokenizer_rows if token_ids(row["text"]) != row["ids"]] == []


def test_padding_and_truncation_equal_openais(tokenizer_rows):
    for row in tokenizer_rows:
        expected = row["tokenized_truncate"]
        padded = expected + [0] * (77 - len(expected))
        assert tokenize([row["text"]], 77)[0].tolist() == padded


def test_a_small_vocabulary_keeps_the_end_token_largest():
    vocabulary = vocabulary_of(["with a plus", "without the circle"])
    rows = tokenize(["with a circle", "zebra"], 8, vocabulary)
    assert vocabulary[-2:] == (START, END)
    assert rows.argmax(dim=1).tolist() == [4, 2]
    assert rows[1, 1] == 0


def test_sizes_are_read_off_the_weights():
    towers = build_towers(TINY)
    assert TowerSizes.from_weights(towers.state_dict(), text_heads=2) == TINY


def test_sizes_of_a_vision_transformer_are_read_off_the_weights():
    sizes = TowerSizes(32, 32, 2, 64, 8, 16, 100, 64, 1, 2)
    with torch.device("meta"):
        towers = build_towers(sizes)
    assert TowerSizes.from_weights(towers.state_dict()) == sizes


def test_other_weights_are_refused():
    with pytest.raises(DataError, match="holds no CLIP weights"):
        TowerSizes.from_weights({"weight": torch.zeros(1)})


def test_sizes_survive_json():
    assert TowerSizes(**json.loads(json.dumps(TINY.to_json()))) == TINY
