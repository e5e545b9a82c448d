"""Which families there are. A new one is a file and a row here, or an entry point elsewhere.

A package of somebody else's registers a family under the entry-point group `dafm_ray.models`,
as `myfamily = "mypackage.module:MyModel"`.
"""

import importlib
from importlib.metadata import entry_points

from dafm_ray.errors import ConfigError, unknown
from dafm_ray.models.base import FrozenModel, ModelId

ENTRY_POINTS = "dafm_ray.models"

FAMILIES = {
    "clip4cir": "dafm_ray.models.clip4cir:Clip4Cir",
    "tgcir": "dafm_ray.models.tgcir:TgCir",
    "blip4cir": "dafm_ray.models.blip4cir:Blip4Cir",
    "biblip4cir": "dafm_ray.models.blip4cir:BiBlip4Cir",
    "sprc": "dafm_ray.models.sprc:Sprc",
    "lavis": "dafm_ray.models.lavis:Lavis",
    "zeroshot": "dafm_ray.models.zeroshot:ZeroShot",
}


def families() -> dict[str, str]:
    """Family -> `module:class`, the package's own rows and those of entry points."""
    registered = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}
    return registered | FAMILIES


def family(name: str) -> type[FrozenModel]:
    """The class of a family.

    Raises:
        ConfigError: no such family; names the nearest.
    """
    known = families()
    if name not in known:
        raise ConfigError(unknown("model family", name, known))
    module, _, attribute = known[name].partition(":")
    loaded: type[FrozenModel] = getattr(importlib.import_module(module), attribute)
    return loaded


def resolve(model_id: str) -> tuple[type[FrozenModel], ModelId]:
    """The class and the parts of `family:variant@weights`; reads no weights.

    Raises:
        ConfigError: a malformed id, no such family or variant.
    """
    parsed = ModelId.parse(model_id)
    found = family(parsed.family)
    if not found.offers(parsed.variant):
        offered = ", ".join(found.variants)
        raise ConfigError(f"{model_id}: {parsed.family} offers the variants {offered}")
    return found, parsed


def load_model(model_id: str) -> FrozenModel:
    """Load `family:variant@weights`, frozen, in evaluation mode, on the CPU."""
    found, parsed = resolve(model_id)
    model = found.load(parsed)
    model.module.requires_grad_(False).eval()
    return model
