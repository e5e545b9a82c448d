"""Numbers that others published, to stand beside ours and never among them.

Source: DAFM, Tables 2 and 3, whose own rows are its last. CIRR's are of the test1 split, as its
server counts them (hits / 4,150); DAFM's own row fits no such count and is unverified.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dafm_ray.datasets.registry import dataset_entry
from dafm_ray.tiles.manifest import Manifest


@dataclass(frozen=True)
class Published:
    """Rows of a paper.

    Attributes:
        title: what they are of.
        note: why they do not compare with the rows above.
        rows: system -> metric -> percent.
    """

    title: str
    note: str
    rows: dict[str, dict[str, float]]


def published_for(manifests: Sequence[Manifest], metrics: tuple[str, ...]) -> Published | None:
    """The published rows of a data set's protocol, if every category of it is there.

    The note says where the stores hold other images or queries than the data set's authors count,
    as a folder that borrows its layout does.
    """
    first = manifests[0]
    if first.dataset["name"] == "cirr" and first.protocol == "cirr":
        published = _CIRR
    elif first.protocol == "fashioniq" and set(_FASHIONIQ_COLUMNS) <= set(metrics):
        published = _FASHIONIQ
    else:
        return None
    if all(_is_whole(manifest) for manifest in manifests):
        return published
    other = "the rows above are of other images or queries in this layout and do not compare; "
    return replace(published, note=other + published.note)


def _is_whole(manifest: Manifest) -> bool:
    """Whether it holds as many images and queries as the authors of its data set count."""
    spec = manifest.dataset
    part = spec["split"], spec.get("category", "")
    counted = dataset_entry(spec["name"]).published.get(part)
    return counted == (manifest.gallery_size, manifest.queries_size)


def _rows(columns: tuple[str, ...], text: str) -> dict[str, dict[str, float]]:
    rows = {}
    for line in text.strip().splitlines():
        name, *values = line.split()
        rows[name] = {
            column: float(value)
            for column, value in zip(columns, values, strict=True)
            if value != "-"
        }
    return rows


_CIRR_COLUMNS = (
    *("R@1", "R@5", "R@10", "R@50"),
    *("Rsubset@1", "Rsubset@2", "Rsubset@3", "Rmean"),
)
_CIRR = Published(
    "CIRR test1",
    "measured by its server on another split, whose labels are not public.",
    _rows(
        _CIRR_COLUMNS,
        """
        CLIP4CIR 42.82 75.88 86.27 97.64 70.00 87.45 94.99 72.94
        TG-CIR 45.23 78.34 87.13 97.30 72.84 89.25 95.13 75.59
        BLIP4CIR 44.77 76.55 86.41 97.18 74.99 89.90 95.59 75.77
        SPRC 52.87 83.25 90.92 98.12 80.89 92.48 97.06 82.07
        SPRC+SPN 55.06 83.83 90.87 98.29 81.54 92.65 97.04 82.69
        CCIN 53.41 84.05 91.17 98.00 - - - -
        DAFM 57.57 86.60 93.21 98.75 82.27 93.21 97.21 84.43
        """,
    ),
)

_FASHIONIQ_COLUMNS = tuple(
    f"{category} R@{k}" for category in ("dress", "shirt", "toptee") for k in (10, 50)
)
_FASHIONIQ = Published(
    "FashionIQ val",
    "on its own queries and galleries (original split), under the authors' own weights.",
    _rows(
        (*_FASHIONIQ_COLUMNS, "Rmean"),
        """
        CLIP4CIR 38.23 62.67 44.01 64.57 45.39 69.56 54.07
        TG-CIR 35.50 59.45 40.24 62.37 43.65 67.36 51.43
        BLIP4CIR 44.27 67.08 45.00 66.68 49.72 73.02 57.63
        SPRC 49.13 72.68 54.91 74.39 59.10 78.99 64.87
        SPRC+SPN 50.57 74.12 57.70 75.27 60.84 79.96 66.41
        CCIN 49.38 72.58 55.93 74.14 57.93 77.56 64.59
        DAFM 52.80 75.81 58.34 76.55 60.94 80.42 67.48
        """,
    ),
)
