"""Reading weights files without running code from them, and loading them with clear errors."""

import hashlib
import importlib.resources
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dafm_ray.cache import local_copy, read_part
from dafm_ray.errors import DafmError, DataError
from dafm_ray.models.base import RANDOM
from dafm_ray.models.open_clip_tags import is_tag, tag_digest
from dafm_ray.uris import is_uri, last_part, local_path, shown

Sizes = TypeVar("Sizes")

PACKAGE_SCHEME = "package://"
"""`package://some.package/file.safetensors`: weights that ship inside a Python package."""

_NAMES_SHOWN = 5
_LONGEST_HEADER = 100_000_000
"""Bytes; what safetensors itself allows."""

_MAGIC = (b"P", b"\x80")
"""First byte of what torch.save writes now (zip), and of any pickle, as it wrote before 1.6."""


TRAINED_ON = "trained_on"
"""Key of a safetensors header: labels of the data sets that the weights learned from."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one or more weights files.

    Attributes:
        tensors: full key -> tensor. A file that nests its state dict under a key, as
            `{"epoch": 7, "CLIP": {...}}`, gives keys with that prefix: `CLIP.visual.conv1.weight`.
        metadata: the JSON values of a safetensors header (our own files say how to build them).
        where: the location, for messages.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    where: str = ""

    def section(self, *prefixes: str) -> dict[str, Tensor]:
        """Tensors below the first of `prefixes` that occurs, without the prefix.

        Raises:
            DataError: none occurs.
        """
        for prefix in prefixes:
            found = {
                key[len(prefix) + 1 :]: tensor
                for key, tensor in self.tensors.items()
                if key.startswith(f"{prefix}.")
            }
            if found:
                return found
        found_prefixes = sorted({key.split(".")[0] for key in self.tensors})
        raise DataError(
            f"{self.where} holds no {' or '.join(prefixes)} weights "
            f"(it holds: {', '.join(found_prefixes[:_NAMES_SHOWN])})"
        )

    def recorded_sizes(self, kind: type[Sizes], key: str = "sizes") -> Sizes:
        """Sizes that a file of our own records in its header.

        Args:
            kind: the family's dataclass of sizes.
            key: of the header.

        Raises:
            DataError: the file is one of another family, or its header is damaged.
        """
        recorded = self.metadata[key]
        try:
            known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
            if set(recorded) != known:
                raise TypeError
            return kind(**recorded)
        except (TypeError, ValueError):
            raise DataError(
                f"{self.where} records sizes that are not {kind.__name__}; is it a file of another "
                "family?"
            ) from None


def read_checkpoint(location: str) -> Checkpoint:
    """Read `.safetensors`, `.pt` or `.pth` files; several are joined with `+`. A `.txt` among them
    is a vocabulary, a word a line.

    Args:
        location: a path, a URI, a `package://` address, or several joined with `+`, as in
            `tuned_clip.pt+combiner.pt`.

    Raises:
        DataError: missing, unreadable, or a pickled object instead of tensors.
        MachineError: a URI that cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for part in location.split("+"):
        path = _local_path(part)
        if path.suffix == ".txt":
            metadata["words"] = _read_words(path)
            continue
        if path.suffix == ".safetensors":
            read, header = _read_safetensors(path)
            metadata |= header
        else:
            read = _flatten(_read_pickle_free(path))
        tensors |= _without_wrapper(read)
    return Checkpoint(tensors, metadata, shown(location))


def weights_digest(location: str) -> str:
    """SHA-256 of the bytes of weights files and of what open_clip tags stand for; random weights
    are their own digest.

    Raises:
        DataError: there is no such file.
    """
    if location in RANDOM:
        return location
    hasher = hashlib.sha256()
    for part in location.split("+"):
        if is_tag(part):
            hasher.update(tag_digest(part).encode())
            continue
        with _local_path(part).open("rb") as file:
            hasher.update(hashlib.file_digest(file, "sha256").digest())
    return hasher.hexdigest()


def trained_on(location: str) -> list[str]:
    """What our own weights files say they learned from; nothing where a file says nothing, or is
    not at hand.
    """
    found: list[str] = []
    for part in location.split("+"):
        if last_part(part).endswith(".safetensors"):
            try:
                found += _as_json(_header(part).get(TRAINED_ON, "[]"))
            except (DafmError, SafetensorError):
                continue
    return list(dict.fromkeys(found))


def _header(location: str) -> Mapping[str, str]:
    """What a safetensors file says beside its tensors; of a URI no more than that is read."""
    if is_uri(location) and not location.startswith(PACKAGE_SCHEME):
        length = int.from_bytes(read_part(location, 0, 8), "little")
        if length > _LONGEST_HEADER:
            raise DataError(f"{shown(location)} is not a readable safetensors file")
        header = _as_json(read_part(location, 8, length).decode(errors="replace"))
        return header.get("__metadata__", {}) if isinstance(header, dict) else {}
    with safe_open(_local_path(location), framework="pt") as file:
        return file.metadata() or {}


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load every parameter and buffer, upcasting where the file is narrower than the module.

    Raises:
        DataError: names the missing, unexpected and mis-shaped keys.
    """
    expected = module.state_dict()
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    misshaped = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in tensors and tensors[key].shape != expected[key].shape
    ]
    unusable = [
        key for key in expected if key in tensors and _unusable(tensors[key], expected[key])
    ]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:_NAMES_SHOWN])})"
        for what, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshaped),
            ("without usable numbers", unusable),
        )
        if keys
    ]
    if problems:
        raise DataError(
            f"{where} does not fit {type(module).__name__}: {'; '.join(problems)}. "
            "Is it a file of another model or size?"
        )
    module.load_state_dict(tensors)


def _unusable(given: Tensor, wanted: Tensor) -> bool:
    """Another kind of number than the model computes with, no data, infinite or not a number."""
    if given.is_meta or given.is_floating_point() != wanted.is_floating_point():
        return True
    return given.is_complex() or not bool(torch.isfinite(given).all())


def _without_wrapper(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the `module.` that DataParallel puts before each, at whatever depth."""
    parts = [key.split(".") for key in tensors]
    for depth in range(min(map(len, parts), default=1) - 1):
        if all(part[depth] == "module" for part in parts):
            names = [".".join([*part[:depth], *part[depth + 1 :]]) for part in parts]
            return dict(zip(names, tensors.values(), strict=True))
    return tensors


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path} is not a vocabulary, a word a line in UTF-8") from None


def _local_path(location: str) -> Path:
    if location.startswith(PACKAGE_SCHEME):
        package, _, name = location.removeprefix(PACKAGE_SCHEME).partition("/")
        try:
            path = Path(str(importlib.resources.files(package).joinpath(name)))
        except (ModuleNotFoundError, ValueError):
            raise DataError(f"{location}: there is no Python package {package!r}") from None
    elif is_uri(location):
        try:
            return local_copy(location)
        except FileNotFoundError:
            raise DataError(f"there is no weights file {shown(location)}") from None
    else:
        path = local_path(location)
    if not path.is_file():
        raise DataError(f"there is no weights file {location}")
    return path


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}") from None
    return tensors, {key: _as_json(value) for key, value in header.items()}


def _as_json(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _read_pickle_free(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        with path.open("rb") as file:
            if file.read(1) not in _MAGIC:
                raise DataError(f"{path} is not a readable checkpoint") from None
        raise DataError(
            f"{path} holds pickled Python objects, and loading them would run code from the file. "
            "Convert it once where you trust it: load it with its own project and "
            "torch.save(model.state_dict(), ...)"
        ) from None
    except Exception as error:  # the unpickler raises whatever a broken file makes it
        raise DataError(f"{path} is not a readable checkpoint: {error}") from None


def _flatten(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Nested mappings of tensors to full keys; epoch counters, optimiser states are left out."""
    if isinstance(value, Tensor):
        return {prefix: value}
    if not isinstance(value, Mapping):
        return {}
    tensors: dict[str, Tensor] = {}
    for key, item in value.items():
        if isinstance(key, str) and not (prefix == "" and key.startswith("optimizer")):
            tensors |= _flatten(item, f"{prefix}.{key}" if prefix else key)
    return tensors
