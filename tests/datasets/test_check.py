import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dafm_ray.cli import main
from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.check import check
from dafm_ray.datasets.check_table import to_json, to_text
from dafm_ray.datasets.fashioniq import PUBLISHED
from dafm_ray.datasets.inspection import inspect, pixel_digest
from tests.datasets.test_cirr import entry
from tests.datasets.test_cirr import layout as cirr_layout
from tests.datasets.test_fashioniq import TRIPLETS
from tests.datasets.test_fashioniq import layout as fashioniq_layout
from tests.samples import image_folder, parquet_shard, picture

ray = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(120)]


def with_ray(test):
    for mark in ray:
        test = mark(test)
    return test


def kinds(found):
    return {(finding.check, finding.item) for finding in found.findings}


def test_fashioniq_on_annotations_alone(reference_material):
    """The published sizes and the 3,302 images that two categories share."""
    folder = str(reference_material / "data" / "fashioniq")
    found = check(DatasetConfig("fashioniq", annotations=folder))
    sizes = {(part.split, part.category): (part.images, part.queries) for part in found.parts}
    assert sizes == PUBLISHED
    assert found.changes_metric == 0
    assert found.images_checked == 0
    shared = [finding for finding in found.findings if finding.check == "shared images"]
    assert [finding.item for finding in shared] == ["shirt, toptee"]
    assert "share 3,302 images" in shared[0].detail
    assert "77,683 entries for 74,381 images" in shared[0].detail
    empty = [finding.detail for finding in found.findings if finding.check == "empty caption"]
    assert sum(not detail.startswith("test") for detail in empty) == 15


def test_cirr_on_annotations_alone(reference_material, tmp_path, capsys):
    folder = str(reference_material / "data" / "cirr")
    file = tmp_path / "new" / "check.json"
    assert main(["data", "check", "cirr", "--annotations", folder, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "0 findings that would change a metric" in printed
    assert "order leak" in printed
    values = json.loads(file.read_text())
    sizes = {part["split"]: (part["images"], part["queries"]) for part in values["parts"]}
    assert sizes == {"train": (16_939, 0), "val": (2_297, 4_181), "test1": (2_315, 4_148)}
    leak = next(part["leak"] for part in values["parts"] if part["split"] == "val")
    assert leak["hits"]["10"] == 2_619
    assert "missing annotations" in {finding["check"] for finding in values["findings"]}


def test_everything_wrong_with_annotations_is_listed(tmp_path):
    entries = [
        entry(0),
        entry(0),
        entry(1, reference="dev-9"),
        entry(2, target_hard="dev-8"),
        entry(3, caption=" "),
        entry(4, img_set={"id": 1, "members": ["dev-0-0-img0"]}),
        {"pairid": "x"},
    ]
    config = cirr_layout(tmp_path, entries)
    found = check(DatasetConfig("cirr", annotations=config.root))
    assert {
        ("duplicate id", "100"),
        ("reference outside the gallery", "101"),
        ("target outside the gallery", "102"),
        ("empty caption", "103"),
        ("group without reference", "104"),
        ("group without target", "104"),
        ("other size", ""),
    } <= kinds(found)
    unreadable = [f for f in found.findings if f.check == "unreadable entry"]
    assert len(unreadable) == 1
    assert "entry 6: 'reference' is missing" in unreadable[0].detail
    assert next(f for f in found.findings if f.check == "empty caption").changes_metric
    missing = {f.item for f in found.findings if f.check == "missing part"}
    assert missing == {"train", "test1"}


def odd_images(root: Path) -> Path:
    """A folder of usable but odd images, unusable ones and twins."""
    image_folder(root, images=6, queries=4)
    picture(20).convert("CMYK").save(root / "cmyk.jpg")
    picture(21).convert("P").save(root / "palette.png")
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999).save(root / "wide.png")
    frames = [Image.new("L", (8, 8), value) for value in (10, 200)]
    frames[0].save(root / "animated.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(22, (40, 20)).save(root / "turned.jpg", exif=exif)
    (root / "empty.png").write_bytes(b"")
    (root / "page.jpg").write_bytes(b"<html>gone</html>")
    (root / "cut.png").write_bytes((root / "005.png").read_bytes()[:300])
    picture(1).save(root / "twin.bmp")
    return root


@with_ray
def test_images_are_decoded_and_what_is_odd_is_listed(tmp_path, capsys):
    root = odd_images(tmp_path / "own")
    found = check(DatasetConfig("folder", root=str(root)))
    assert found.images_checked == 15
    by_kind = {
        kind: {f.item for f in found.findings if f.check == kind}
        for kind in ("unusable image", "converted image", "identical pixels")
    }
    assert by_kind["unusable image"] == {"empty.png", "page.jpg", "cut.png"}
    odd = {"cmyk.jpg", "palette.png", "wide.png", "animated.gif", "turned.jpg"}
    assert by_kind["converted image"] == odd
    assert by_kind["identical pixels"] == {"001.png"}
    assert found.changes_metric == 4
    assert main(["data", "check", "folder", "--root", str(root)]) == 3
    printed = capsys.readouterr().out
    assert "CHANGES A METRIC: unusable image (3)" in printed
    assert "page.jpg: not an image (begins with b'<html>gone</'" in printed


@with_ray
def test_shards_are_checked_as_files_are(tmp_path):
    root = odd_images(tmp_path / "own")
    images = [path for path in sorted(root.iterdir()) if path.suffix != ".jsonl"]
    (tmp_path / "queries").mkdir()
    (tmp_path / "queries" / "queries.jsonl").write_bytes((root / "queries.jsonl").read_bytes())
    members = [(path.name, path.read_bytes()) for path in images]
    parquet_shard(tmp_path / "x.parquet", members, row_group_size=4)
    plain = check(DatasetConfig("folder", root=str(root)))
    sharded = check(
        DatasetConfig("folder", root=str(tmp_path / "queries"), images=str(tmp_path / "x.parquet"))
    )
    assert kinds(sharded) == kinds(plain)
    assert sharded.images_checked == plain.images_checked


@with_ray
def test_twins_of_a_target_change_the_metric(tmp_path):
    config = cirr_layout(tmp_path)
    images = sorted((tmp_path / "dev").iterdir())
    images[0].write_bytes(images[1].read_bytes())
    images[2].unlink()
    found = check(config)
    by_kind = {finding.check: finding for finding in found.findings}
    assert by_kind["identical pixels"].changes_metric
    assert "queries have one of them" in by_kind["identical pixels"].detail
    assert by_kind["unusable image"].changes_metric


def damaged(tmp_path, reference_material, edit):
    """The real CIRR val with one damage."""
    source = reference_material / "data" / "cirr"
    for folder, name in (("captions", "cap"), ("image_splits", "split")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        file = f"{folder}/{name}.rc2.val.json"
        values = json.loads((source / file).read_text())
        changed = edit(name, values)
        if changed is not None:
            (tmp_path / file).write_text(json.dumps(changed))
    return check(DatasetConfig("cirr", "val", annotations=str(tmp_path)))


DAMAGES = {
    "none": lambda name, values: values,
    "empty caption": lambda name, values: (
        values if name == "split" else [{**values[0], "caption": ""}, *values[1:]]
    ),
    "other size": lambda name, values: values if name == "split" else values[1181:],
    "no target": lambda name, values: (
        values
        if name == "split"
        else [{k: v for k, v in values[0].items() if k != "target_hard"}, *values[1:]]
    ),
    "missing annotations": lambda name, values: values if name == "split" else None,
    "no target ": lambda name, values: (
        values
        if name == "split"
        else [{k: v for k, v in entry.items() if k != "target_hard"} for entry in values]
    ),
    "group of another size": lambda name, values: (
        values
        if name == "split"
        else [{**values[0], "img_set": {"id": 1, "members": []}}, *values[1:]]
    ),
    "path leaves the root": lambda name, values: (
        {**values, next(iter(values)): "../../x.png"} if name == "split" else values
    ),
    "one file for two ids": lambda name, values: (
        {**values, next(iter(values)): list(values.values())[1]} if name == "split" else values
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_published_annotations_changes_the_metric(
    tmp_path, reference_material, damage
):
    found = damaged(tmp_path, reference_material, DAMAGES[damage])
    if damage == "none":
        assert found.changes_metric == 0
    else:
        assert damage.strip() in {f.check for f in found.findings if f.changes_metric}


def test_a_split_that_is_there_and_cannot_be_read_changes_the_metric(tmp_path):
    config = cirr_layout(tmp_path)
    for split in ("train", "test1"):
        (tmp_path / "image_splits" / f"split.rc2.{split}.json").write_text("<html>")
    found = check(DatasetConfig("cirr", annotations=config.root))
    parts = [f.item for f in found.findings if f.check == "missing part" and f.changes_metric]
    assert parts == ["train", "test1"]


def test_a_missing_image_folder_is_one_finding(tmp_path):
    config = cirr_layout(tmp_path, places={f"dev-{n}": f"./images/{n}.png" for n in range(3)})
    found = check(config)
    assert sum(f.check == "missing image folder" for f in found.findings) == 1
    assert found.images_checked == 0


def test_nothing_there_is_one_message(tmp_path, capsys):
    for name in ("cirr", "fashioniq", "folder"):
        assert main(["data", "check", name, "--root", str(tmp_path / "nothing")]) == 3
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["data", "check", "cir"]) == 2
    assert "did you mean 'cirr'" in capsys.readouterr().err


def test_images_across_splits_are_named(tmp_path):
    for split, category in (("train", "shirt"), ("val", "dress")):
        config = fashioniq_layout(tmp_path, TRIPLETS, split, category)
    found = check(DatasetConfig("fashioniq", annotations=config.root))
    across = next(f for f in found.findings if f.check == "images across splits")
    assert "train shirt and val dress 9" in across.detail
    assert to_json(found)["parts"][0]["split"] == "train"
    assert "| train | shirt " in to_text(found)


def test_twins_are_told_by_what_a_model_sees():
    plain = picture(3)
    buffer = io.BytesIO()
    plain.save(buffer, "png")
    assert inspect("x", buffer.getvalue()).pixels == pixel_digest(plain)
    assert pixel_digest(plain.convert("RGBA")) == pixel_digest(plain)
    assert pixel_digest(plain.resize((32, 40))) != pixel_digest(plain)
    turned = Image.new("RGB", (4, 9))
    assert pixel_digest(turned) != pixel_digest(turned.transpose(Image.Transpose.ROTATE_90))
