"""Which numbers belong to which protocol. One number means one protocol."""

from dataclasses import dataclass

from dafm_ray.errors import ConfigError, unknown


@dataclass(frozen=True)
class Protocol:
    """Metrics of a protocol.

    Attributes:
        recalls: K of Recall@K.
        subset_recalls: K of Rsubset@K, over the query's group; shown where every query has one.
        average_precisions: K of mAP@K as CIRCO defines it.
        mean_of: columns whose mean is Rmean.
        macro: whether metrics are averaged over categories without weights.
    """

    recalls: tuple[int, ...]
    subset_recalls: tuple[int, ...] = ()
    average_precisions: tuple[int, ...] = ()
    mean_of: tuple[str, ...] = ()
    macro: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the hit columns, in table order."""
        recalls = tuple(f"R@{k}" for k in self.recalls)
        return recalls + tuple(f"Rsubset@{k}" for k in self.subset_recalls)


_FASHIONIQ = Protocol((10, 50), mean_of=("R@10", "R@50"), macro=True)

PROTOCOLS = {
    "cirr": Protocol((1, 5, 10, 50), (1, 2, 3), mean_of=("R@5", "Rsubset@1")),
    "fashioniq": _FASHIONIQ,
    "fashioniq-val-split": _FASHIONIQ,
    "folder": Protocol((1, 5, 10, 50), (1, 2, 3), average_precisions=(5, 10, 25, 50)),
}

HEADLINE = "R@10"
"""The metric of win/tie/loss and of choosing the best single system."""


def protocol(name: str) -> Protocol:
    """Look a protocol up.

    Raises:
        ConfigError: no such protocol.
    """
    if name not in PROTOCOLS:
        raise ConfigError(unknown("protocol", name, PROTOCOLS))
    return PROTOCOLS[name]
