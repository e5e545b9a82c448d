"""Which stores may be reported together, and on which weights may be searched."""

from collections.abc import Sequence

from dafm_ray.errors import DataError
from dafm_ray.evaluation.protocols import protocol
from dafm_ray.tiles.store import TileStore


def refuse_unlike(stores: Sequence[TileStore]) -> None:
    """DataError unless complete stores hold different queries of one protocol and data set, under
    the same models.
    """
    for store in stores:
        store.refuse_incomplete()
    first = stores[0]
    for store in stores[1:]:
        _refuse_other_models(first, store, "reported together")
        _refuse_other_protocol(first, store)
    _refuse_shared_queries(stores)
    if protocol(first.manifest.protocol).macro:
        _refuse_unclear_categories(stores)


def refuse_leaks(stores: Sequence[TileStore], others: Sequence[TileStore]) -> None:
    """DataError if weights searched on `others` would have seen queries of `stores`."""
    for other in others:
        other.refuse_incomplete()
        _refuse_other_models(stores[0], other, "searched for weights")
        theirs = {query.id for query in other.queries}
        for store in stores:
            shared = theirs & {query.id for query in store.queries}
            mine, tuned = store.manifest, other.manifest
            alike = mine.gallery_digest == tuned.gallery_digest or mine.title == tuned.title
            if shared and alike:
                raise DataError(
                    f"{other.uri} holds queries of {store.uri} ({len(shared)} of them); weights "
                    "searched on the queries they are reported on would be a leak"
                )


def _refuse_other_models(store: TileStore, other: TileStore, what: str) -> None:
    if other.models != store.models:
        raise DataError(
            f"{other.uri} holds the models {', '.join(other.models)}, {store.uri} holds "
            f"{', '.join(store.models)}; only the same models can be {what}"
        )
    for name in store.models:
        if not store.manifest.models[name].may_equal(other.manifest.models[name]):
            raise DataError(f"model {name} has other weights in {other.uri} than in {store.uri}")


def _refuse_other_protocol(first: TileStore, store: TileStore) -> None:
    mine, theirs = first.manifest, store.manifest
    for what, one, other in (
        ("protocol", mine.protocol, theirs.protocol),
        ("reference policy", mine.policy, theirs.policy),
        ("data set", mine.dataset["name"], theirs.dataset["name"]),
        ("split", mine.dataset["split"], theirs.dataset["split"]),
    ):
        if one != other:
            raise DataError(
                f"{first.uri} has {what} {one!r}, {store.uri} has {other!r}; one number means "
                "one protocol"
            )
    if not protocol(mine.protocol).macro and mine.gallery_digest != theirs.gallery_digest:
        raise DataError(
            f"{first.uri} and {store.uri} search other galleries; protocol {mine.protocol} has one"
        )


def _refuse_shared_queries(stores: Sequence[TileStore]) -> None:
    owner: dict[str, str] = {}
    for store in stores:
        for query in store.queries:
            if query.id in owner:
                raise DataError(
                    f"query {query.id!r} is in {owner[query.id]} and in {store.uri}; name a store "
                    "once, and give the queries of each category ids of their own"
                )
            owner[query.id] = store.uri


def _refuse_unclear_categories(stores: Sequence[TileStore]) -> None:
    """A mean over categories needs their names, and one gallery for each."""
    label = stores[0].manifest.protocol
    gallery: dict[str, str] = {}
    for store in stores:
        for category in sorted({query.category for query in store.queries}):
            if not category and len(stores) > 1:
                raise DataError(
                    f"{store.uri}: some queries have no category, and protocol {label} averages "
                    "over categories; name them all"
                )
            searched = store.manifest.gallery_digest
            if gallery.setdefault(category, searched) != searched:
                raise DataError(
                    f"category {category!r} has several galleries; protocol {label} has one a "
                    "category"
                )
