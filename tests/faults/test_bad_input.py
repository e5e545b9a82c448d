"""Everything users bring that cannot be used: one clear message and its exit code, nothing else.

A row is: what is wrong, the exit code, what the message must say, and how to make it.
"""

import csv
import json
import os
import pickle
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dafm_ray.cli import main
from dafm_ray.models.registry import load_model
from tests.datasets.test_cirr import NAMES, entry
from tests.datasets.test_cirr import layout as cirr_layout
from tests.datasets.test_fashioniq import TRIPLETS, triplet
from tests.datasets.test_fashioniq import layout as fashioniq_layout
from tests.samples import image_folder, labelled_dataset, picture, score_matrix, score_store
from tests.tiles.test_ingest import change, score_folder

Arguments = list[str]
TINY = "clip4cir:sum@random-tiny"


@dataclass(frozen=True)
class Case:
    """One kind of bad input."""

    name: str
    code: int
    says: tuple[str, ...]
    make: Callable[[Path], Arguments]


def job(tmp_path: Path, dataset: str = "", model: str = TINY, more: str = "") -> Arguments:
    dataset = dataset or f"{{name: folder, root: {image_folder(tmp_path / 'own', 8, 4)}}}"
    (tmp_path / "job.yaml").write_text(
        f"dataset: {dataset}\n"
        f"models: [{{name: a, id: '{model}'}}]\n"
        f"store: {tmp_path / 'store'}\n{more}"
    )
    return ["precompute", "--config", str(tmp_path / "job.yaml")]


def folder(tmp_path: Path, *lines: dict[str, object]) -> Arguments:
    root = image_folder(tmp_path / "own", 8, 0)
    (root / "queries.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return job(tmp_path, f"{{name: folder, root: {root}}}")


def query(n: int = 0, **changes: object) -> dict[str, object]:
    return {"id": f"q{n}", "reference": "000.png", "text": "x", "target": "001.png", **changes}


def cirr(tmp_path: Path, *entries: dict[str, object], **layout: object) -> Arguments:
    root = cirr_layout(tmp_path / "cirr", list(entries) or None, **layout).root
    return job(tmp_path, f"{{name: cirr, split: val, root: {root}}}")


def fashioniq(tmp_path: Path, *triplets: dict[str, object], category: str = "dress") -> Arguments:
    root = fashioniq_layout(tmp_path / "fiq", list(triplets) or TRIPLETS).root
    dataset = f"{{name: fashioniq, split: val, category: {category}, root: {root}}}"
    return job(tmp_path, dataset)


def scores(
    tmp_path: Path, edit: Callable[[Path], None] | None = None, out: Path | None = None
) -> Arguments:
    made = score_folder(tmp_path / "scores", labelled_dataset(23, 11), models=("a",))
    if edit:
        edit(made)
    return ["tiles", "ingest", str(made), "--out", str(out or tmp_path / "store")]


def ingested_twice(tmp_path: Path, edit: Callable[[Path], None]) -> Arguments:
    arguments = scores(tmp_path)
    assert main(arguments) == 0
    edit(tmp_path / "scores")
    return arguments


def with_score(value: float) -> Callable[[Path], None]:
    def edit(made: Path) -> None:
        values = np.load(made / "a.npy")
        values[3, 4] = value
        np.save(made / "a.npy", values)

    return edit


def renamed_ids(name: str) -> Callable[[Path], None]:
    return lambda made: change(made, name, lambda ids: [f"new-{n}" for n in range(len(ids))])


def checkpoint(tmp_path: Path, lacks: str) -> Arguments:
    tensors = load_model(TINY).module.CLIP.state_dict()
    kept = {key: tensor for key, tensor in tensors.items() if key != lacks}
    torch.save({"CLIP": kept}, tmp_path / "weights.pt")
    return job(tmp_path, model=f"clip4cir:sum@{tmp_path / 'weights.pt'}")


class Module(torch.nn.Module):
    """Somebody's whole model, pickled."""


def pickled_module(tmp_path: Path) -> Arguments:
    with (tmp_path / "weights.pt").open("wb") as file:
        pickle.dump(Module(), file)
    return job(tmp_path, model=f"clip4cir:sum@{tmp_path / 'weights.pt'}")


def flipped_bit(tmp_path: Path) -> Arguments:
    store = score_store(tmp_path / "store", labelled_dataset(23, 11))
    tile = next((tmp_path / "store" / "scores").rglob("*.arrow"))
    data = bytearray(tile.read_bytes())
    data[len(data) // 2] ^= 1
    tile.write_bytes(data)
    return ["evaluate", store.uri, "--out", str(tmp_path / "report")]


def other_gallery(tmp_path: Path) -> Arguments:
    score_store(tmp_path / "store", labelled_dataset(24, 11), models=("b",))
    return scores(tmp_path)


def blocked(tmp_path: Path) -> Path:
    """A folder that cannot be written, whoever runs the tests."""
    place = tmp_path / "blocked"
    place.mkdir()
    if os.geteuid():
        place.chmod(0o555)
    else:
        mount(place, "ro")
    return place


def mount(place: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs privileges")


def full_disk(tmp_path: Path) -> Arguments:
    place = tmp_path / "full"
    place.mkdir()
    mount(place, "size=1m")
    made = score_folder(tmp_path / "scores", labelled_dataset(800, 500), models=("a",))
    return ["tiles", "ingest", str(made), "--out", str(place / "store")]


def data_check(name: str, *arguments: str) -> Callable[[Path], Arguments]:
    return lambda tmp_path: ["data", "check", name, *arguments]


CASES = [
    Case("no such data set", 2, ("no data set 'cir'", "'cirr'"), data_check("cir")),
    Case(
        "no such split",
        2,
        ("no split of icons 'dev'", "train, val, test"),
        lambda p: job(p, "{name: icons, split: dev}"),
    ),
    Case(
        "no such category",
        2,
        ("no category of fashioniq 'skirt'", "did you mean 'shirt'"),
        lambda p: fashioniq(p, category="skirt"),
    ),
    Case(
        "no such model",
        2,
        ("no model family 'clip5cir'", "did you mean 'clip4cir'"),
        lambda p: job(p, model="clip5cir:sum@random-tiny"),
    ),
    Case(
        "no such variant",
        2,
        ("clip4cir offers the variants",),
        lambda p: job(p, model="clip4cir:summ@random-tiny"),
    ),
    Case(
        "a misspelt key",
        2,
        ("unknown key 'tile_querys'; did you mean 'tile_queries'",),
        lambda p: job(p, more="tile_querys: 3\n"),
    ),
    Case(
        "a misspelt key of a section",
        2,
        ("unknown key 'dataset.rooot'; did you mean 'root'",),
        lambda p: job(p, "{name: folder, rooot: x}"),
    ),
    Case(
        "a wrong type", 2, ("'encode_block'", "'many'"), lambda p: job(p, more="encode_block: many")
    ),
    Case(
        "a key of another data set",
        2,
        ("dataset.category says nothing about icons",),
        lambda p: job(p, "{name: icons, split: val, category: dress}"),
    ),
    Case(
        "no folder",
        3,
        ("there is no folder", "set dataset.root"),
        lambda p: job(p, f"{{name: folder, root: {p / 'nowhere'}}}"),
    ),
    Case(
        "no annotations",
        3,
        ("no image_splits/split.rc2.val.json", "set dataset.annotations"),
        lambda p: job(p, f"{{name: cirr, split: val, root: {p}}}"),
    ),
    Case(
        "no image folder",
        3,
        ("the image folder", "photos is missing; set dataset.root"),
        lambda p: cirr(p, places={name: f"./photos/{name}.png" for name in NAMES}),
    ),
    Case(
        "reference outside the gallery",
        3,
        ("query '100' names 'dev-9', which is not in the gallery",),
        lambda p: cirr(p, entry(0, reference="dev-9")),
    ),
    Case(
        "target outside the gallery",
        3,
        ("'B999', which is not in the gallery",),
        lambda p: fashioniq(p, triplet("B000", "B999", "a", "b")),
    ),
    Case(
        "duplicate query ids",
        3,
        ("query id 'q0' stands twice",),
        lambda p: folder(p, query(), query()),
    ),
    Case(
        "a caption that is none",
        3,
        ("entry 0: 'caption' must be text",),
        lambda p: cirr(p, entry(0, caption=None)),
    ),
    Case(
        "no captions",
        3,
        ("entry 0: 'captions' is empty",),
        lambda p: fashioniq(p, triplet("B000", "B001")),
    ),
    Case(
        "the same scores under other ids",
        3,
        ("holds model 'a' with other scores or ids",),
        lambda p: ingested_twice(p, lambda made: change(made, "query_ids", lambda ids: ids[::-1])),
    ),
    Case(
        "a store under another protocol",
        3,
        ("one store has one protocol",),
        lambda p: ingested_twice(
            p, lambda made: change(made, "scores", lambda s: {**s, "protocol": "folder"})
        ),
    ),
    Case(
        "a policy that is not the protocol's",
        2,
        ("protocol 'cirr' has the reference 'mask'",),
        lambda p: scores(
            p, lambda made: change(made, "scores", lambda s: {**s, "reference": "keep"})
        ),
    ),
    Case("duplicate pair ids", 3, ("'100' stands twice",), lambda p: cirr(p, entry(0), entry(0))),
    Case(
        "an empty caption",
        3,
        ("queries.jsonl:1: 'text' is missing or empty",),
        lambda p: folder(p, query(text=" ")),
    ),
    Case(
        "row ids that do not align",
        3,
        ("'new-0', 'new-1', 'new-10', 'new-2', 'new-3' and 6 more", "a.npy"),
        lambda p: scores(p, renamed_ids("query_ids")),
    ),
    Case(
        "column ids that do not align",
        3,
        ("gallery_ids.json does not hold", "and 18 more"),
        lambda p: scores(p, renamed_ids("gallery_ids")),
    ),
    Case("an infinite score", 3, ("is infinite", "NaN"), lambda p: scores(p, with_score(np.inf))),
    Case(
        "a matrix of another shape",
        3,
        ("is 10 x 23, but query_ids.json names 11",),
        lambda p: scores(p, lambda made: np.save(made / "a.npy", np.zeros((10, 23), "float32"))),
    ),
    Case(
        "pickled scores",
        3,
        ("a.npy is not an array of numbers",),
        lambda p: scores(p, lambda made: np.save(made / "a.npy", np.array([{}], dtype=object))),
    ),
    Case(
        "a checkpoint that lacks a tensor",
        3,
        ("1 missing (ln_final.bias)", "weights.pt"),
        lambda p: checkpoint(p, "ln_final.bias"),
    ),
    pytest.param(
        Case(
            "a pickled module",
            3,
            ("weights.pt holds pickled Python objects", "Convert it once"),
            pickled_module,
        ),
        marks=pytest.mark.slow,  # the same way as a checkpoint that lacks a tensor
    ),
    Case("no checkpoint", 3, ("no weights file",), lambda p: job(p, model="clip4cir:sum@no.pt")),
    Case("a flipped bit", 3, ("is damaged", "--repair"), flipped_bit),
    Case("a store of another gallery", 3, ("was made for another gallery",), other_gallery),
    Case(
        "a store that is none",
        3,
        ("is not a tile store",),
        lambda p: ["evaluate", str(p), "--out", str(p / "report")],
    ),
    Case(
        "a read-only folder",
        5,
        ("cannot write",),
        lambda p: scores(p, out=blocked(p) / "store"),
    ),
    Case(
        "a read-only folder for an export",
        5,
        ("cannot write",),
        lambda p: [
            "tiles",
            "export",
            score_store(p / "store", labelled_dataset(23, 11)).uri,
            "--to",
            str(blocked(p) / "x.parquet"),
        ],
    ),
    Case(
        "a read-only folder for made data",
        5,
        ("cannot write",),
        lambda p: ["data", "make", "cirr-like", "--out", str(blocked(p) / "new")],
    ),
    Case("a full disk", 5, ("the disk is full", "finished work is kept"), full_disk),
]


@pytest.fixture
def unmounted(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for place in ("blocked", "full"):
        if (tmp_path / place).is_mount():
            subprocess.run(["umount", str(tmp_path / place)], check=True)


@pytest.mark.timeout(150)
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_ends_in_one_message_and_its_exit_code(case, unmounted, capsys):
    arguments = case.make(unmounted)
    capsys.readouterr()
    assert main(arguments) == case.code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in error
    for words in case.says:
        assert words in lines[0]


LONG = "x" * 247 + ".png"
ODD_NAMES = ("für 山 🎯.png", LONG, " space .png", "quote'\".png", "line\nbreak.png")
UNUSABLE = {
    "zero.png": "the file is empty",
    "page.jpg": "not an image (begins with b'<html><head>')",
    "cut.jpg": "cannot be decoded",
    "bomb.png": "decompression bomb",
    "gone.png": "the file is missing",
    "../outside.png": "leaves",
    "y" * 300 + ".png": "File name too long",
}


@pytest.mark.timeout(150)
@pytest.mark.usefixtures("local_ray")
def test_bad_images_are_listed_with_their_reasons_and_the_rest_is_done(tmp_path, capsys):
    root = image_folder(tmp_path / "own", 8, 4)
    for n, name in enumerate(ODD_NAMES):
        picture(30 + n).save(root / name)
    (root / "zero.png").write_bytes(b"")
    (root / "page.jpg").write_bytes(b"<html><head></head></html>")
    picture(40, (300, 300)).save(root / "cut.jpg")
    (root / "cut.jpg").write_bytes((root / "cut.jpg").read_bytes()[:3000])
    Image.new("1", (30_000, 30_000)).save(root / "bomb.png")
    picture(41).save(tmp_path / "outside.png")
    names = [f"{n:03d}.png" for n in range(8)] + [
        name for name in (*ODD_NAMES, *UNUSABLE) if "\n" not in name
    ]
    with (root / "queries.jsonl").open("a", encoding="utf-8") as queries:
        named = query(9, reference=ODD_NAMES[0], target=LONG)
        queries.write("\n" + json.dumps(named, ensure_ascii=False))
    (root / "gallery.txt").write_text("\n".join(names), encoding="utf-8")
    assert main(job(tmp_path, f"{{name: folder, root: {root}}}")) == 4
    error = capsys.readouterr().err
    assert f"{len(UNUSABLE)} items could not be used" in error
    assert "quarantine.csv" in error
    assert '"stage": "similarity"' in (tmp_path / "store" / "status.json").read_text()
    with (tmp_path / "store" / "quarantine.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    assert rows.keys() == UNUSABLE.keys()
    for name, reason in UNUSABLE.items():
        assert reason in rows[name]
    out = tmp_path / "report"
    assert main(["evaluate", str(tmp_path / "store"), "--out", str(out)]) == 4
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "für 山 🎯.png" in page
    assert "zero.png" in page
    assert main(["data", "check", "folder", "--root", str(root)]) == 3


def test_missing_scores_are_no_mistake(tmp_path, capsys):
    made = score_folder(tmp_path / "scores", labelled_dataset(23, 11), models=("a",))
    values = score_matrix(labelled_dataset(23, 11), 0)
    values[3] = np.nan
    np.save(made / "a.npy", values)
    assert main(["tiles", "ingest", str(made), "--out", str(tmp_path / "store")]) == 0
    assert "1 queries without any" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "store"), "--out", str(tmp_path / "r")]) == 0
