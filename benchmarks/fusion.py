"""P3, P4 and P9: training and ranking with LightFusion at the size of CIRR's train split."""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import most_memory, seconds
from dafm_ray.config import FusionConfig, NegativesConfig, Recipe
from dafm_ray.datasets.base import Dataset, Gallery, Query
from dafm_ray.fusion.fit import fit, members_of
from dafm_ray.fusion.folds import NOBODY
from dafm_ray.fusion.inputs import Channels, Inputs
from dafm_ray.fusion.learned import Learned
from dafm_ray.fusion.lightfusion import LightFusion, Shape
from dafm_ray.fusion.rank import top_candidates
from dafm_ray.fusion.train import build, folds_of, open_inputs, open_stores, prepare
from dafm_ray.tiles.manifest import Grid, ModelEntry
from dafm_ray.tiles.store import TileStore, score_key

MODELS = ("a", "b", "c", "d")
CANDIDATES, BATCH, WIDTH = 16_939, 512, 32
LITERAL_QUERIES, LITERAL_STEPS = 64, 20
"""A literal step of 512 queries takes a quarter of a minute; its cost grows with the queries."""

RANKED, TOP, RANKINGS = 20_000, 50, 200
TRAINED = 28_225


class _NoImages:
    def open(self, locator: str) -> None:
        raise FileNotFoundError(locator)


@contextmanager
def scores(queries: int, candidates: int, labelled: int | None = None) -> Iterator[TileStore]:
    """A store of random float16 scores of four models; all queries or some have a target."""
    ids = [f"{n}" for n in range(candidates)]
    rng = np.random.default_rng(0)
    pairs = rng.integers(candidates, size=(queries, 2)).tolist()
    asked = tuple(
        Query(
            id=f"q{q}",
            reference=ids[a],
            captions=("",),
            targets=(ids[b],) if labelled is None or q < labelled else (),
            excluded=(ids[a],) if a != b else (),
            fold_group=ids[a],
        )
        for q, (a, b) in enumerate(pairs)
    )
    gallery = Gallery.from_source({id: id for id in ids})
    dataset = Dataset("bench", "train", "cirr", "mask", gallery, asked, _NoImages())  # type: ignore[arg-type]
    spec = {"name": "bench", "split": "train", "root": ""}
    entries = {name: ModelEntry(f"test:{name}@random", name) for name in MODELS}
    with tempfile.TemporaryDirectory() as folder:
        store = TileStore.create(folder, dataset, spec, entries, Grid(64, 512, 32768), "float16")
        for m, name in enumerate(MODELS):
            for block, rows in enumerate(store.tile_rows):
                made = np.random.default_rng((m, block)).standard_normal(
                    (len(rows), candidates), dtype=np.float32
                )
                store.write(score_key(name, block, 0), made.astype(np.float16))
        yield store


class Literal(nn.Module):
    """The paper's block and head, convolution by convolution."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        models, padding = len(MODELS), kernel // 2
        self.block = nn.Sequential(
            nn.Conv1d(models, WIDTH, 1),
            nn.ReLU(),
            nn.Conv1d(WIDTH, WIDTH, kernel, padding=padding, groups=WIDTH),
            nn.ReLU(),
            nn.Conv1d(WIDTH, models, 1),
        )
        self.head = nn.Conv1d(models, 1, 1)

    def forward(self, scores_BMN: Tensor) -> Tensor:
        """(B, M, N) -> (B, N)."""
        fused: Tensor = self.head(scores_BMN + self.block(scores_BMN))[:, 0]
        return fused


def _literal_step(kernel: int) -> float:
    """Seconds of a literal step of `BATCH` queries, its scores at hand."""
    network = Literal(kernel)
    optimiser = torch.optim.AdamW(network.parameters())
    scores_BMN = torch.randn(LITERAL_QUERIES, len(MODELS), CANDIDATES)
    target_B = torch.zeros(LITERAL_QUERIES, dtype=torch.int64)

    def step() -> None:
        loss = nn.functional.cross_entropy(network(scores_BMN), target_B)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    step()
    times = [seconds(step) for _ in range(LITERAL_STEPS)]
    return statistics.median(times) * BATCH / LITERAL_QUERIES


def _our_step(kernel: int, negatives: NegativesConfig | None = None) -> float:
    """Seconds of our step, with reading and normalising its scores."""
    recipe = Recipe(
        "info_nce", epochs=1, batch=BATCH, negatives=negatives or NegativesConfig(), tau=1.0
    )
    with scores(BATCH, CANDIDATES) as store:
        inputs = Inputs(store, Channels(MODELS))
        network = LightFusion(Shape(MODELS, width=WIDTH, kernel=kernel))
        members = members_of([(network, NOBODY, 0)], recipe, 1.0)
        folds = [np.zeros(BATCH, dtype=np.int64)]
        times = [seconds(lambda: fit(members, [inputs], folds, recipe)) for _ in range(4)]
    return statistics.median(times[1:])


def _one_thread(measured: Callable[[], float]) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measured()
    finally:
        torch.set_num_threads(threads)


def train_collapsed() -> float:
    """P3, k = 1: a literal step over ours."""
    return _one_thread(lambda: _literal_step(1) / _our_step(1))


def train_filtered() -> float:
    """P3, k = 3: a literal step over ours, which also sorts the candidates."""
    return _one_thread(lambda: _literal_step(3) / _our_step(3))


def train_sampled() -> float:
    """P3, 200 best and 200 random negatives: a literal step over all candidates over ours."""
    return _one_thread(lambda: _literal_step(1) / _our_step(1, NegativesConfig(200, 200)))


def _rankings() -> tuple[list[float], list[float]]:
    """Seconds of single rankings, ours and literal, in turn."""
    rng = np.random.default_rng(0)
    with scores(1, RANKED) as store:
        learned = Learned(
            "lightfusion",
            {NOBODY: (LightFusion(Shape(MODELS, width=WIDTH)),)},
            Inputs(store, Channels(MODELS)),
            np.array([NOBODY]),
        )
        literal = Literal(1)
        rows = np.array([-1])
        ours, theirs = [], []
        for _ in range(RANKINGS):
            half = rng.standard_normal((len(MODELS), 1, RANKED)).astype(np.float16)

            def rank(half: np.ndarray = half) -> None:
                top_candidates(learned(half.astype(np.float32), rows), TOP)

            def rank_literally(half: np.ndarray = half) -> None:
                with torch.inference_mode():
                    given = torch.from_numpy(half).float().transpose(0, 1)
                    mean = given.mean(-1, keepdim=True)
                    literal((given - mean) / given.std(-1, keepdim=True)).sort(descending=True)

            ours.append(rank)
            theirs.append(rank_literally)
        # One after the other, as a search engine would: each with its own memory warm.
        return [seconds(rank) for rank in ours][5:], [seconds(rank) for rank in theirs][5:]


def rank_ratio() -> float:
    """P4: a literal ranking with a full sort over ours, medians."""

    def measured() -> float:
        ours, theirs = _rankings()
        return statistics.median(theirs) / statistics.median(ours)

    return _one_thread(measured)


def rank_slowest() -> float:
    """P4: milliseconds of the slowest ranking but 1 %."""
    return _one_thread(lambda: 1000 * float(np.percentile(_rankings()[0], 99)))


def memory() -> float:
    """P9: MB of anonymous memory that training adds beside the largest tile, at 28,225 queries.

    Bank, profiles, convex weights and steps of five folds; scores are mapped from disk. Few queries
    have a target, so that few steps are taken: memory does not grow after the first.
    """
    with scores(TRAINED, CANDIDATES, labelled=2 * BATCH) as store:
        recipe = Recipe(epochs=1, batch=BATCH)
        config = FusionConfig(store=store.uri, out=store.uri, recipe=recipe)
        with most_memory() as added:
            stores = open_stores(config)
            members = build(config, prepare(config, stores))
            fit(members, open_inputs(config, stores), folds_of(config, stores), recipe)
        return added[0] - tile_mb(store)


def tile_mb(store: TileStore) -> float:
    """The largest tile."""
    return store.manifest.grid.tile_queries * store.size("gallery") * 2 / 1e6
