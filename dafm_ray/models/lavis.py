"""The original BLIP-2 of salesforce-lavis, to compare with: an actor in an environment of its own.

The pins of salesforce-lavis exclude everything current, so it never shares an environment with this
package; see requirements-lavis.txt. Its Q-Former cannot run SPRC's second pass, hence a query here
is one modality, or the sum of both.
"""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dafm_ray.errors import ConfigError, DataError
from dafm_ray.models import lavis_actor, torchvision_ops
from dafm_ray.models.base import RANDOM, FrozenModel, ModelId
from dafm_ray.models.checkpoints import Checkpoint, read_checkpoint
from dafm_ray.models.preprocess import no_pad, to_tensor
from dafm_ray.models.qformer import QFormerSizes, sizes_of
from dafm_ray.models.sprc import AUTHORS_KEY, Sprc
from dafm_ray.session import ensure_ray

PYTHON = "DAFM_LAVIS_PYTHON"
"""Environment variable: Python of the environment with salesforce-lavis, on every node."""

GPUS = "DAFM_LAVIS_GPUS"
"""Environment variable: GPUs of the actor; none by default."""

LONGEST_WORDS = 50

_VERSIONS = (
    "import platform; from importlib.metadata import version; version('salesforce-lavis'); "
    "print(platform.python_version(), version('ray'), version('torch'))"
)
_SHIPPED = (lavis_actor, torchvision_ops)


class Lavis(FrozenModel):
    """`lavis:text`, `lavis:image`, `lavis:sum`: BLIP-2, not trained for composed queries.

    A query is its text, the mean of its reference's vectors, or the sum of both; a candidate is 32
    vectors, of which the best counts.
    """

    variants = ("text", "image", "sum")
    runs_here = False
    score = staticmethod(Sprc.score)

    def __init__(self, actor: Any, sizes: QFormerSizes, variant: str, parameters: int = 0) -> None:
        self.module = nn.Module()
        self._parameters = parameters
        self.actor = actor
        self.sizes = sizes
        self.variant = variant

    @classmethod
    def gpus_elsewhere(cls) -> float:
        """Of the actor.

        Raises:
            ConfigError: the environment variable is no number.
        """
        asked = os.environ.get(GPUS, "0")
        try:
            return float(asked)
        except ValueError:
            raise ConfigError(f"{GPUS}={asked} is not a number of GPUs") from None

    @property
    def parameters(self) -> int:
        """Of the class in the actor."""
        return self._parameters

    @property
    def uses_reference(self) -> bool:
        """False for the text alone."""
        return self.variant != "text"

    @classmethod
    def load(cls, model_id: ModelId) -> Self:
        """Load BLIP-2's file (key `model`) or SPRC's (key `Blip2QformerCirAlignPrompt`)."""
        if model_id.weights in RANDOM:
            raise ConfigError(
                f"{model_id.family} needs a weights file, as in lavis:sum@blip2_pretrained.pth"
            )
        return cls.of_checkpoint(read_checkpoint(model_id.weights), model_id.variant)

    @classmethod
    def of_checkpoint(
        cls, checkpoint: Checkpoint, variant: str, heads: tuple[int, int] | None = None
    ) -> Self:
        """Start the actor.

        Args:
            checkpoint: of BLIP-2 or of SPRC.
            variant: of this family.
            heads: of the vision tower and the Q-Former; published widths of a head by default.

        Raises:
            ConfigError: the other environment is not named.
            DataError: the file lacks weights.
        """
        tensors = checkpoint.section("model", AUTHORS_KEY)
        sizes = sizes_of(tensors, checkpoint.where, heads)
        actor = start_actor(sizes, tensors, checkpoint.metadata.get("words"))
        missing, parameters = _result(actor.about.remote())
        if missing:
            raise DataError(
                f"{checkpoint.where} lacks {len(missing)} weights: {', '.join(missing[:5])}"
            )
        return cls(actor, sizes, variant, parameters)

    def preprocess(self, image: Image.Image) -> Tensor:
        """LAVIS squeezes an image into a square."""
        side = self.sizes.image_size
        squeezed = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        return to_tensor(squeezed, side, no_pad)

    def caption(self, captions: Sequence[str]) -> str:
        """LAVIS' own cleaning of the captions joined with " and "."""
        text = re.sub(r"""([.!"()*#:;~])""", " ", " and ".join(captions).lower())
        return " ".join(text.split()[:LONGEST_WORDS])

    def encode_gallery(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 32, D), each vector L2-normalised."""
        return self._ask("image", images_B3HW.cpu().contiguous().numpy())

    def encode_queries(
        self, references_R3HW: Tensor, reference_index_B: Tensor, captions_B: Sequence[str]
    ) -> Tensor:
        """(B, D), L2-normalised."""
        text_BD = self._ask("text", list(captions_B)) if self.variant != "image" else None
        if self.variant == "text":
            assert text_BD is not None
            return text_BD
        image_RD = F.normalize(self.encode_gallery(references_R3HW).mean(1), dim=-1)
        image_BD = image_RD[reference_index_B.cpu()]
        return image_BD if text_BD is None else F.normalize(image_BD + text_BD, dim=-1)

    def _ask(self, what: str, argument: object) -> Tensor:
        features: np.ndarray[Any, Any] = _result(getattr(self.actor, what).remote(argument))
        return torch.from_numpy(features.copy())


def start_actor(sizes: QFormerSizes, tensors: dict[str, Tensor], words: list[str] | None) -> Any:
    """An actor of `LavisBlip2` in the environment that `DAFM_LAVIS_PYTHON` names.

    Raises:
        ConfigError: it names none, or one with another Python, Ray or torch.
    """
    import ray

    python = os.environ.get(PYTHON, "")
    gpus = Lavis.gpus_elsewhere()
    check_environment(python)
    ensure_ray()
    for module in _SHIPPED:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        return (
            ray.remote(lavis_actor.LavisBlip2)
            .options(
                num_cpus=0,  # its caller waits meanwhile, and has one
                num_gpus=gpus,
                runtime_env={"py_executable": python},
            )
            .remote(sizes.to_json(), tensors, words, "cuda" if gpus else "cpu")
        )
    finally:
        for module in _SHIPPED:
            ray.cloudpickle.unregister_pickle_by_value(module)


def check_environment(python: str) -> None:
    """Whether tensors can pass between the two environments, and salesforce-lavis is in the other.

    Raises:
        ConfigError: no, and why.
    """
    make = f"make one as requirements-lavis.txt says and set {PYTHON} to its python"
    if not Path(python).is_file():
        found = python or "not set"
        raise ConfigError(f"salesforce-lavis runs in an environment of its own: {make} ({found})")
    asked = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, check=False)
    if asked.returncode:
        reason = asked.stderr.strip().splitlines()[-1:]
        raise ConfigError(f"{python} lacks what `lavis` needs ({', '.join(reason)}): {make}")
    theirs = asked.stdout.split()
    ours = [platform.python_version(), version("ray"), version("torch")]
    if [v.partition("+")[0] for v in theirs] != [v.partition("+")[0] for v in ours]:
        raise ConfigError(
            f"{python} has Python, Ray and torch {' '.join(theirs)}, here they are "
            f"{' '.join(ours)}: {make}"
        )


def _result(reference: Any) -> Any:
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return ray.get(reference)
    except (RayActorError, RayTaskError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(
            f"the class of salesforce-lavis fails: {reason}. Without a network it needs its "
            "vocabulary, as in weights.pth+vocab.txt"
        ) from None
