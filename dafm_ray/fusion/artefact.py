"""A trained fusion as a folder, or a prefix of an object store, that ranks other stores.

fusion.safetensors   weights of every network
config.json          models in order, channels, protocol, folds, convex weights, metrics
folds.parquet        the queries that were trained on, and the fold of each
temperature.csv      network, step, loss, tau
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from dafm_ray.config import NetworkConfig, parse_config
from dafm_ray.errors import ConfigError, DataError, refusals
from dafm_ray.evaluation.metrics import Ints
from dafm_ray.files import replacing
from dafm_ray.fusion.bank import Bank, bank_of_others, banked_convex, own_bank
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.candidates import moments_of
from dafm_ray.fusion.folds import NOBODY, bank_folds
from dafm_ray.fusion.inputs import Channels, Inputs
from dafm_ray.fusion.learned import Learned, OutOfFold, mean_network
from dafm_ray.fusion.lightfusion import LightFusion, Shape
from dafm_ray.fusion.reference import References
from dafm_ray.fusion.static import Convex
from dafm_ray.storage import open_storage, results
from dafm_ray.tiles.manifest import ModelEntry
from dafm_ray.tiles.store import TileStore
from dafm_ray.uris import join, shown

FORMAT = 1
WEIGHTS, CONFIG, FOLDS, TRACE = (
    "fusion.safetensors",
    "config.json",
    "folds.parquet",
    "temperature.csv",
)
WHOLE = CONFIG
"""It is written last: a folder with one is whole."""


@dataclass(frozen=True)
class TrainedOn:
    """A store whose queries were learned from.

    Attributes:
        title: data set and split.
        gallery_digest: of its candidates.
        queries_digest: of its queries.
        models: name -> id and weights digest.
    """

    title: str
    gallery_digest: str
    queries_digest: str
    models: dict[str, ModelEntry]


@dataclass(frozen=True)
class Static:
    """The convex weights beside a network.

    Attributes:
        held_out: the fold they were searched without.
        weights: model -> weight.
        strength: of the bank.
    """

    held_out: int
    weights: dict[str, float]
    strength: float


@dataclass(frozen=True)
class Description:
    """What `config.json` holds.

    Attributes:
        models: in the order of the networks' channels.
        normalisation: of the scores of one query under one model.
        bank_t: 0 without a bank.
        profiles: each model has a channel of the similarity of profiles.
        references: models whose similarity of reference and candidate is a channel.
        sees_reference: the reference's own score stays at the input.
        network: size and kind.
        members: (fold held out, seed) of each network; -1 holds out none.
        new_queries: `scores` or `weights`.
        folds: how many.
        seed: of the folds.
        convex: weights for each fold held out, and for new queries.
        stores: what was learned from.
        protocol: `out-of-fold` or `train->val`.
        label: protocol of the stores, as `cirr`.
        mode: of the temperature.
        model_dropout: probability of a missing model in training.
        stacked: models whose weights say that they learned from the queries of a store.
        metrics: system -> metric -> percent, of the report made at the end of training.
    """

    models: tuple[str, ...]
    normalisation: str
    bank_t: float
    profiles: bool
    references: tuple[str, ...]
    sees_reference: bool
    network: NetworkConfig
    members: tuple[tuple[int, int], ...]
    new_queries: str
    folds: int
    seed: int
    convex: tuple[Static, ...]
    stores: tuple[TrainedOn, ...]
    protocol: str
    label: str
    mode: str
    model_dropout: float
    stacked: tuple[str, ...] = ()
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def channels(self) -> Channels:
        """Of the networks."""
        return Channels(
            self.models, self.normalisation, bool(self.bank_t), self.profiles, self.references
        )

    @property
    def doubts(self) -> tuple[str, ...]:
        """What lets a network see more than a ranking may depend on."""
        by_place = self.network.kernel > 1 and self.network.order != "rank"
        order = (f"order={self.network.order}",) if by_place else ()
        return (*order, "sees reference") if self.sees_reference else order

    @property
    def name(self) -> str:
        """What tables call it, with every doubt."""
        return f"lightfusion({', '.join(self.doubts)})" if self.doubts else "lightfusion"

    @property
    def convex_note(self) -> str:
        """The convex weights of new queries, and where they were searched."""
        [static] = [one for one in self.convex if one.held_out == NOBODY]
        shares = ", ".join(f"{name} {weight:.2f}" for name, weight in static.weights.items())
        bank = f"; strength of the bank {static.strength:g}" if self.bank_t else ""
        titles = " + ".join(store.title for store in self.stores)
        return f"Convex weights, searched on {titles}: {shares}{bank}."

    def shape(self, seed: int) -> Shape:
        """Of a network."""
        channels = self.channels
        return Shape(self.models, channels.extras, **asdict(self.network), seed=seed)


@dataclass(frozen=True)
class Artefact:
    """A trained fusion.

    Attributes:
        about: what it is.
        networks: in the order of `about.members`.
        fold_of: for each store of `about.stores`, query id -> fold.
    """

    about: Description
    networks: tuple[LightFusion, ...]
    fold_of: tuple[Mapping[str, int], ...]

    @property
    def new_networks(self) -> tuple[LightFusion, ...]:
        """What ranks queries that were not trained on."""
        averaged = self.about.new_queries == "weights" and len(self.networks) > 1
        return (mean_network(self.networks),) if averaged else self.networks

    def save(self, folder: Path, traces: Sequence[Sequence[tuple[float, float]]]) -> None:
        """Write the folder.

        Args:
            folder: made if it is not there.
            traces: (loss, tau) of every step, network by network.

        Raises:
            MachineError: it cannot be written.
        """
        tensors = {
            f"{n}.{key}": value.detach().cpu().contiguous()
            for n, network in enumerate(self.networks)
            for key, value in network.state_dict().items()
        }
        places = [
            (store, query, fold)
            for store, folds in enumerate(self.fold_of)
            for query, fold in folds.items()
        ]
        stores, queries, folds = zip(*places, strict=True)
        table = pa.table({"store": stores, "query": queries, "fold": folds})
        with refusals(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / WEIGHTS) as file:
                save_file(tensors, file)
            with replacing(folder / FOLDS) as file:
                pq.write_table(table, file)
            with replacing(folder / TRACE) as file, file.open("w", newline="") as stream:
                writer = csv.writer(stream, lineterminator="\n")
                writer.writerow(["network", "step", "loss", "tau"])
                for n, trace in enumerate(traces):
                    writer.writerows((n, step, *pair) for step, pair in enumerate(trace))
        write_description(folder, self.about)

    def on(self, store: TileStore, bank_source: TileStore | None = None) -> "Fitted":
        """The fusion, and the static ones it is judged by, as systems of a store.

        Args:
            store: complete tiles of its models, which are some or all of the fusion's.
            bank_source: other queries over the same gallery, of which a bank is made; by default
                the store's own queries, each without its fold.

        Raises:
            DataError: none of the fusion's models is there, other weights, or its queries were
                learned from without holding them out.
        """
        about = self.about
        self._refuse_other_models(store)
        trained_Q = self._folds_of(store)
        known = trained_Q != NOBODY
        if known.any() and about.protocol != "out-of-fold":
            raise DataError(
                f"the fusion was trained on {known.sum()} queries of {store.uri}; numbers on them "
                "would be a leak. Report on other queries, or train with protocol: out-of-fold"
            )
        bank = self._bank(store, trained_Q, bank_source) if about.bank_t else None
        if about.references:
            store.refuse_shortlist("A fusion that sees the similarity of reference and candidate")
            References(store, about.references).refuse_absent()
        inputs = Inputs(store, about.channels, bank, about.sees_reference)
        by_fold: dict[int, tuple[LightFusion, ...]] = {NOBODY: self.new_networks}
        for network, (held_out, _) in zip(self.networks, about.members, strict=True):
            if held_out != NOBODY:
                by_fold[held_out] = (*by_fold.get(held_out, ()), network)
        systems: list[Fusion] = []
        if set(store.models) == set(about.models):
            systems = self._static(store, trained_Q, bank)
        learned = Learned(about.name, by_fold, inputs, trained_Q)
        return Fitted(about, tuple(systems), learned)

    def _static(self, store: TileStore, trained_Q: Ints, bank: Bank | None) -> list[Fusion]:
        titles = " + ".join(trained.title for trained in self.about.stores)
        parts: dict[int, Fusion] = {}
        banked: dict[int, Fusion] = {}
        moments = moments_of(store)
        for static in self.about.convex:
            in_order = {name: static.weights[name] for name in store.models}
            convex = Convex(in_order, titles, moments=moments)
            parts[static.held_out] = convex
            if bank is not None:
                banked[static.held_out] = banked_convex(convex, bank, static.strength)
        found = [parts, banked] if bank is not None else [parts]
        return [OutOfFold(system[NOBODY].name, "static", system, trained_Q) for system in found]

    def _refuse_other_models(self, store: TileStore) -> None:
        if not set(store.models) & set(self.about.models):
            raise DataError(
                f"{store.uri} holds {', '.join(store.models)}; the fusion was trained on "
                f"{', '.join(self.about.models)}"
            )
        for trained in self.about.stores:
            for name in set(store.models) & set(self.about.models):
                if not trained.models[name].may_equal(store.manifest.models[name]):
                    raise DataError(
                        f"model {name} has other weights in {store.uri} than the fusion was "
                        "trained with"
                    )

    def _folds_of(self, store: TileStore) -> Ints:
        """The fold each query of a store was in; `NOBODY` for one that was not learned from."""
        fold_of_Q = np.full(store.size("queries"), NOBODY)
        manifest = store.manifest
        for trained, folds in zip(self.about.stores, self.fold_of, strict=True):
            # Own folders are all called alike.
            titled = manifest.title == trained.title and manifest.dataset["name"] != "folder"
            if manifest.gallery_digest == trained.gallery_digest or titled:
                for q, query in enumerate(store.queries):
                    fold_of_Q[q] = folds.get(query.id, fold_of_Q[q])
        return fold_of_Q

    def _bank(self, store: TileStore, trained_Q: Ints, source: TileStore | None) -> Bank:
        about = self.about
        if source is not None:
            return bank_of_others(store, source, about.bank_t, about.profiles)
        if (trained_Q == NOBODY).all():
            fold_of_Q = bank_folds(store.queries, about.folds, about.seed)
        else:
            fold_of_Q = np.where(trained_Q == NOBODY, about.folds, trained_Q)
        return own_bank(store, fold_of_Q, about.bank_t, about.profiles)


@dataclass(frozen=True)
class Fitted:
    """An artefact on a store.

    Attributes:
        about: the artefact.
        static: the static systems of the same folds; none where the store lacks a model.
        learned: the networks.
    """

    about: Description
    static: tuple[Fusion, ...]
    learned: Learned

    @property
    def systems(self) -> tuple[Fusion, ...]:
        """All of them, the learned one last."""
        return (*self.static, self.learned)

    @property
    def bank(self) -> Bank | None:
        """Of the store, if the fusion has one."""
        return self.learned.inputs.bank

    @property
    def missing(self) -> tuple[str, ...]:
        """Models of the fusion that the store lacks."""
        there = self.learned.inputs.store.models
        return tuple(name for name in self.about.models if name not in there)

    @property
    def out_of_fold(self) -> bool:
        """Whether queries were learned from, each ranked by what did not see it."""
        return bool((self.learned.fold_of_Q != NOBODY).any())

    def called(self, name: str) -> "Fitted":
        """The same under another name, for tables with several."""
        return replace(self, learned=replace(self.learned, name=name))

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers has to know."""
        notes = []
        if self.about.doubts:
            notes.append(
                f"{self.learned.name}: its numbers compare with no others, because the network may "
                "see what a ranking must not depend on (docs/fusion.md, the order leak)."
            )
        if self.about.stacked:
            notes.append(
                f"Stacking leak: {self.learned.name} learned from queries that "
                f"{', '.join(self.about.stacked)} learned from, so it trusts them too much."
            )
        if self.out_of_fold:
            notes.append(
                f"{self.learned.name} and convex weights rank every query with what was trained "
                "on the other folds."
            )
        if self.static:
            notes.append(self.about.convex_note)
        if self.bank is not None:
            notes.append(self.bank.note)
        if self.missing:
            notes.append(f"{self.learned.name} does without {', '.join(self.missing)}.")
        return notes


def write_description(folder: Path, about: Description) -> None:
    """Write `config.json`; it comes last, so that a folder with one is whole."""
    with refusals(folder), replacing(folder / CONFIG) as file:
        file.write_text(json.dumps(asdict(about), indent=1) + "\n", encoding="utf-8")


def record_metrics(where: str, metrics: dict[str, dict[str, float]]) -> None:
    """Write into `config.json` what was measured at the end of training."""
    with results(where, WHOLE) as folder:
        write_description(folder, replace(load_artefact(where).about, metrics=metrics))


def is_artefact(name: str) -> bool:
    """Whether a name is the folder or URI of a trained fusion."""
    if "/" not in name and not Path(name).is_dir():
        return False
    storage = open_storage(name)
    return storage.exists(WEIGHTS) and storage.exists(CONFIG)


def read_trace(name: str) -> str | None:
    """The `temperature.csv` of a trained fusion, if it has one."""
    storage = open_storage(name)
    return storage.read(TRACE).to_pybytes().decode() if storage.exists(TRACE) else None


def load_artefact(folder: str | Path) -> Artefact:
    """Read a trained fusion.

    Args:
        folder: of it, or a URI.

    Raises:
        DataError: there is none, or it is damaged.
        MachineError: a URI that cannot be read.
    """
    storage = open_storage(str(folder))
    root = shown(storage.uri)
    read: dict[str, pa.Buffer] = {}
    for name in (CONFIG, WEIGHTS, FOLDS):
        try:
            read[name] = storage.read(name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise DataError(f"{root} is no trained fusion: it has no {name}") from None
    try:
        values = json.loads(read[CONFIG].to_pybytes())
        tensors = load(read[WEIGHTS].to_pybytes())
        places = pq.read_table(pa.BufferReader(read[FOLDS])).to_pydict()
    except (ValueError, OSError, SafetensorError) as error:
        raise DataError(f"{root} is no trained fusion, or it is damaged: {error}") from None
    config = join(root, CONFIG)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DataError(f"{config} has no format {FORMAT}, which this version reads")
    try:
        about = parse_config(Description, values, config)
        networks = tuple(
            _network(about, n, seed, tensors) for n, (_, seed) in enumerate(about.members)
        )
        fold_of: list[dict[str, int]] = [{} for _ in about.stores]
        columns = (places[key] for key in ("store", "query", "fold"))
        for store, query, fold in zip(*columns, strict=True):
            fold_of[store][query] = fold
        _refuse_contradictions(about, fold_of)
    except (ConfigError, KeyError, IndexError, RuntimeError) as error:
        raise DataError(f"{root} is damaged: {error}") from None
    return Artefact(about, networks, tuple(fold_of))


def _refuse_contradictions(about: Description, fold_of: Sequence[Mapping[str, int]]) -> None:
    """KeyError if a fold that queries are in has no network or no convex weights."""
    held_out = {fold for fold, _ in about.members}
    folds = set(range(about.folds)) if about.protocol == "out-of-fold" else {NOBODY}
    searched = {static.held_out for static in about.convex}
    used = {fold for folds_of_store in fold_of for fold in folds_of_store.values()}
    if held_out != folds or searched != folds | {NOBODY} or not used <= set(range(about.folds)):
        raise KeyError("networks, convex weights and folds do not belong together")


def _network(about: Description, n: int, seed: int, tensors: Mapping[str, Any]) -> LightFusion:
    network = LightFusion(about.shape(seed))
    prefix = f"{n}."
    own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    network.load_state_dict(own)
    return network.eval()
