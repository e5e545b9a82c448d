"""Small data for tests: pictures, folders, stores."""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.base import Dataset, Gallery, Query
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.storage import open_storage
from dafm_ray.tiles.manifest import Grid, ModelEntry
from dafm_ray.tiles.store import ROLES, TileStore, feature_key, score_key, spans


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_folder(
    root: Path, images: int = 20, queries: int = 9, size: tuple[int, int] = (40, 32)
) -> Path:
    """`queries` queries over `images` PNG files; two queries share a reference."""
    root.mkdir(parents=True, exist_ok=True)
    for n in range(images):
        picture(n, size).save(root / f"{n:03d}.png")
    lines = [
        {
            "id": f"q{n}",
            "reference": f"{n // 2:03d}.png",
            "text": f"change {n}",
            "targets": [f"{(n // 2 + 1 + n % 2) % images:03d}.png"],
        }
        for n in range(queries)
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (root / "queries.jsonl").write_text(text, encoding="utf-8")
    return root


def upload(root: Path, uri: str) -> str:
    """Every file of a folder; the URI."""
    storage = open_storage(uri)
    for path in sorted(root.rglob("*")):
        if path.is_file():
            storage.write(path.relative_to(root).as_posix(), pa.py_buffer(path.read_bytes()))
    return uri


def tar_shard(file: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def parquet_shard(
    file: Path, members: Sequence[tuple[str, bytes]], row_group_size: int | None = None
) -> None:
    ids, data = zip(*members, strict=True)
    pq.write_table(pa.table({"id": ids, "image": data}), file, row_group_size=row_group_size)


def open_folder(root: Path | str) -> Dataset:
    return load_dataset(DatasetConfig("folder", root=str(root)))


class NoImages:
    def open(self, locator: str) -> Image.Image:
        raise AssertionError(f"nothing should open {locator}")


def labelled_dataset(
    candidates: int, queries: int, seed: int = 0, split: str = "val", policy: str = "mask"
) -> Dataset:
    rng = np.random.default_rng(seed)
    ids = [f"{split}-image-{n}" for n in range(candidates)]
    rows = []
    for q in range(queries):
        reference, target, *others = rng.permutation(candidates)[:6].tolist()
        group = tuple(ids[n] for n in (reference, target, *others))
        rows.append(
            Query(
                id=f"{split}-q{q}",
                reference=ids[reference],
                captions=(f"text {q}",),
                targets=(ids[target],),
                excluded=(ids[reference],) if policy == "mask" else (),
                group=group,
                fold_group=ids[reference],
            )
        )
    return Dataset(
        name="labelled",
        split=split,
        protocol="cirr",
        policy=policy,  # type: ignore[arg-type]
        gallery=Gallery.from_source({id: id for id in ids}),
        queries=tuple(rows),
        source=NoImages(),
    )


def cirr_dataset(candidates: int = 60, queries: int = 12) -> Dataset:
    """Named as CIRR val is: pair ids, images of `dev`."""
    made = labelled_dataset(candidates, queries, split="dev")
    paired = tuple(replace(query, id=str(1000 + n)) for n, query in enumerate(made.queries))
    return replace(made, name="cirr", split="val", queries=paired)


def score_store(
    root: Path | str,
    dataset: Dataset,
    models: Sequence[str] = ("a", "b"),
    grid: Grid = Grid(4, 5, 7),  # noqa: B008
    seed: int = 0,
    signal: float = 1.0,
) -> TileStore:
    """A complete store whose scores are noise plus `signal` on the target."""
    return matrix_store(
        root,
        dataset,
        {f"test:{n}@random": score_matrix(dataset, seed + m, signal) for m, n in enumerate(models)},
        grid,
    )


def matrix_store(
    root: Path | str,
    dataset: Dataset,
    matrices: dict[str, np.ndarray],
    grid: Grid | None = None,
) -> TileStore:
    """A complete store of (Q, N) scores, in one tile a model unless a grid is named;
    `family:NAME@weights` -> those of NAME.
    """
    grid = grid or Grid(64, len(dataset.queries), len(dataset.gallery))
    names = {id: id.partition("@")[0].partition(":")[2] for id in matrices}
    entries = {name: ModelEntry(id, name) for id, name in names.items()}
    spec = {"name": dataset.name, "split": dataset.split, "root": ""}
    store = TileStore.create(str(root), dataset, spec, entries, grid, "float32")
    for id, scores_QN in matrices.items():
        name = names[id]
        for q, rows in enumerate(store.tile_rows):
            for n, columns in enumerate(store.tile_columns):
                tile = scores_QN[rows.start : rows.stop, columns.start : columns.stop]
                store.write(score_key(name, q, n), tile)
    return store


def score_matrix(dataset: Dataset, seed: int, signal: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (len(dataset.queries), len(dataset.gallery))
    scores_QN = rng.standard_normal(shape).astype(np.float32)
    for q, query in enumerate(dataset.queries):
        scores_QN[q, dataset.gallery.position(query.targets[0])] += signal
    return scores_QN


def icon_store(root: Path) -> TileStore:
    """Random scores over the real icons of the val split."""
    dataset = load_dataset(DatasetConfig("icons", "val"))
    return score_store(root, dataset, grid=Grid(64, 512, 2048), signal=3.0)


def feature_store(
    root: Path | str,
    dataset: Dataset,
    features: dict[str, tuple[np.ndarray, np.ndarray]],
    grid: Grid,
    shortlist: int = 0,
) -> TileStore:
    """A store without scores: model -> float32 features (Q, D) and (N, D)."""
    entries = {name: ModelEntry("zeroshot:sum@random", name, 1, "fp32") for name in features}
    spec = {"name": dataset.name, "split": dataset.split, "root": ""}
    store = TileStore.create(str(root), dataset, spec, entries, grid, "float32", shortlist)
    for name, each in features.items():
        for role, values in zip(ROLES, (each[1], each[0]), strict=True):
            for block, rows in enumerate(spans(len(values), grid.encode_block)):
                store.write(feature_key(name, role, block), values[rows.start : rows.stop])
    return store


def search_features(
    dataset: Dataset, models: int, width: int = 32, signal: float = 0.5, seed: int = 0
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Unit vectors, those of each query drawn towards its target; some candidates are twins."""
    rng = np.random.default_rng(seed)
    found = {}
    for m in range(models):
        gallery_ND = rng.standard_normal((len(dataset.gallery), width)).astype(np.float32)
        gallery_ND[1::7] = gallery_ND[0]
        queries_QD = rng.standard_normal((len(dataset.queries), width)).astype(np.float32)
        for q, query in enumerate(dataset.queries):
            queries_QD[q] += signal * gallery_ND[dataset.gallery.position(query.targets[0])]
        for values in (queries_QD, gallery_ND):
            values /= np.linalg.norm(values, axis=1, keepdims=True)
        found[f"m{m}"] = queries_QD, gallery_ND
    return found
