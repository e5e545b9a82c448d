"""Icons: the embedded data set, real drawings with compositional names.

The Material Design Icons font (Apache-2.0) names its 7,296 glyphs compositionally: `bell`,
`bell_outline`, `bell_off`, `bell_plus`. A designer who looks for "this icon, but crossed out"
asks a composed query. The protocol is fixed so that numbers compare:

- A token of a name is a *modifier* when inserting it somewhere turns one name into another at
  least 15 times. The *concept* of a name is the name without modifiers.
- Queries stay inside one concept and run between glyphs of different pixels: `add` inserts one
  modifier, `remove` takes one away, `swap` replaces one at the same place (per reference the two
  targets with the smallest hash).
- Concepts are split by hash: train < 55 (sub-models), val < 75 (fusion), test (report only).
- The gallery of a split is every glyph of its concepts. The reference and glyphs with its exact
  pixels are masked; a hit on any glyph with the target's exact pixels counts.

`icon-names` asks for every glyph by its name and by a description of it, without a reference: the
pairs of image and text that a CLIP model learns from.
"""

import hashlib
import importlib.resources
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.base import Draft, Query, exclude_reference
from dafm_ray.datasets.images import ImageError
from dafm_ray.errors import ConfigError, unknown

SPLITS = ("train", "val", "test")
CANVAS, GLYPH = 64, 56
MODIFIER_COUNT = 15
GROUP_SIZE = 6
SWAPS_PER_REFERENCE = 2

_ADJECTIVES = {
    "auto": "automatic",
    "bold": "bold",
    "bottom": "at the bottom",
    "charging": "charging",
    "down": "pointing down",
    "empty": "empty",
    "fast": "fast",
    "horizontal": "horizontal",
    "left": "pointing left",
    "multiple": "several of them",
    "off": "crossed out",
    "open": "open",
    "outline": "outlined",
    "right": "pointing right",
    "top": "at the top",
    "up": "pointing up",
    "variant": "in another form",
    "vertical": "vertical",
    "wireless": "wireless",
}
_TEMPLATES = {
    "add noun": ("with {a} {x}", "add {a} {x}", "the same with {a} {x}"),
    "add adjective": ("{x}", "make it {x}", "the same but {x}"),
    "remove noun": ("without the {x}", "remove the {x}", "the same without {x}"),
    "remove adjective": ("not {x}", "no longer {x}", "the same but not {x}"),
    "swap": ("{new} instead of {old}", "replace {old} by {new}", "{new}, not {old}"),
}


@dataclass(frozen=True)
class IconSource:
    """Draws glyphs; a locator is the glyph's name."""

    def open(self, locator: str) -> Image.Image:
        """Black glyph on white, mode L, 64 x 64."""
        if locator not in _code_points():
            raise ImageError(f"the font has no glyph {locator!r}")
        return _draw(locator)


def read_icons(config: DatasetConfig) -> Draft:
    """The icons of one split: `train`, `val` or `test`.

    Raises:
        ConfigError: no such split.
    """
    concepts, pixels, twins = _glyphs(config)
    queries: list[Query] = []
    for concept, members in concepts.items():
        queries.extend(_queries(concept, members, pixels, twins))
    return Draft(
        name="icons",
        split=config.split,
        protocol="cirr",
        policy="mask",
        images=tuple((name, name) for name in pixels),
        queries=tuple(queries),
        source=IconSource(),
    )


def read_icon_names(config: DatasetConfig) -> Draft:
    """Every glyph of a split asked for in words; glyphs with its pixels are targets too.

    Raises:
        ConfigError: no such split.
    """
    concepts, pixels, twins = _glyphs(config)
    queries = [
        Query(
            id=f"{name}|{kind}",
            reference=name,
            captions=(text,),
            targets=(name, *(twin for twin in twins[pixels[name]] if twin != name)),
            fold_group=concept,
            category=kind,
        )
        for concept, members in concepts.items()
        for name in members
        for kind, text in (("name", name.replace("_", " ")), ("description", _described(name)))
    ]
    return Draft(
        name="icon-names",
        split=config.split,
        protocol="folder",
        policy="keep",
        images=tuple((name, name) for name in pixels),
        queries=tuple(queries),
        source=IconSource(),
    )


def _glyphs(
    config: DatasetConfig,
) -> tuple[dict[str, list[str]], dict[str, bytes], dict[bytes, list[str]]]:
    """Of a split: concept -> names, name -> pixels, pixels -> names."""
    split = config.split
    if split not in SPLITS:
        raise ConfigError(unknown(f"split of {config.name}", split, SPLITS))
    concepts = {c: names for c, names in _concepts().items() if _split_of(c) == split}
    names = sorted(name for members in concepts.values() for name in members)
    pixels = {name: _draw(name).tobytes() for name in names}
    twins: defaultdict[bytes, list[str]] = defaultdict(list)
    for name in names:
        twins[pixels[name]].append(name)
    return concepts, pixels, twins


def _described(name: str) -> str:
    """The name of a glyph as a sentence, in the words of the modification texts."""
    tokens = name.split("_")
    modifiers = [token for token in tokens if token in _modifiers()]
    concept = [token for token in tokens if token not in modifiers]
    if not concept:  # a name of modifiers alone is a concept of its own
        concept, modifiers = tokens, []
    changes = [_ADJECTIVES.get(token) or f"with {_article(token)} {token}" for token in modifiers]
    said = f"a photo of {_article(concept[0])} {' '.join(concept)}"
    return f"{said} that is {' and '.join(changes)}" if changes else said


@cache
def _code_points() -> dict[str, str]:
    from fonticon_mdi7 import MDI7

    return {n: code.split(".")[1] for n, code in vars(MDI7).items() if not n.startswith("_")}


@cache
def _font() -> ImageFont.FreeTypeFont:
    path = importlib.resources.files("fonticon_mdi7") / "fonts" / "materialdesignicons-webfont.ttf"
    with importlib.resources.as_file(path) as file:
        return ImageFont.truetype(str(file), GLYPH)


def _draw(name: str) -> Image.Image:
    image = Image.new("L", (CANVAS, CANVAS), 255)
    centre = (CANVAS / 2, CANVAS / 2)
    ImageDraw.Draw(image).text(centre, _code_points()[name], font=_font(), fill=0, anchor="mm")
    return image


@cache
def _modifiers() -> frozenset[str]:
    names = _code_points()
    counts: Counter[str] = Counter()
    for name in names:
        counts.update({token for token, shorter in _removals(name) if shorter in names})
    return frozenset(token for token, count in counts.items() if count >= MODIFIER_COUNT)


def _removals(name: str) -> Iterator[tuple[str, str]]:
    """(token, the name without it) for every token of a name."""
    tokens = name.split("_")
    for i, token in enumerate(tokens):
        yield token, "_".join(tokens[:i] + tokens[i + 1 :])


@cache
def _concepts() -> dict[str, list[str]]:
    concepts: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(_code_points()):
        kept = "_".join(token for token in name.split("_") if token not in _modifiers())
        concepts[kept or name].append(name)
    return dict(concepts)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _split_of(concept: str) -> str:
    value = _hash(concept) % 100
    return "train" if value < 55 else "val" if value < 75 else "test"


def _queries(
    concept: str, names: list[str], pixels: dict[str, bytes], twins: dict[bytes, list[str]]
) -> Iterator[Query]:
    for reference, target, edit in _edits(names, pixels):
        others = [name for name in twins[pixels[reference]] if name != reference]
        same = [name for name in twins[pixels[target]] if name != target]
        yield Query(
            id=f"{reference}|{target}",
            reference=reference,
            captions=(_text(edit, f"{reference}|{target}"),),
            targets=(target, *same),
            excluded=exclude_reference(reference, "mask", others),
            group=_group(reference, target, names, pixels),
            fold_group=concept,
            category=edit[0],
        )


Edit = tuple[str, str, str]
"""(operation, modifier that appears or "", modifier that goes or "")"""


def _edits(names: list[str], pixels: dict[str, bytes]) -> Iterator[tuple[str, str, Edit]]:
    modifiers = sorted(_modifiers())
    known = set(names)
    added: dict[tuple[str, str], str] = {}
    swapped: defaultdict[str, dict[str, Edit]] = defaultdict(dict)
    for name in names:
        tokens = name.split("_")
        for i, (token, shorter) in enumerate(_removals(name)):
            if token not in _modifiers():
                continue
            if shorter in known and pixels[shorter] != pixels[name]:
                added.setdefault((shorter, name), token)
            for other in modifiers:
                target = "_".join([*tokens[:i], other, *tokens[i + 1 :]])
                if other != token and target in known and pixels[target] != pixels[name]:
                    swapped[name].setdefault(target, ("swap", other, token))
    for (shorter, longer), token in added.items():
        yield shorter, longer, ("add", token, "")
        yield longer, shorter, ("remove", "", token)
    for reference, targets in swapped.items():
        nearest = sorted(targets, key=lambda target: _hash(f"{reference}|{target}"))
        for target in nearest[:SWAPS_PER_REFERENCE]:
            yield reference, target, targets[target]


def _group(
    reference: str, target: str, names: Iterable[str], pixels: dict[str, bytes]
) -> tuple[str, ...]:
    """Reference, target and up to four other variants, no two of them with equal pixels."""
    group = {pixels[reference]: reference, pixels[target]: target}
    for name in sorted(names, key=lambda name: _hash(f"{reference}|{target}|{name}")):
        if len(group) < GROUP_SIZE:
            group.setdefault(pixels[name], name)
    return tuple(group.values())


def _text(edit: Edit, key: str) -> str:
    operation, new, old = edit
    if operation == "swap":
        templates = _TEMPLATES["swap"]
        words = {"new": _phrase(new), "old": _phrase(old)}
    else:
        modifier = new or old
        kind = "adjective" if modifier in _ADJECTIVES else "noun"
        templates = _TEMPLATES[f"{operation} {kind}"]
        words = {"x": _ADJECTIVES.get(modifier, modifier), "a": _article(modifier)}
    return templates[_hash(key) % len(templates)].format(**words)


def _phrase(modifier: str) -> str:
    return _ADJECTIVES.get(modifier) or f"{_article(modifier)} {modifier}"


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeio" else "a"
