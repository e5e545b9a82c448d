"""One setting of a study: fit or build the fusion, and measure it on the queries that decide."""

import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dafm_ray.config import FOLDS, FusionConfig, StudyConfig, parse_config
from dafm_ray.errors import ConfigError, DafmError, DataError
from dafm_ray.evaluation.metrics import Floats, Ints, Scores
from dafm_ray.evaluation.protocols import protocol
from dafm_ray.evaluation.significance import Resampling
from dafm_ray.evaluation.summary import Summary, SystemRanks
from dafm_ray.fusion.artefact import Static
from dafm_ray.fusion.bank import Banked, banked_convex, own_bank
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.candidates import moments_of
from dafm_ray.fusion.fit import Member, Share, fit, members_of
from dafm_ray.fusion.folds import bank_folds, grouped_folds
from dafm_ray.fusion.lightfusion import grown
from dafm_ray.fusion.rank import rank_systems
from dafm_ray.fusion.static import Convex, static_fusion
from dafm_ray.fusion.study import CONVEX, GROW, Setting, name_of, static_setting
from dafm_ray.fusion.train import (
    artefact_of,
    build,
    folds_of,
    open_inputs,
    open_stores,
    prepare,
    statics,
    traces_of,
)
from dafm_ray.progress import progress
from dafm_ray.storage import Storage
from dafm_ray.tiles.forward import device_of
from dafm_ray.tiles.store import TileStore

TRIALS = "trials"
RECORD = "record.json"
FUSION = "fusion"
VALUES = "values.parquet"

Report = Callable[[float], None]


@dataclass(frozen=True)
class Trial:
    """What came of one setting.

    Attributes:
        name: of the setting.
        setting: what was tried.
        score: the study's metric, in percent, on the queries that decide.
        ci95: its interval.
        metrics: metric -> percent, on these queries.
        reported: the same on the validation store; empty where a choice is still to be made.
        steps: of a fusion that was grown: metrics after each model.
        seconds: that it took.
        stopped: given up early, with the numbers it had then.
        failure: why it came to nothing.
    """

    name: str
    setting: Setting
    score: float = 0.0
    ci95: tuple[float, float] = (0.0, 0.0)
    metrics: dict[str, float] | None = None
    reported: dict[str, float] | None = None
    steps: tuple[dict[str, float], ...] = ()
    seconds: float = 0.0
    stopped: bool = False
    failure: str = ""

    def write(self, storage: Storage) -> None:
        """Record it; a trial without a record is tried again."""
        line = json.dumps(asdict(self), indent=1) + "\n"
        storage.write(f"{TRIALS}/{self.name}/{RECORD}", pa.py_buffer(line.encode()))


def recorded(storage: Storage) -> dict[str, Trial]:
    """Name -> every trial that was brought to its end."""
    found = {}
    for path in storage.list(TRIALS):
        folder, _, name = path.rpartition("/")
        if name == RECORD and (trial := record_of(storage, folder.rpartition("/")[2])):
            found[trial.name] = trial
    return found


def record_of(storage: Storage, name: str) -> Trial | None:
    """One trial, if it was brought to its end."""
    path = f"{TRIALS}/{name}/{RECORD}"
    try:
        values = json.loads(storage.read(path).to_pybytes())
    except FileNotFoundError:
        return None
    return parse_config(Trial, values, path)


def run_trial(
    study: StudyConfig, setting: Setting, storage: Storage, report: Report = lambda score: None
) -> Trial:
    """Try a setting and record what came of it; a user's mistake is recorded too.

    Args:
        study: that the setting belongs to.
        setting: one of its.
        storage: of the study.
        report: receives the score so far, epoch by epoch, where a study stops early, and at the
            end.
    """
    started = time.perf_counter()
    trial = Trial(name_of(setting), setting)
    try:
        if study.kind == "static":
            trial = _static(study, trial, storage)
        elif GROW in setting:
            trial = _grown(study, trial)
        else:
            trial = _networks(study, trial, storage, report)
    except DafmError as error:
        trial = replace(trial, failure=str(error))
    trial = replace(trial, seconds=round(time.perf_counter() - started, 3))
    trial.write(storage)
    report(trial.score)
    return trial


class Split(NamedTuple):
    """Which labels a study keeps from its trials: the last `kept` of its folds, the same for every
    trial, whatever folds that has itself.
    """

    folds: int
    seed: int
    kept: int

    @staticmethod
    def of(study: StudyConfig) -> "Split":
        """Subsets, orders and static fusions are not chosen between on one half, so nothing is
        kept from them; nor where the choice is reported on a validation store.
        """
        keeps = study.kind == "networks" and not study.base.validation_stores
        return Split(study.base.folds, study.base.seed, study.report_folds if keeps else 0)

    def halves(self, stores: Sequence[TileStore]) -> tuple[list[TileStore], list[TileStore]]:
        """The stores without these labels, and with these alone."""
        queries = [query for store in stores for query in store.queries]
        is_kept = grouped_folds(queries, self.folds, self.seed) >= self.folds - self.kept
        ends = np.cumsum([store.size("queries") for store in stores])[:-1]
        parts = list(zip(stores, np.split(is_kept, ends), strict=True))
        return (
            [store.hiding(np.flatnonzero(kept_Q)) for store, kept_Q in parts],
            [store.hiding(np.flatnonzero(~kept_Q)) for store, kept_Q in parts],
        )


def deciding(study: StudyConfig, config: FusionConfig) -> list[TileStore]:
    """The stores that a trial learns and is measured on."""
    return Split.of(study).halves(open_stores(config))[0]


def reporting(study: StudyConfig, config: FusionConfig) -> list[TileStore]:
    """The stores that a choice is reported on: other queries, or those that decided nothing."""
    stores = [TileStore(uri) for uri in study.base.validation_stores]
    if stores:
        return [store.of(config.models) if config.models else store for store in stores]
    return Split.of(study).halves(open_stores(config))[1]


def summary_of(systems: Sequence[Fusion], stores: Sequence[TileStore]) -> Summary:
    """The numbers of one system, given for each store; see `summaries_of`."""
    return summaries_of([[system] for system in systems], stores)[0]


def summaries_of(made: Sequence[Sequence[Fusion]], stores: Sequence[TileStore]) -> list[Summary]:
    """The numbers of several systems over the labelled queries of all stores, in one pass.

    Args:
        made: them, for each store.
        stores: complete tiles.

    Raises:
        DataError: no query has a target.
    """
    rules = protocol(stores[0].manifest.protocol)
    queries = [query for store in stores for query in store.queries]
    labelled = np.flatnonzero([bool(query.targets) for query in queries])
    if not len(labelled):
        raise DataError(f"{stores[0].uri}: no query has a target, so there is nothing to count")
    with progress("evaluate", len(queries), unit="query") as shown:
        parts = [
            rank_systems(store, systems, rules, shown)
            for store, systems in zip(stores, made, strict=True)
        ]
    categories = [queries[q].category for q in labelled]
    ranked = [SystemRanks.concatenate(same).select(labelled) for same in zip(*parts, strict=True)]
    return [Summary(ranks, rules, categories) for ranks in ranked]


@dataclass(frozen=True)
class Chance:
    """No model: all candidates tie, and stand in the stored order, which is arbitrary."""

    name: str = "chance"
    kind: str = "static"

    def __call__(self, scores_MBN: Scores, rows_B: Ints) -> Scores:
        """0 for every candidate that a model scored."""
        absent_BN = np.isnan(scores_MBN).all(axis=0)
        chance_BN: Scores = np.where(absent_BN, np.float32(np.nan), np.float32(0))
        return chance_BN


def percents(summary: Summary) -> dict[str, float]:
    """Metric -> percent."""
    return {metric: round(summary.percent(metric), 4) for metric in summary.values}


def _measured(
    study: StudyConfig, trial: Trial, stores: Sequence[TileStore], summary: Summary
) -> Trial:
    labelled = [q for store in stores for q in store.queries if q.targets]
    groups = [query.fold_group for query in labelled]
    resampling = Resampling(groups, summary.strata, study.seed)
    return replace(
        trial,
        score=round(summary.percent(study.metric), 6),
        ci95=resampling.interval(summary.values[study.metric]),
        metrics=percents(summary),
    )


def _networks(study: StudyConfig, trial: Trial, storage: Storage, report: Report) -> Trial:
    config = _out_of_fold(study.with_setting(trial.setting))
    stores = deciding(study, config)
    plan = prepare(config, stores, _known_statics(study, config))
    members = build(config, plan)

    def systems() -> list[Fusion]:
        artefact = artefact_of(config, stores, plan, members)
        return [artefact.on(store).learned for store in stores]

    def after_epoch(epoch: int) -> None:
        if study.stop_early and epoch < config.recipe.epochs:
            with _on(members, "cpu"):
                report(summary_of(systems(), stores).percent(study.metric))

    _fit(study, config, stores, members, after_epoch)
    artefact = artefact_of(config, stores, plan, members)
    with tempfile.TemporaryDirectory() as folder:
        artefact.save(Path(folder), traces_of(members))
        for file in sorted(Path(folder).iterdir()):
            path = f"{TRIALS}/{trial.name}/{FUSION}/{file.name}"
            storage.write(path, pa.py_buffer(file.read_bytes()))
    trial = _measured(study, trial, stores, summary_of(systems(), stores))
    if study.kind == "orders" and study.base.validation_stores:
        others = reporting(study, config)
        learned = [artefact.on(store).learned for store in others]
        trial = replace(trial, reported=percents(summary_of(learned, others)))
    return trial


def _grown(study: StudyConfig, trial: Trial) -> Trial:
    """A fusion that is trained, given one more model, trained on, and so forth."""
    order = trial.setting[GROW]
    smaller: list[Member] = []
    steps, reported = [], []
    for count in range(1, len(order) + 1):
        config = _out_of_fold(study.with_setting({"models": sorted(order[:count])}))
        stores = deciding(study, config)
        plan = prepare(config, stores, _known_statics(study, config))
        members = build(config, plan)
        if smaller:
            networks = [
                (grown(before.network, after.network.shape), after.held_out, after.seed)
                for before, after in zip(smaller, members, strict=True)
            ]
            members = members_of(networks, config.recipe, plan.tau)
        _fit(study, config, stores, members)
        artefact = artefact_of(config, stores, plan, members)
        summary = summary_of([artefact.on(store).learned for store in stores], stores)
        steps.append(percents(summary))
        if study.base.validation_stores:
            others = reporting(study, config)
            learned = [artefact.on(store).learned for store in others]
            reported.append(percents(summary_of(learned, others)))
        smaller = members
    trial = _measured(study, trial, stores, summary)
    return replace(
        trial, steps=tuple(reported or steps), reported=reported[-1] if reported else None
    )


def _fit(
    study: StudyConfig,
    config: FusionConfig,
    stores: Sequence[TileStore],
    members: Sequence[Member],
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    device = device_of(study.gpus)
    inputs, folds = open_inputs(config, stores), folds_of(config, stores)
    with _on(members, device):
        fit(members, inputs, folds, config.recipe, Share(device=device), after_epoch)


@contextmanager
def _on(members: Sequence[Member], device: str) -> Iterator[None]:
    """The networks on a device, and afterwards where they were."""
    before = members[0].parameters[0].device
    for member in members:
        member.network.to(device)
    yield
    for member in members:
        member.network.to(before)


def _out_of_fold(config: FusionConfig) -> FusionConfig:
    return replace(config, protocol="out-of-fold", validation=())


def _known_statics(study: StudyConfig, config: FusionConfig) -> tuple[Static, ...]:
    """The convex weights of a configuration, searched once a process for all trials that share
    them.
    """
    read = FusionConfig(
        config.store,
        "",
        models=config.models,
        folds=config.folds,
        bank_t=config.bank_t,
        profiles=config.profiles,
        seed=config.seed,
    )
    return _statics(read, Split.of(study))


@functools.lru_cache(maxsize=64)
def _statics(config: FusionConfig, split: Split) -> tuple[Static, ...]:
    return statics(config, split.halves(open_stores(config))[0])


def _static(study: StudyConfig, trial: Trial, storage: Storage) -> Trial:
    """Rank with a static fusion; the value of every query is kept, for a choice out of fold."""
    stores = open_stores(_out_of_fold(study.base))
    summary = summary_of([static_system(store, trial.setting) for store in stores], stores)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({study.metric: summary.values[study.metric]}), sink)
    storage.write(f"{TRIALS}/{trial.name}/{VALUES}", sink.getvalue())
    return _measured(study, trial, stores, summary)


def values_of(study: StudyConfig, trial: Trial, storage: Storage) -> Floats:
    """(labelled queries,) values of the metric under a static setting."""
    table = pq.read_table(pa.BufferReader(storage.read(f"{TRIALS}/{trial.name}/{VALUES}")))
    values: Floats = table[study.metric].to_numpy()
    return values


def static_system(store: TileStore, setting: Setting) -> Fusion:
    """The static fusion of a setting.

    Raises:
        ConfigError: no such system, or a weight for a model that the store does not hold.
    """
    chosen = static_setting(setting)
    system = _plain(store, chosen.system, chosen.weights, chosen.k)
    if not chosen.strength:
        return system
    bank = own_bank(store, bank_folds(store.queries, FOLDS, 0), chosen.bank_t)
    if isinstance(system, Convex):
        return banked_convex(system, bank, chosen.strength)
    return Banked(system, bank, chosen.strength)


def _plain(store: TileStore, name: str, weights: Mapping[str, float], k: float) -> Fusion:
    for model in weights:
        if model not in store.models:
            raise ConfigError(
                f"weights: {store.uri} does not hold {model!r}; it holds {', '.join(store.models)}"
            )
    if name == CONVEX:
        total = sum(weights.values())
        if not total:
            raise ConfigError("convex needs weights above 0")
        shares = {model: weights.get(model, 0.0) / total for model in store.models}
        return Convex(shares, "a study", moments=moments_of(store))
    return static_fusion(name, k, moments_of(store))
