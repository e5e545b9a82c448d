"""What ranks the queries of an evaluation: systems, fusions that lack a model, oracles."""

from collections.abc import Sequence
from dataclasses import dataclass

from dafm_ray.config import EvaluateConfig
from dafm_ray.errors import ConfigError
from dafm_ray.evaluation.oracle import best_of
from dafm_ray.evaluation.protocols import HEADLINE, protocol
from dafm_ray.evaluation.summary import SystemRanks
from dafm_ray.fusion.ablation import Without
from dafm_ray.fusion.artefact import is_artefact
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.control import noisy_copies
from dafm_ray.fusion.learned import Learned
from dafm_ray.fusion.rank import rank_systems, singles
from dafm_ray.fusion.systems import Maker, Systems, tuned_on
from dafm_ray.progress import StatusWriter, progress
from dafm_ray.report.stores import refuse_leaks
from dafm_ray.tiles.store import TileStore

ORACLE, CONTROL = "oracle", "oracle of noise"

_K = int(HEADLINE.partition("@")[2])


@dataclass(frozen=True)
class Ranked:
    """The ranks of the queries of all stores.

    Attributes:
        made: the systems of each store, alike in their names.
        parts: for each store the ranks of its systems.
        systems: the same ranks, over all stores.
        ablations: fusions that lack a model, and their ranks.
        oracles: of the single systems, and the control; none for one model.
    """

    made: list[Systems]
    parts: list[list[SystemRanks]]
    systems: list[SystemRanks]
    ablations: list[tuple[Without, SystemRanks]]
    oracles: list[SystemRanks]


def rank_all(
    stores: Sequence[TileStore], config: EvaluateConfig, write_status: StatusWriter | None = None
) -> Ranked:
    """Rank every query of every store, in one pass over the tiles.

    Args:
        stores: what is ranked.
        config: of the job.
        write_status: stores the bytes of `status.json`.

    Raises:
        ConfigError: an unknown fusion, or two systems of one name.
        DataError: a damaged store, or weights searched on the queries they are reported on.
    """
    made = _systems(stores, config)
    ablations = [_ablations(here.systems, store) for store, here in zip(stores, made, strict=True)]
    several = len(stores[0].models) > 1
    copies = [noisy_copies(store, _K, config.seed) if several else [] for store in stores]
    rules = protocol(stores[0].manifest.protocol)
    queries = sum(store.size("queries") for store in stores)
    with progress("evaluate", queries, unit="query", write_status=write_status) as shown:
        parts = [
            rank_systems(store, [*here.systems, *lacking, *noisy], rules, shown)
            for store, here, lacking, noisy in zip(stores, made, ablations, copies, strict=True)
        ]
    ranked = [SystemRanks.concatenate(same) for same in zip(*parts, strict=True)]
    count, lacking = len(made[0].systems), len(ablations[0])
    alone = [system for system in ranked[:count] if system.kind == "single"]
    noisy = ranked[count + lacking :]
    return Ranked(
        made=made,
        parts=[part[:count] for part in parts],
        systems=ranked[:count],
        ablations=list(zip(ablations[0], ranked[count : count + lacking], strict=True)),
        oracles=[best_of(alone, ORACLE), best_of(noisy, CONTROL)] if several else [],
    )


def _ablations(systems: Sequence[Fusion], store: TileStore) -> list[Without]:
    """The mean of z-scores and every learned fusion, each without one of the models."""
    if len(store.models) < 2:
        return []
    return [
        Without(system, model, index)
        for system in systems
        for index, model in enumerate(store.models)
        if system.name == "mean@zscore"
        or (isinstance(system, Learned) and not system.inputs.sees_reference)
    ]


def _systems(stores: Sequence[TileStore], config: EvaluateConfig) -> list[Systems]:
    """The systems of every store, alike in their names."""
    tuned = None
    names = list(config.fusions)
    if config.tuning_stores:
        others = [TileStore(uri) for uri in config.tuning_stores]
        if config.models:
            others = [other.of(config.models) for other in others]
        refuse_leaks(stores, others)
        tuned = tuned_on(others, config.bank_t)
        static = sum(not is_artefact(name) for name in names)
        names = sorted(names, key=is_artefact)
        names.insert(static, tuned[0].name)
    maker = Maker(names, config.bank_t, config.bank, tuned)
    made = []
    for store in stores:
        here = maker.on(store)
        made.append(Systems([*singles(store), *here.systems], here.notes))
        _refuse_same_names(made[-1].systems)
    return made


def _refuse_same_names(systems: Sequence[Fusion]) -> None:
    names = [system.name for system in systems]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two systems are called {name!r}; name a fusion once, and call no model like one"
            )
