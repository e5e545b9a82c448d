"""How published models join the captions of one query into one text."""

import string
from collections.abc import Sequence

_STRIPPED = ".?, "
_SPACES = str.maketrans(string.punctuation, " " * len(string.punctuation))


def join_capitalised(captions: Sequence[str]) -> str:
    """CLIP4CIR and SPRC: strip `.?, ` from each, capitalise the first, join with " and "."""
    first, *rest = [caption.strip(_STRIPPED) for caption in captions]
    return " and ".join([first.capitalize(), *rest])


def join_stripped(captions: Sequence[str]) -> str:
    """SPN4CIR's CLIP4CIR: as `join_capitalised`, without the capital."""
    return " and ".join(caption.strip(_STRIPPED) for caption in captions)


def join_plain(captions: Sequence[str]) -> str:
    """TG-CIR: punctuation to blanks, lower case, white space collapsed, join with " and "."""
    return " and ".join(" ".join(c.translate(_SPACES).lower().split()) for c in captions)
