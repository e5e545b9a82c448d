"""The answer to one query as a page with pictures."""

from collections.abc import Sequence

from PIL import Image

from dafm_ray.fusion.search import Found
from dafm_ray.report.cases import data_uri, thumbnails
from dafm_ray.report.templates import rendered
from dafm_ray.tiles.store import TileStore


def answer_page(
    store: TileStore,
    system: str,
    image: Image.Image,
    captions: Sequence[str],
    found: Sequence[Found],
    notes: Sequence[str],
) -> str:
    """Render the page; every text is escaped.

    Args:
        store: what was searched.
        system: what ranked.
        image: the reference.
        captions: what shall differ.
        found: the answer.
        notes: what a reader has to know.
    """
    return rendered(
        "answer.html.j2",
        title=store.manifest.title,
        size=store.size("gallery"),
        system=system,
        reference=data_uri(image),
        captions=captions,
        found=found,
        pictures=thumbnails(store, [one.id for one in found]),
        notes=notes,
    )
