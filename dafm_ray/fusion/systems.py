"""Names of systems, as commands take them, made into systems of a store."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dafm_ray.config import BANK_T, FOLDS
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.fusion.artefact import Artefact, is_artefact, load_artefact
from dafm_ray.fusion.bank import SUFFIX, Bank, Banked, bank_of_others, banked_convex, own_bank
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.candidates import moments_of
from dafm_ray.fusion.convex import search_convex, search_strengths
from dafm_ray.fusion.folds import NOBODY, bank_folds
from dafm_ray.fusion.rank import singles
from dafm_ray.fusion.static import Convex, static_fusion
from dafm_ray.tiles.store import TileStore
from dafm_ray.uris import last_part, shown

STRENGTH = 0.75
"""Of a bank that is asked for by name alone; what every fold of CIRR val chooses."""


@dataclass
class Systems:
    """What ranks the queries of one store.

    Attributes:
        systems: in the order of the tables.
        notes: what a reader of their numbers has to know.
    """

    systems: list[Fusion] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Maker:
    """Makes systems of any store by their names.

    Attributes:
        names: sub-models, static fusions, any of them with `+bank` or `+bank:STRENGTH`, and
            folders of trained fusions.
        bank_t: of the banks that names ask for.
        bank_source: store of other queries over the same gallery, of which banks are made; empty
            takes the store's own queries, each without its fold.
        tuned: convex weights searched on other stores, and the strength of their bank.
    """

    names: Sequence[str]
    bank_t: float = BANK_T
    bank_source: str = ""
    tuned: tuple[Convex, float] | None = None
    artefacts: dict[str, Artefact] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.names:
            if is_artefact(name):
                self.artefacts[name] = load_artefact(name)

    def on(self, store: TileStore) -> Systems:
        """The systems of a store.

        Raises:
            ConfigError: a name that says nothing.
            DataError: see `Artefact.on`.
        """
        found = Systems()
        source = TileStore(self.bank_source) if self.bank_source else None
        for name in self.names:
            if name in self.artefacts:
                fitted = self.artefacts[name].on(store, source)
                if len(self.artefacts) > 1:
                    fitted = fitted.called(f"{fitted.learned.name}:{self._label(name)}")
                taken = {system.name for system in found.systems}
                found.systems.extend(s for s in fitted.systems if s.name not in taken)
                found.notes.extend(note for note in fitted.notes if note not in found.notes)
            else:
                found.systems.append(self._static(store, source, name, found.notes))
        return found

    def _label(self, name: str) -> str:
        """The folder's name, or its whole path where two are called alike."""
        alike = [other for other in self.artefacts if last_part(other) == last_part(name)]
        return shown(name) if len(alike) > 1 else last_part(name)

    def _static(
        self, store: TileStore, source: TileStore | None, name: str, notes: list[str]
    ) -> Fusion:
        plain, plus, option = name.partition(SUFFIX)
        if plus and is_artefact(plain):
            raise ConfigError(
                f"{name}: a trained fusion takes no {SUFFIX}; it was trained with one"
            )
        system, strength = self._plain(store, plain)
        if not plus:
            return system
        if option:
            try:
                strength = float(option[1:]) if option.startswith(":") else math.nan
            except ValueError:
                strength = math.nan
            if not 0 <= strength < math.inf:
                raise ConfigError(f"{name!r}: write {SUFFIX}:STRENGTH, as mean{SUFFIX}:0.5")
        bank = self._bank(store, source)
        if bank.note not in notes:
            notes.append(bank.note)
        if isinstance(system, Convex):
            return replace(banked_convex(system, bank, strength), suffix=SUFFIX + option)
        return Banked(system, bank, strength, SUFFIX + option)

    def _plain(self, store: TileStore, name: str) -> tuple[Fusion, float]:
        """A system and the strength of the bank it should have."""
        if name in store.models:
            return singles(store)[store.models.index(name)], STRENGTH
        moments = moments_of(store)
        if self.tuned is not None and name == self.tuned[0].name:
            convex, strength = self.tuned
            return replace(convex, moments=moments), strength
        if (Path(name).is_dir() or "/" in name) and not is_artefact(name):
            raise ConfigError(f"{shown(name)} is no folder of a trained fusion")
        try:
            return static_fusion(name, moments=moments), STRENGTH
        except ConfigError as error:
            models = ", ".join(store.models)
            raise ConfigError(f"{error}; models of the store: {models}") from None

    def _bank(self, store: TileStore, source: TileStore | None) -> Bank:
        if source is not None:
            return bank_of_others(store, source, self.bank_t)
        return own_bank(store, bank_folds(store.queries, FOLDS, 0), self.bank_t)


def tuned_on(stores: Sequence[TileStore], bank_t: float = BANK_T) -> tuple[Convex, float]:
    """Convex weights searched on stores of other queries, and the strength of their bank."""
    convex = search_convex(*stores)
    if any(store.manifest.shortlist for store in stores):
        return convex, 0.0
    banks = [own_bank(store, bank_folds(store.queries, FOLDS, 0), bank_t) for store in stores]
    return convex, search_strengths(stores, banks, [convex], [NOBODY])[0]


def open_for(name: str, uri: str) -> TileStore:
    """The store that a system ranks: whole, but a trained fusion does without the models whose
    tiles are not all there.

    Raises:
        DataError: the store is incomplete, for a trained fusion under every model.
    """
    store = TileStore(uri)
    if is_artefact(name):
        whole = [model for model in store.models if not store.missing([model])]
        if not whole:
            raise DataError(f"{uri}: no model's tiles are complete; run `dafm precompute` first")
        return store if len(whole) == len(store.models) else store.of(whole)
    store.refuse_incomplete()
    return store
