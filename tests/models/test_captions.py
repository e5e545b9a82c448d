import json

import pytest

from dafm_ray.models.captions import join_capitalised, join_plain, join_stripped

RULES = {
    "clip4cir_val": join_capitalised,
    "spn4cir_clip4cir_val": join_stripped,
    "spn4cir_tgcir_val": join_capitalised,
    "tgcir_no_correction": join_plain,
}


@pytest.mark.parametrize("rule", RULES)
def test_equals_the_published_rules(golden, rule):
    rows = json.loads((golden / "captions" / "captions.json").read_text())["rows"]
    assert len(rows) == 40
    for row in rows:
        assert RULES[rule](row["captions"]) == row[rule]


def test_one_caption_is_left_alone_but_for_its_capital():
    assert join_capitalised(["make it red."]) == "Make it red"
