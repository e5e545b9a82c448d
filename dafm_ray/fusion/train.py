"""Training LightFusion on Ray Train: all folds in one fit, their queries shared by the workers.

Every worker maps the tiles it reads. Gradients and losses of all networks are summed in one
exchange a step, so one worker or many follow the same curve. A run of the same folder goes on
after its last epoch.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dafm_ray.config import FusionConfig, parse_config
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.evaluation.metrics import Ints
from dafm_ray.fusion.artefact import (
    WHOLE,
    Artefact,
    Description,
    Static,
    TrainedOn,
    is_artefact,
    load_artefact,
)
from dafm_ray.fusion.bank import NEEDS_ALL, own_bank
from dafm_ray.fusion.convex import search_folds, search_strengths
from dafm_ray.fusion.fit import Member, Share, fit, members_of
from dafm_ray.fusion.folds import NOBODY, grouped_folds
from dafm_ray.fusion.inputs import Channels, Inputs
from dafm_ray.fusion.lightfusion import LightFusion, Shape
from dafm_ray.fusion.rank import masked_scores
from dafm_ray.fusion.reference import References
from dafm_ray.fusion.stacking import has_seen
from dafm_ray.fusion.temperature import in_score_units
from dafm_ray.runs import claimed, refuse_larger, run_workers, write_status
from dafm_ray.session import ensure_ray
from dafm_ray.storage import Storage, open_storage, results
from dafm_ray.tiles.store import TileStore
from dafm_ray.uris import shown

_MACHINE = frozenset({"workers", "use_gpu", "out", "cases", "validation"})
"""Keys that may change between two starts of one run."""


@dataclass(frozen=True)
class Plan:
    """What is worked out once, before the workers start.

    Attributes:
        models: of the networks.
        convex: for each fold held out, and `NOBODY`.
        tau: where tau starts, in units of the normalised scores.
    """

    models: tuple[str, ...]
    convex: tuple[Static, ...]
    tau: float


def train_fusion(config: FusionConfig) -> str:
    """Train on Ray Train, unless it is done; returns the path or URI of the artefact, `config.out`.

    Raises:
        ConfigError: keys that contradict each other, or tau cannot go on, see `Temperature`.
        DataError: a store is incomplete or damaged, the stores hold other models, or no query has
            a target.
        MachineError: another run writes there.
    """
    # Relative paths of the configuration stay relative to where the job was started.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    stores = open_stores(config)
    refuse_banks(config, stores)
    out = open_storage(config.out)
    ensure_ray()
    refuse_larger(config.workers, 1, config.use_gpu)
    with claimed(out, config, _MACHINE):
        if not is_artefact(out.uri):
            _train(config, stores, out)
        elif load_artefact(out.uri).about.stores != _trained_on(stores):
            raise ConfigError(
                f"{shown(out.uri)} holds a fusion of other scores than {', '.join(config.stores)} "
                "hold now; choose another `out`, or delete that folder"
            )
    return out.uri


def _train(config: FusionConfig, stores: Sequence[TileStore], out: Storage) -> None:
    plan = prepare(config, stores)
    absolute = replace(config, out=out.uri, store=tuple(store.uri for store in stores))
    checkpoint = run_workers(
        _worker,
        {"config": asdict(absolute), "plan": asdict(plan)},
        out,
        config.recipe.epochs,
        config.workers,
        1,
        config.use_gpu,
        "fuse",
    )
    with checkpoint.as_directory() as folder:
        states = torch.load(Path(folder) / "state.pt", weights_only=True)["members"]
    members = build(config, plan)
    for member, state in zip(members, states, strict=True):
        member.finish(state)
    with results(out.uri, WHOLE) as root:
        artefact_of(config, stores, plan, members).save(root, traces_of(members))


def refuse_banks(config: FusionConfig, stores: Sequence[TileStore]) -> None:
    """ConfigError if a fusion corrects hubs, which a shortlist does not show."""
    for store in stores:
        if config.bank_t or config.profiles:
            store.refuse_shortlist(NEEDS_ALL)


def open_stores(config: FusionConfig) -> list[TileStore]:
    """The stores to learn from, with the models that are asked for.

    Raises:
        ConfigError: a model that is not in a store.
        DataError: incomplete stores, or stores with other models.
    """
    stores = [TileStore(uri) for uri in config.stores]
    if config.models:
        stores = [store.of(config.models) for store in stores]
    for store in stores:
        store.refuse_incomplete()
        if store.models != stores[0].models or store.manifest.protocol != (
            stores[0].manifest.protocol
        ):
            raise DataError(
                f"{store.uri} holds {', '.join(store.models)} under protocol "
                f"{store.manifest.protocol}; {stores[0].uri} holds {', '.join(stores[0].models)} "
                f"under {stores[0].manifest.protocol}. One fusion needs the same of all"
            )
        References(store, config.references).refuse_absent()
        for key, asked in (
            ("references", config.references),
            ("sees_reference", config.sees_reference),
            ("network.order: file", config.network.order == "file"),
            ("recipe.tau_unit: raw", config.recipe.tau_unit == "raw"),
        ):
            if asked:
                store.refuse_shortlist(key)
    learned = {(s.manifest.gallery_digest, q.id) for s in stores for q in s.queries}
    for uri in config.validation_stores:
        other = TileStore(uri)
        other.refuse_incomplete()
        shared = {(other.manifest.gallery_digest, q.id) for q in other.queries} & learned
        if shared and config.protocol == "train->val":
            raise DataError(
                f"validation: {uri} holds {len(shared)} queries that the fusion would learn from; "
                "numbers on them would be a leak"
            )
    return stores


def prepare(
    config: FusionConfig, stores: Sequence[TileStore], known: tuple[Static, ...] = ()
) -> Plan:
    """What is worked out before the fit: convex weights, unless they are known, and tau."""
    tau = config.recipe.tau
    if config.recipe.tau_unit == "raw" and config.normalisation != "none":
        tau = in_score_units(tau, mean_deviation(stores))
    return Plan(stores[0].models, known or statics(config, stores), tau)


def statics(config: FusionConfig, stores: Sequence[TileStore]) -> tuple[Static, ...]:
    """Convex weights and the strength of their bank, for each fold held out and for new queries."""
    folds = folds_of(config, stores)
    held_out = [*_held_out(config), NOBODY] if _held_out(config) != [NOBODY] else [NOBODY]
    convex = search_folds(stores, folds, held_out)
    strengths = [0.0] * len(convex)
    if config.bank_t:
        banks = [
            own_bank(store, fold_of_Q, config.bank_t, config.profiles)
            for store, fold_of_Q in zip(stores, folds, strict=True)
        ]
        strengths = search_strengths(stores, banks, convex, held_out)
    return tuple(
        Static(fold, found.weights, strength)
        for fold, found, strength in zip(held_out, convex, strengths, strict=True)
    )


def folds_of(config: FusionConfig, stores: Sequence[TileStore]) -> list[Ints]:
    """Fold of each query, store by store; a group is not split between stores either."""
    queries = [query for store in stores for query in store.queries]
    fold_of = grouped_folds(queries, config.folds, config.seed)
    ends = np.cumsum([store.size("queries") for store in stores])
    return np.split(fold_of, ends[:-1])


def mean_deviation(stores: Sequence[TileStore]) -> float:
    """Mean over queries and models of the standard deviation of a query's raw scores."""
    total, count = 0.0, 0
    for store in stores:
        for chunk in masked_scores(store):
            with np.errstate(invalid="ignore"):
                scored_MB = ~np.isnan(chunk.scores_MBN).all(axis=-1)
                deviations = np.nanstd(chunk.scores_MBN[scored_MB], axis=-1)
            total, count = total + float(deviations.sum()), count + deviations.size
    return total / max(count, 1)


def _held_out(config: FusionConfig) -> list[int]:
    return list(range(config.folds)) if config.protocol == "out-of-fold" else [NOBODY]


def _members(config: FusionConfig) -> list[tuple[int, int]]:
    """(fold held out, seed) of each network."""
    return [(fold, config.seed + n) for fold in _held_out(config) for n in range(config.seeds)]


def build(config: FusionConfig, plan: Plan) -> list[Member]:
    """The networks of all folds in their starting state."""
    channels = _channels(config, plan.models)
    by_fold = {static.held_out: static for static in plan.convex}
    networks = []
    for fold, seed in _members(config):
        shape = Shape(plan.models, channels.extras, **asdict(config.network), seed=seed)
        start = None
        if config.start == "convex":
            static = by_fold[fold]
            weights = [static.weights[name] for name in plan.models]
            hubs = [-static.strength * weight for weight in weights] if config.bank_t else []
            start = [*weights, *hubs, *[0.0] * (len(channels.extras) - len(hubs))]
        networks.append((LightFusion(shape, start), fold, seed))
    return members_of(networks, config.recipe, plan.tau)


def _channels(config: FusionConfig, models: tuple[str, ...]) -> Channels:
    return Channels(
        models, config.normalisation, bool(config.bank_t), config.profiles, config.references
    )


def open_inputs(config: FusionConfig, stores: Sequence[TileStore]) -> list[Inputs]:
    """What the networks read, store by store."""
    found = []
    for store, fold_of_Q in zip(stores, folds_of(config, stores), strict=True):
        bank = None
        if config.bank_t:
            bank = own_bank(store, fold_of_Q, config.bank_t, config.profiles)
        channels = _channels(config, store.models)
        found.append(Inputs(store, channels, bank, config.sees_reference))
    return found


def artefact_of(
    config: FusionConfig, stores: Sequence[TileStore], plan: Plan, members: Sequence[Member]
) -> Artefact:
    """Fitted networks as an artefact."""
    about = Description(
        models=plan.models,
        normalisation=config.normalisation,
        bank_t=config.bank_t,
        profiles=config.profiles,
        references=config.references,
        sees_reference=config.sees_reference,
        network=config.network,
        members=tuple((member.held_out, member.seed) for member in members),
        new_queries=config.new_queries,
        folds=config.folds,
        seed=config.seed,
        convex=plan.convex,
        stores=_trained_on(stores),
        protocol=config.protocol,
        label=stores[0].manifest.protocol,
        mode=config.recipe.temperature,
        model_dropout=config.recipe.model_dropout,
        stacked=tuple(
            name for name in plan.models if any(has_seen(store, name) for store in stores)
        ),
    )
    fold_of = tuple(
        {query.id: int(fold) for query, fold in zip(store.queries, folds, strict=True)}
        for store, folds in zip(stores, folds_of(config, stores), strict=True)
    )
    return Artefact(about, tuple(member.network for member in members), fold_of)


def traces_of(members: Sequence[Member]) -> list[list[tuple[float, float]]]:
    """(loss, tau) of every step, network by network."""
    return [member.temperature.trace for member in members]


def _trained_on(stores: Sequence[TileStore]) -> tuple[TrainedOn, ...]:
    return tuple(
        TrainedOn(
            store.manifest.title,
            store.manifest.gallery_digest,
            store.manifest.queries_digest,
            {name: store.manifest.models[name] for name in store.models},
        )
        for store in stores
    )


def _worker(values: dict[str, Any]) -> None:
    """The function Ray Train runs in every worker."""
    import ray.train
    import ray.train.torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    config = parse_config(FusionConfig, values["config"], "train_loop_config")
    plan = parse_config(Plan, values["plan"], "train_loop_config")
    context = ray.train.get_context()
    device = str(ray.train.torch.get_device())
    stores = open_stores(config)
    members = build(config, plan)
    for member in members:
        member.network.to(device)
    first_epoch = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", weights_only=True, map_location=device)
        first_epoch = state["epoch"]
        for member, kept in zip(members, state["members"], strict=True):
            member.restore(kept)

    def add_up(flat: torch.Tensor) -> None:
        moved = flat.to(device)
        dist.all_reduce(moved)
        flat.copy_(moved)

    def after_epoch(epoch: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if context.get_world_rank() == 0:
                state = {"epoch": epoch, "members": [member.state() for member in members]}
                torch.save(state, Path(folder) / "state.pt")
                saved = ray.train.Checkpoint.from_directory(folder)
                write_status(config.out, "fuse", epoch, config.recipe.epochs)
            ray.train.report({"epoch": epoch}, checkpoint=saved)

    if first_epoch == 0:
        after_epoch(0)
    processes = context.get_world_size()
    share = Share(context.get_world_rank(), processes, add_up, device)
    inputs = open_inputs(config, stores)
    folds = folds_of(config, stores)
    fit(members, inputs, folds, config.recipe, share, after_epoch, first_epoch)
