"""What a store holds, fixed at its first run."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Literal

import pyarrow as pa

from dafm_ray.config import Precision
from dafm_ray.datasets.base import ReferencePolicy, digest, title_of
from dafm_ray.errors import DataError

FORMAT = 1
LIBRARIES = ("dafm-ray", "torch", "ray", "pyarrow", "numpy", "pillow", "open_clip_torch")

ScoreType = Literal["float32", "float16"]

MADE_ELSEWHERE = "scores"
"""Family of models whose scores were ingested."""


@dataclass(frozen=True)
class ModelEntry:
    """One sub-model of a store.

    Attributes:
        id: `family:variant@weights`.
        weights_digest: of the weights' bytes.
        batch: items of one forward pass; 0 until it is measured, and for scores made elsewhere.
        precision: of the forward passes; `auto` until it is known.
    """

    id: str
    weights_digest: str
    batch: int = 0
    precision: Precision = "auto"

    @property
    def identity(self) -> tuple[str, str]:
        """`family:variant` and weights: what a store's scores come from, wherever the file lies."""
        return self.id.partition("@")[0], self.weights_digest

    @property
    def encoding(self) -> str:
        """How it encodes, in words; empty while that is open, and for scores made elsewhere."""
        known = self.batch and self.precision != "auto"
        return f"{self.precision}, batches of {self.batch}" if known else ""

    @property
    def is_made_elsewhere(self) -> bool:
        """Whether the scores were ingested."""
        return self.id.startswith(MADE_ELSEWHERE + ":")

    def may_equal(self, other: "ModelEntry") -> bool:
        """Whether both can be one model under different data; of scores made elsewhere nobody
        knows.
        """
        elsewhere = self.is_made_elsewhere or other.is_made_elsewhere
        return elsewhere or self.weights_digest == other.weights_digest


@dataclass(frozen=True)
class Grid:
    """Block shapes; they never change after the first run, so that a resumed store is the same.

    Attributes:
        encode_block: images or queries decoded, encoded and committed together.
        tile_queries: rows of a similarity tile.
        tile_candidates: columns of a similarity tile.
    """

    encode_block: int
    tile_queries: int
    tile_candidates: int


@dataclass(frozen=True)
class Manifest:
    """The store's identity. Digests are over ids, labels and weights, not over timings.

    Attributes:
        dataset: what opens the data set again, as in the job's configuration.
        protocol: label every table prints.
        policy: what happens to a query's reference among the candidates.
        tables: file name -> checksum of `gallery.arrow` and `queries.arrow`.
        shortlist: K of each model's first candidates of which a query keeps the union; 0 keeps all.
    """

    dataset: dict[str, Any]
    protocol: str
    policy: ReferencePolicy
    gallery_size: int
    gallery_digest: str
    queries_size: int
    queries_digest: str
    score_type: ScoreType
    grid: Grid
    tables: dict[str, str]
    models: dict[str, ModelEntry] = field(default_factory=dict)
    shortlist: int = 0
    order: str = "blake2b-16(id), id"
    format: int = FORMAT
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Data set, split and category, as `fashioniq val dress`."""
        spec = self.dataset
        return title_of(spec["name"], spec["split"], spec.get("category", ""))

    def to_bytes(self) -> pa.Buffer:
        """Canonical JSON with a digest of itself: any flipped bit shows."""
        values = asdict(self)
        return pa.py_buffer(_canonical({**values, "digest": digest([_canonical(values).decode()])}))

    @staticmethod
    def from_bytes(data: pa.Buffer, where: str) -> "Manifest":
        """Inverse of `to_bytes`.

        Raises:
            DataError: not a manifest, changed since it was written, or of a newer format.
        """
        raw = bytes(memoryview(data))
        try:
            values = json.loads(raw)
            stored = values.pop("digest")
            found = values.get("format")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DataError(f"{where} is not a store manifest, or it is damaged") from None
        if found != FORMAT:
            raise DataError(f"{where} has format {found}; this version reads format {FORMAT}")
        canonical = _canonical({**values, "digest": stored})
        if raw != canonical or stored != digest([_canonical(values).decode()]):
            raise DataError(f"{where} has changed since it was written; restore it from a copy")
        values["grid"] = Grid(**values["grid"])
        values["models"] = {name: ModelEntry(**entry) for name, entry in values["models"].items()}
        return Manifest(**values)


def joint_title(manifests: Sequence[Manifest]) -> str:
    """What stores are called together, as `fashioniq val dress, shirt, toptee`."""
    heads = {title_of(m.dataset["name"], m.dataset["split"], "") for m in manifests}
    categories = list(dict.fromkeys(m.dataset.get("category", "") for m in manifests))
    if len(heads) == 1:
        return title_of(heads.pop(), "", ", ".join(categories))
    return ", ".join(dict.fromkeys(manifest.title for manifest in manifests))


def library_versions() -> dict[str, str]:
    """Versions of the libraries that numbers may depend on."""
    return {name: version(name) for name in LIBRARIES}


def _canonical(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()
