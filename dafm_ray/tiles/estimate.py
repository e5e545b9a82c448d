"""What a precompute takes, worked out from what was measured: bytes, seconds, advice, in words."""

from dataclasses import dataclass

import numpy as np

from dafm_ray.config import ModelConfig, PrecomputeConfig
from dafm_ray.markdown import markdown_table
from dafm_ray.tiles.encode import CPUS_A_DECODER
from dafm_ray.uris import shown

COMPACT = 200
"""K of the shortlists that are compared with all scores."""

LARGE_BYTES = 50_000_000_000
"""All scores below this need no second thought."""


@dataclass(frozen=True)
class ModelPlan:
    """What one sub-model takes.

    Attributes:
        pool: as it would run: batch, precision and share of a GPU are settled.
        rate: images or queries an actor encodes in a second; 0 where it cannot be measured here.
        candidate_bytes: of a candidate's features.
        query_bytes: of a query's features.
        pair_s: seconds a pair of query and candidate takes to score, on one CPU or GPU.
        listed_s: the same with the search of the first candidates of a shortlist.
        features_left: share of its features that the store lacks.
        scores_left: share of its scores that the store lacks.
    """

    pool: ModelConfig
    rate: float
    candidate_bytes: int
    query_bytes: int
    pair_s: float
    listed_s: float
    features_left: float = 1.0
    scores_left: float = 1.0

    @property
    def is_there(self) -> bool:
        """Whether the store has all of it."""
        return not self.features_left and not self.scores_left


@dataclass(frozen=True)
class Plan:
    """What a precompute would take. Bytes and seconds are of what the store lacks.

    Attributes:
        config: the job, as an existing store goes on with it.
        images: candidates.
        queries: of the data set.
        references: distinct images of the queries, which are decoded once more.
        cpus: of the cluster.
        gpus: of the cluster.
        decode_s: seconds an image takes to decode on one CPU.
        models: of the job.
        free_bytes: where the store lies; None where nobody can know.
        unpacked_bytes: of images that are unpacked beside the tiles.
        blocks: of the job in a store that exists; 0 where there is none.
        blocks_there: of these, finished.
    """

    config: PrecomputeConfig
    images: int
    queries: int
    references: int
    cpus: float
    gpus: float
    decode_s: float
    models: tuple[ModelPlan, ...]
    free_bytes: int | None
    unpacked_bytes: int = 0
    blocks: int = 0
    blocks_there: int = 0

    @property
    def pairs(self) -> int:
        """Queries times candidates, of one model."""
        return self.images * self.queries

    @property
    def feature_bytes(self) -> int:
        """Of the features of all models."""
        return sum(map(self._features_of, self.models))

    def _features_of(self, model: ModelPlan) -> int:
        whole = self.images * model.candidate_bytes + self.queries * model.query_bytes
        return round(whole * model.features_left)

    @property
    def tile_bytes(self) -> int:
        """Of the scores of every query and candidate under all models."""
        each = self.pairs * np.dtype(self.config.score_type).itemsize
        return round(each * sum(model.scores_left for model in self.models))

    def shortlist_bytes(self, k: int) -> int:
        """At most, of shortlists: models agree on many candidates."""
        width = min(self.images, k * len(self.models)) + 1
        scores = len(self.models) * np.dtype(self.config.score_type).itemsize
        return self.queries * width * (scores + 8)

    @property
    def score_bytes(self) -> int:
        """Of the scores that are kept."""
        k = self.config.shortlist
        if not k:
            return self.tile_bytes
        return round(self.shortlist_bytes(k) * max(model.scores_left for model in self.models))

    @property
    def store_bytes(self) -> int:
        """Of all that is written."""
        return self.feature_bytes + self.score_bytes + self.unpacked_bytes

    @property
    def stages(self) -> dict[str, float]:
        """What works at the same time while features are made -> seconds; the longest is what the
        job waits for.
        """
        decoders = max(1, int(self.cpus / CPUS_A_DECODER))
        # A block is decoded once for all models that lack it.
        share = max(model.features_left for model in self.models)
        on_cpus = (self.images + self.references) * share * self.decode_s
        found = {"decoding": on_cpus / decoders}
        for model in self.models:
            items = (self.images + self.queries) * model.features_left
            if model.rate:
                found[f"encoding with {model.pool.name}"] = items / model.rate / model.pool.actors
                on_cpus += 0 if model.pool.num_gpus else items / model.rate
        found["the CPUs together"] = on_cpus / max(self.cpus, 1)
        return found

    @property
    def encode_s(self) -> float:
        """Seconds until all features are made."""
        return max(self.stages.values())

    @property
    def score_s(self) -> float:
        """Seconds until all scores are made."""
        each = [
            (model.listed_s if self.config.shortlist else model.pair_s) * model.scores_left
            for model in self.models
        ]
        gpus = self.config.scoring_gpus
        at_once = min(self.cpus, self.gpus / gpus) if gpus else self.cpus
        return self.pairs * sum(each) / max(at_once, 1)

    @property
    def limit(self) -> str:
        """What the job waits for most, in words."""
        stages = {**self.stages, "scoring": self.score_s}
        longest = max(stages, key=lambda stage: stages[stage])
        return f"{longest} ({duration(stages[longest])})"

    @property
    def advice(self) -> list[str]:
        """What to change before the job is started."""
        found = []
        free = self.free_bytes
        if free is not None and self.store_bytes > free:
            found.append(
                f"It does not fit: {amount(self.store_bytes)} are needed and {amount(free)} are "
                f"free at {shown(self.config.store)}."
            )
        all_scores = self.tile_bytes > max(LARGE_BYTES, 2 * self.feature_bytes)
        if not self.config.shortlist and (all_scores or self._shortlists_fit):
            small, features = self.shortlist_bytes(COMPACT), self.feature_bytes
            times = f", {self.tile_bytes / features:,.0f} times the features" if features else ""
            elsewhere = " and another store" if self.blocks else ""
            found.append(
                f"Scores of every query and candidate make no sense here ({amount(self.tile_bytes)}"
                f"{times}). Set shortlist: {COMPACT}{elsewhere}, which keeps at most "
                f"{amount(small)} (docs/scale.md)."
            )
        unmeasured = [m.pool.name for m in self.models if not m.rate and not m.is_there]
        if unmeasured:
            found.append(
                f"{', '.join(unmeasured)} cannot be measured before the job (another process "
                "encodes); their time and features are not in the sums."
            )
        return found

    @property
    def _shortlists_fit(self) -> bool:
        """Whether all scores are too much for the disk, and shortlists would be much less."""
        free, small = self.free_bytes, self.shortlist_bytes(COMPACT)
        if free is None or self.store_bytes <= free or 2 * small >= self.tile_bytes:
            return False
        return self.store_bytes - self.tile_bytes + small <= free

    def lines(self) -> list[str]:
        """For people."""
        header = ("model", "actors", "on", "batch", "precision", "items/s", "features")
        rows = [
            (
                model.pool.name,
                str(model.pool.actors),
                f"{float(model.pool.num_gpus):g} GPU" if model.pool.num_gpus else "CPU",
                str(model.pool.batch),
                model.pool.precision,
                f"{model.rate * model.pool.actors:,.1f}" if model.rate else "-",
                amount(self._features_of(model)),
            )
            for model in self.models
        ]
        k = self.config.shortlist
        kind = (
            f"shortlists of the first {k} of each model, at most {amount(self.score_bytes)}"
            if k
            else f"scores of every query and candidate, {amount(self.score_bytes)}"
        )
        images = f"images    unpacked, {amount(self.unpacked_bytes)}, once; its time is in no sum"
        free = "" if self.free_bytes is None else f" ({amount(self.free_bytes)} free)"
        there = f"; {self.blocks_there:,} of {self.blocks:,} blocks are there"
        more = " more" if self.blocks else ""
        return [
            f"{self.images:,} images, {self.queries:,} queries with {self.references:,} reference "
            f"images, {len(self.models)} models; {self.cpus:g} CPUs, {self.gpus:g} GPUs",
            "",
            markdown_table(header, rows, words=1),
            "",
            f"features  {amount(self.feature_bytes)}, in about {duration(self.encode_s)} "
            f"(an image is decoded in {1000 * self.decode_s:.1f} ms)",
            f"scores    {kind}, in about {duration(self.score_s)}",
            *([images] if self.unpacked_bytes else []),
            f"store     {amount(self.store_bytes)}{more} at {shown(self.config.store)}{free}"
            f"{there if self.blocks else ''}",
            "in all    nothing is left to do"
            if all(model.is_there for model in self.models)
            else f"in all    about {duration(self.encode_s + self.score_s)}, and up to a minute "
            f"for Ray and the models to start; most of it waits for {self.limit}",
            *self.advice,
        ]


def amount(size: float) -> str:
    """Bytes, in words."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"
        size /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds, in words."""
    for unit, size in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"
