import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dafm_ray.cli import main
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.evaluation.submission import SHOWN, check_content, check_submission
from dafm_ray.evaluation.submission_format import (
    LARGEST,
    LENGTHS,
    TEST_QUERIES,
    submission_text,
)
from tests.samples import cirr_dataset

DATASET = cirr_dataset()
QUERIES, GALLERY = DATASET.queries, DATASET.gallery.ids
FIRST, SECOND = QUERIES[:2]


def candidates(query, metric):
    pool = query.group if metric == "recall_subset" else GALLERY
    return [name for name in pool if name != query.reference]


SOUND = {
    metric: {query.id: candidates(query, metric)[:length] for query in QUERIES}
    for metric, length in LENGTHS.items()
}
NAMES = SOUND["recall"][FIRST.id]
SUBSET = SOUND["recall_subset"][FIRST.id]


def server_file(metric="recall", **changes):
    """A sound file with some keys set to another value, or (None) left out."""
    values = {**json.loads(submission_text(metric, SOUND[metric])), **changes}
    return json.dumps({key: value for key, value in values.items() if value is not None})


def listing(names, metric="recall"):
    return server_file(metric, **{FIRST.id: names})


def keyed(key):
    return server_file(**{FIRST.id: None, key: NAMES})


def check(text):
    return check_content(text.encode(), QUERIES, GALLERY)


WRONG = {
    "unreadable file": None,
    "damaged gzip": gzip.compress(server_file().encode())[:-200],
    "too large": server_file() + " " * LARGEST,
    "not UTF-8": server_file().encode("utf-16"),
    "byte order mark": "\ufeff" + server_file(),
    "truncated": server_file()[:-100],
    "not JSON": server_file().replace('"', "'"),
    "not an object": json.dumps([SOUND["recall"]]),
    "repeated key": server_file()[:-1] + f', "{FIRST.id}": {json.dumps(NAMES)}}}',
    "no version": server_file(version=None),
    "other version": server_file(version="rc1"),
    "no metric": json.dumps({"version": "rc2", **SOUND["recall"]}),
    "unknown metric": submission_text("R@K", SOUND["recall"]),
    "metric against lists": submission_text("recall_subset", SOUND["recall"]),
    "extra key": server_file(comment="mine"),
    "unknown pair id": server_file(**{"99999": NAMES}),
    "misspelt pair id": keyed(f"0{FIRST.id}"),
    "missing pair id": server_file(**{FIRST.id: None}),
    "not a list": listing(NAMES[0]),
    "empty list": listing([]),
    "too short": listing(NAMES[1:]),
    "too long": listing(candidates(FIRST, "recall")[:51]),
    "not a name": listing([float("nan"), *NAMES[1:]]),
    "path for a name": listing([f"./dev/{NAMES[0]}.png", *NAMES[1:]]),
    "name with .png": listing([f"{NAMES[0]}.png", *NAMES[1:]]),
    "name with spaces": listing([f"{NAMES[0]} ", *NAMES[1:]]),
    "repeated name": listing([NAMES[1], *NAMES[1:]]),
    "reference in list": listing([FIRST.reference, *NAMES[1:]]),
    "unknown name": listing(["dev-image-60", *NAMES[1:]]),
    "name of another split": listing(["test1-147-1-img1", *NAMES[1:]]),
    "name outside the set": listing(
        [next(n for n in GALLERY if n not in FIRST.group), *SUBSET[1:]], "recall_subset"
    ),
}
"""The one kind of fault -> a file that has it."""


def checked_file(folder, kind):
    content = WRONG[kind]
    packed = isinstance(content, bytes) and content.startswith(b"\x1f\x8b")
    file = folder / ("recall.json.gz" if packed else "recall.json")
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return check_submission(file, QUERIES, GALLERY)


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named_alone(tmp_path, kind):
    assert [fault.kind for fault in checked_file(tmp_path, kind).faults] == [kind]


def test_every_kind_says_something_else_about_the_place_and_the_mend(tmp_path):
    faults = [fault for kind in WRONG for fault in checked_file(tmp_path, kind).faults]
    assert len({fault.message for fault in faults}) == len(WRONG) > 20
    for fault in faults:
        assert fault.place in fault.message
        assert any(mark in fault.message for mark in (";", "must", "the server takes"))


@pytest.mark.parametrize("metric", LENGTHS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_sound_file_is_sound_packed_or_not(tmp_path, metric, packed):
    text = submission_text(metric, SOUND[metric]).encode()
    file = tmp_path / ("a.json.gz" if packed else "a.json")
    file.write_bytes(gzip.compress(text) if packed else text)
    found = check_submission(file, QUERIES, GALLERY)
    assert list(found.lines()) == [f"sound ({metric}, 12 queries)"]
    assert (found.notes, found.unchecked) == ((), ())


@pytest.mark.parametrize("spelling", [" {}", "{}\n", "00{}", "{}.0"])
def test_misspelt_pair_ids_are_understood(spelling):
    key = spelling.format(FIRST.id)
    [fault] = check(keyed(key)).faults
    assert fault.message == f"the key {key!r} must be written {FIRST.id!r}"


@pytest.mark.parametrize("value", [None, 1, True, "", " ", ["a"], {"a": 1}, float("inf")])
def test_only_text_is_a_name(value):
    [fault] = check(listing([value, *NAMES[1:]])).faults
    assert (fault.kind, fault.place) == ("not a name", FIRST.id)


@pytest.mark.parametrize("value", [None, 2, ["rc2"], {"rc2": 1}, float("nan")])
def test_a_head_of_another_type_is_other(value):
    values = {**json.loads(server_file()), "version": value, "metric": value}
    kinds = [fault.kind for fault in check(json.dumps(values)).faults]
    assert kinds == ["other version", "unknown metric"]


def test_the_lists_of_two_sets_swapped_are_outside_their_sets():
    lists = SOUND["recall_subset"]
    swapped = {FIRST.id: lists[SECOND.id], SECOND.id: lists[FIRST.id]}
    faults = check(server_file("recall_subset", **swapped)).faults
    assert {fault.place for fault in faults} == {FIRST.id, SECOND.id}
    assert {fault.kind for fault in faults} <= {"name outside the set", "reference in list"}


def test_everything_is_found_and_the_first_of_each_kind_are_shown():
    lists = {query.id: [] for query in QUERIES[3:]}
    found = check(submission_text("recall", lists))
    kinds = [fault.kind for fault in found.faults]
    assert kinds == ["missing pair id"] * 3 + ["empty list"] * 9
    lines = list(found.lines())
    assert len(lines) == 3 + SHOWN + 1
    assert lines[-1] == "and 4 more: empty list"


def test_the_same_list_for_all_queries_is_odd_and_not_wrong():
    larger = cirr_dataset(80)
    references = {query.reference for query in larger.queries}
    same = [name for name in larger.gallery.ids if name not in references][: LENGTHS["recall"]]
    text = submission_text("recall", {query.id: same for query in larger.queries})
    found = check_content(text.encode(), larger.queries, larger.gallery.ids)
    assert found.faults == ()
    assert found.notes == ("odd: 12 of 12 queries have the same list; is the text used?",)


def test_without_annotations_the_form_is_checked_and_the_rest_is_said():
    names = [FIRST.reference, "nowhere", *NAMES[2:]]
    lists = {str(id): names[:: 1 - 2 * (id % 2)] for id in range(TEST_QUERIES)}
    found = check_content(submission_text("recall", lists).encode(), None, None)
    sound, *unchecked = found.lines()
    assert sound == "sound in form (recall, 4,148 queries)"
    assert "every query of the split" in unchecked[0]
    assert "images of the split" in unchecked[1]
    lists["0"] = [NAMES[0], NAMES[0], "x.png"]
    found = check_content(submission_text("recall", {**lists, "mine": []}).encode(), None, None)
    kinds = [fault.kind for fault in found.faults]
    assert kinds == ["extra key", "too short", "repeated name", "name with .png"]


@pytest.mark.parametrize("count", [0, TEST_QUERIES - 1, TEST_QUERIES + 1])
def test_without_annotations_lists_are_counted(count):
    lists = {str(id): NAMES for id in range(count)}
    [fault] = check_content(submission_text("recall", lists).encode(), None, None).faults
    assert fault.kind == "wrong count"
    assert f"{count:,} lists" in fault.message


def test_what_unpacks_to_far_more_is_not_looked_into(tmp_path):
    file = tmp_path / "recall.json.gz"
    file.write_bytes(gzip.compress(b" " * (11 * LARGEST), compresslevel=1))
    [fault] = check_submission(file).faults
    assert "more than 50,000,000 bytes, the server takes 5,000,000" in fault.message


@given(st.data())
def test_any_ranking_is_sound_and_one_wrong_name_anywhere_is_found(data):
    metric = data.draw(st.sampled_from(sorted(LENGTHS)))
    lists = {
        query.id: data.draw(st.permutations(candidates(query, metric)))[: LENGTHS[metric]]
        for query in QUERIES
    }
    assert check(submission_text(metric, lists)).faults == ()
    query = data.draw(st.sampled_from(QUERIES))
    names = lists[query.id]
    place = data.draw(st.integers(0, len(names) - 1))
    names[place] = data.draw(st.sampled_from([names[place - 1], query.reference, "x", ".png", 0]))
    [fault] = check(submission_text(metric, lists)).faults
    assert fault.place == query.id


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(["version", "metric", FIRST.id, f"0{FIRST.id}"]) | st.text()


@given(st.dictionaries(KEYS, JSON | st.lists(st.sampled_from(GALLERY))))
def test_any_object_is_checked_to_the_end(values):
    for split in ((QUERIES, GALLERY), (None, None)):
        found = check_content(json.dumps(values).encode(), *split)
        assert found.faults
        assert all("\n" not in line for line in found.lines())


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_checked(content):
    assert check_content(content, QUERIES, GALLERY).faults


def test_depths_that_no_parser_takes_are_refused():
    [fault] = check('{"version": ' + "[" * 200_000).faults
    assert fault.kind == "not JSON"


@pytest.fixture(scope="module")
def published(reference_material):
    files = sorted((reference_material / "golden" / "rank_lists").glob("*.json.gz"))
    assert len(files) == 8
    return [str(file) for file in files], str(reference_material / "data" / "cirr")


def test_published_files_are_sound(published, capsys):
    files, annotations = published
    assert main(["submission", "check", *files, "--annotations", annotations]) == 0
    lines = capsys.readouterr().out.splitlines()
    metrics = ["recall_subset" if "subset" in file else "recall" for file in files]
    assert lines == [
        f"{file}: sound ({metric}, 4,148 queries)"
        for file, metric in zip(files, metrics, strict=True)
    ]
    assert main(["submission", "check", files[0]]) == 0
    form, *unchecked = capsys.readouterr().out.splitlines()
    assert form == f"{files[0]}: sound in form (recall, 4,148 queries)"
    assert len(unchecked) == 2


def test_files_of_another_split_and_lost_files_end_with_3(published, tmp_path, capsys):
    files, annotations = published
    arguments = ["submission", "check", "--annotations", annotations, files[1]]
    assert main([*arguments, "--split", "val"]) == DataError.exit_code
    printed = capsys.readouterr().out
    assert "4,143 more: unknown pair id" in printed
    assert "4,176 more: missing pair id" in printed
    assert main([*arguments, str(tmp_path / "lost.json")]) == DataError.exit_code
    sound, lost = capsys.readouterr().out.splitlines()
    assert sound.endswith("sound (recall_subset, 4,148 queries)")
    assert lost.startswith(f"{tmp_path / 'lost.json'}: it cannot be read (No such file")
    assert main(["submission", "check", files[1], "--split", "val"]) == ConfigError.exit_code
    assert "without --annotations" in capsys.readouterr().err
