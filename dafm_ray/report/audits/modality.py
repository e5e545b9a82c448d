"""How many queries does the image alone solve, or the text alone?"""

from dataclasses import dataclass

import numpy as np

from dafm_ray.errors import ConfigError, DataError, unknown
from dafm_ray.evaluation.audit import solved
from dafm_ray.evaluation.metrics import Ints, Scores
from dafm_ray.evaluation.protocols import HEADLINE, protocol
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.rank import singles
from dafm_ray.fusion.reference import References
from dafm_ray.report.audits.base import Audit, K, counted_ranks
from dafm_ray.report.findings import Section
from dafm_ray.tiles.store import TileStore

IMAGE_ONLY, TEXT_ONLY = "zeroshot:image", "zeroshot:text"


def audit_modality(store: TileStore, image_only: str = "", text_only: str = "") -> Audit:
    """How many queries the image alone or the text alone solves.

    Args:
        store: complete tiles of all its models.
        image_only: model that sees no text; by default one of the family `zeroshot:image`, else
            the similarity of reference and candidate under the first model with image features,
            where the store holds all scores.
        text_only: model that sees no image; by default one of the family `zeroshot:text`.

    Raises:
        ConfigError: no such model.
        DataError: there is neither of the two.
    """
    image, text = _alone(store, image_only, IMAGE_ONLY), _alone(store, text_only, TEXT_ONLY)
    if image is None and not image_only:
        image = _similarity(store)
    named = [system for system in (image, text) if system is not None]
    if not named:
        raise DataError(
            f"{store.uri} holds no system of one modality; add {IMAGE_ONLY} and {TEXT_ONLY} to its "
            "models, or name models with --image-only and --text-only"
        )
    alone = {system.name for system in named}
    composed = [system for system in singles(store) if system.name not in alone]
    ranked = counted_ranks(store, [*named, *composed])
    ranks = {system.name: system.ranks for system in ranked}
    if not composed:
        raise DataError(f"{store.uri} holds no system of both modalities to compare with")

    def hits(name: str, k: int) -> Ints:
        return (ranks[name].stored <= k).astype(np.int64)

    best = max(composed, key=lambda system: int(hits(system.name, K).sum())).name
    rows, details = [], {}
    for k in protocol(store.manifest.protocol).recalls:
        found = solved(
            hits(best, k),
            hits(image.name, k) if image else None,
            hits(text.name, k) if text else None,
        )
        details[f"R@{k}"] = vars(found)
        rest = found.queries - found.either
        rows.append(
            (
                f"R@{k}",
                *(_share(count, found.queries) for count in (found.image, found.text)),
                _share(found.either, found.queries),
                _share(found.composed, found.queries),
                _share(found.composed_rest, rest),
            )
        )
    judged = details[HEADLINE]
    easy = 100 * judged["either"] / judged["queries"]
    verdict = (
        f"{store.manifest.title}: {easy:.2f} % of the queries are solved at {HEADLINE} by "
        f"{' or '.join(system.name for system in named)}, which see one modality; {best} is the "
        "best system that composes."
    )
    missing = [word for word, system in (("image", image), ("text", text)) if system is None]
    notes = [f"No system sees the {word} alone; name one, or add one." for word in missing]
    header = ("", "image alone", "text alone", "either", best, f"{best} on the rest")
    section = Section("Single modalities", "Percent of the queries.", header, tuple(rows))
    return Audit(store.manifest.title, (verdict, *notes), section, details=details)


def _alone(store: TileStore, named: str, family: str) -> Fusion | None:
    """The system that is named, or of a family."""
    by_name = {system.name: system for system in singles(store)}
    if named and named not in by_name:
        raise ConfigError(unknown("model of the store", named, by_name))
    of_family = [
        name for name in store.models if store.manifest.models[name].id.startswith(f"{family}@")
    ]
    return by_name[named or of_family[0]] if named or of_family else None


@dataclass(frozen=True)
class _Similarity:
    """The similarity of reference and candidate as a system."""

    store: TileStore
    model: str
    kind: str = "single"

    @property
    def name(self) -> str:
        return f"{self.model}'s image similarity"

    def __call__(self, scores_MBN: Scores, rows_B: Ints) -> Scores:
        [cosines_BN] = References(self.store, (self.model,))(rows_B)
        cosines_BN[np.isnan(scores_MBN).all(axis=0)] = np.nan
        similar_BN: Scores = cosines_BN
        return similar_BN


def _similarity(store: TileStore) -> Fusion | None:
    if store.manifest.shortlist:
        return None  # what another order would rank is not there
    done = store.finished()
    for model in store.models:
        keys = store.feature_keys(model, "gallery")
        if keys and done.issuperset(keys):
            return _Similarity(store, model)
    return None


def _share(count: int | None, queries: int) -> str:
    return "-" if count is None or not queries else f"{100 * count / queries:.2f}"
