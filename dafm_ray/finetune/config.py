"""Configurations of the fine-tune jobs; read by `dafm_ray.config.load_config`."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from dafm_ray.config import FORBID, LARGEST_SEED, DatasetConfig, Device
from dafm_ray.errors import ConfigError

DataSets = DatasetConfig | tuple[DatasetConfig, ...]


@dataclass(frozen=True)
class MiningConfig:
    """Which candidates a query learns to rank below its positive.

    The targets of a query, its reference and what its protocol excludes are never negatives.

    Attributes:
        near: whose nearest candidates they are: the `query`'s under the present weights, or the
            `positive` image's.
        ranks: first and last place of the window, from 1, among the candidates that may be
            negatives.
        count: negatives of a query in a step.
        sampling: `first` takes the first of the window, `uniform` draws anew for every epoch.
        margin: a negative's score is at least so far below the target's; null does not ask.
        cap: highest score of a negative; null does not ask.
        near_duplicate: highest cosine of a negative with a target or the reference; 1 does not ask.
        same_group: whether candidates of the query's group may be negatives.
        every: epochs between two minings.
        shards: Ray actors that hold the index, for galleries that one process cannot; 0 searches
            in the process itself.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    near: Literal["query", "positive"] = "query"
    ranks: tuple[int, int] = (1, 50)
    count: int = 1
    sampling: Literal["first", "uniform"] = "uniform"
    margin: float | None = None
    cap: float | None = None
    near_duplicate: float = 1.0
    same_group: Literal["keep", "drop"] = "keep"
    every: int = 1
    shards: int = 0

    def __post_init__(self) -> None:
        first, last = self.ranks
        if not 1 <= first <= last:
            raise ConfigError("negatives.ranks must be a first and a last place, from 1")
        if not 1 <= self.count <= last - first + 1:
            raise ConfigError("negatives.count must be at least 1 and fit into negatives.ranks")
        if self.every < 1 or self.shards < 0:
            raise ConfigError("negatives.every must be at least 1, negatives.shards at least 0")
        if not -1 <= self.near_duplicate <= 1:
            raise ConfigError("negatives.near_duplicate is a cosine, from -1 to 1")
        for key in ("margin", "cap"):
            value = getattr(self, key)
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"negatives.{key} must be a number or null")


@dataclass(frozen=True)
class MineConfig:
    """A mining of hard negatives that is looked at before it is trained with.

    Attributes:
        dataset: whose queries.
        model: `family:variant@weights`.
        index: folder of kept indexes; one of the same weights and gallery is used again.
        out: folder of the results.
        negatives: what is mined: the whole window, whatever `count`, `sampling` and `every` say.
        device: `auto` takes a GPU where there is one.
        batch: images or queries of one forward pass.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    dataset: DatasetConfig
    model: str
    index: str
    out: str
    negatives: MiningConfig = MiningConfig()
    device: Device = "auto"
    batch: int = 64

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError("batch must be at least 1")


@dataclass(frozen=True)
class PreferenceConfig:
    """Learning from preferences between candidates instead of from a batch's contrast.

    A recipe sets every other key that is not given.

    Attributes:
        recipe: `paper`: Retrieval-DPO as its authors' code has it, whose positive is the reference;
            `corrected`: DPO towards the target; `listwise`: a smooth rank of the target.
        positive: what the query shall score higher than its negatives.
        beta: of DPO, on cosines times the model's logit scale.
        reference_policy: whether margins count from those of the weights at the start.
        negatives: of DPO.
        candidates: of `listwise`: the targets of the batch, or the whole gallery.
        tau: of `listwise`, in cosines.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    recipe: Literal["paper", "corrected", "listwise"]
    positive: Literal["target", "reference"] | None = None
    beta: float | None = None
    reference_policy: bool | None = None
    negatives: MiningConfig | None = None
    candidates: Literal["batch", "gallery"] | None = None
    tau: float | None = None

    def __post_init__(self) -> None:
        recipe = _RECIPES[self.recipe]
        for key in fields(self):
            if getattr(self, key.name) is None:
                object.__setattr__(self, key.name, recipe[key.name])
        for name in ("beta", "tau"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"preference.{name} must be a number above 0")


_RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "positive": "reference",
        "beta": 0.1,
        "reference_policy": False,
        "negatives": MiningConfig(near="positive", ranks=(1, 50), sampling="first"),
        "candidates": "batch",
        "tau": 0.05,
    },
    "corrected": {
        "positive": "target",
        "beta": 0.1,
        "reference_policy": True,
        "negatives": MiningConfig(ranks=(1, 50), near_duplicate=0.95),
        "candidates": "batch",
        "tau": 0.05,
    },
}
_RECIPES["listwise"] = {**_RECIPES["corrected"], "reference_policy": False}


@dataclass(frozen=True)
class InversionConfig:
    """Textual inversion: a network that gives every image a pseudo-word (SEARLE).

    It learns from images alone, towards words that are optimised image by image.

    Attributes:
        steps: of the optimisation of an image's word.
        learning_rate: of its AdamW.
        weight_decay: of its AdamW.
        ema: of the word over the steps; the average is what is kept.
        temperature: of the contrast between the network's words and the optimised ones.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    steps: int = 350
    learning_rate: float = 2e-2
    weight_decay: float = 0.01
    ema: float = 0.99
    temperature: float = 0.25

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError("inversion.steps must be at least 1")
        if not (0 < self.learning_rate < math.inf and 0 < self.temperature < math.inf):
            raise ConfigError("inversion.learning_rate and temperature must be above 0")
        if not (0 <= self.weight_decay < math.inf and 0 <= self.ema < 1):
            raise ConfigError("inversion.weight_decay must be at least 0, ema from 0 to below 1")


@dataclass(frozen=True)
class FinetuneConfig:
    """Training of a sub-model: from the contrast of a batch of triplets, from preferences, or of
    its textual inversion.

    Attributes:
        train: triplets to learn from; several data sets, as FashionIQ's categories, are one pool.
        validation: queries whose R@10 decides when to stop and which epoch is kept; its mean over
            several data sets.
        model: `family:variant@weights` to start from; weights `scratch` starts from `scratch`.
        out: folder or URI of checkpoints and of the result, `weights.safetensors`.
        scratch: sizes of a model that is trained from nothing, as its family reads them.
        parts: prefixes of the parameters that learn; the rest stays frozen.
        preference: learn from preferences; see `PreferenceConfig`.
        inversion: learn pseudo-words; see `InversionConfig`.
        epochs: at most so many.
        patience: validations without a better R@10 before stopping.
        batch_size: of all workers together; the negatives of a query are all targets in it.
        chunk: triplets of a worker whose activations are held at a time; 0 holds all. The batch
            stays one: features are computed twice, and only they are kept for all of it.
        learning_rate: peak of the schedule.
        schedule: `one_cycle`, or `constant`.
        pct_start: share of the steps in which a one-cycle rate rises.
        div_factor: a one-cycle rate starts so many times below its peak.
        betas: of AdamW.
        epsilon: of AdamW.
        weight_decay: of AdamW.
        gradient_clip: longest gradient over all parameters; 0 leaves gradients as they are.
        logit_scale: factor on the scores before the softmax (1 / temperature), in families that
            do not learn it.
        loss: weights of the terms of a family's loss, where they differ from the published ones.
        shift: random shift of training images, in pixels.
        identity: every image of the training gallery is a triplet too, whose text is empty and
            whose target is itself.
        workers: Ray Train workers.
        cpus_per_worker: CPUs, and torch threads, of a worker.
        use_gpu: one GPU a worker.
        precision: bf16 and fp16 run the model under autocast; fp16 scales the loss.
        loader_workers: processes that decode images, a worker.
        seed: of initialisation, order and shifts.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    train: DataSets
    validation: DataSets
    model: str
    out: str
    scratch: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ("",)
    preference: PreferenceConfig | None = None
    inversion: InversionConfig | None = None
    epochs: int = 20
    patience: int = 5
    batch_size: int = 256
    chunk: int = 0
    learning_rate: float = 1e-3
    schedule: Literal["one_cycle", "constant"] = "one_cycle"
    pct_start: float = 0.15
    div_factor: float = 25.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.05
    gradient_clip: float = 0.0
    logit_scale: float = 100.0
    loss: dict[str, float] = field(default_factory=dict)
    shift: int = 0
    identity: bool = False
    workers: int = 1
    cpus_per_worker: int = 1
    use_gpu: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    loader_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.trained_on or not self.validated_on:
            raise ConfigError("train and validation: name at least one data set")
        if self.preference is not None and self.inversion is not None:
            raise ConfigError("a job has preference or inversion, not both")
        if min(self.workers, self.cpus_per_worker, self.patience) < 1:
            raise ConfigError("workers, cpus_per_worker and patience must be at least 1")
        if self.batch_size < 2 or self.batch_size % self.workers:
            raise ConfigError("batch_size must be at least 2 and a multiple of workers")
        if self.epochs < 1:
            raise ConfigError("epochs must be at least 1")
        for key in ("learning_rate", "logit_scale", "epsilon"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"{key} must be a number above 0")
        if not (0 < self.pct_start < 1 and 1 <= self.div_factor < math.inf):
            raise ConfigError("pct_start must be between 0 and 1, div_factor at least 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("betas must be from 0 to below 1")
        weights = {f"loss.{term}": weight for term, weight in self.loss.items()}
        weights |= {"weight_decay": self.weight_decay, "gradient_clip": self.gradient_clip}
        for key, value in weights.items():
            if not 0 <= value < math.inf:
                raise ConfigError(f"{key} must be a number of at least 0")
        if min(self.shift, self.loader_workers, self.chunk, self.seed) < 0:
            raise ConfigError("shift, loader_workers, chunk and seed must be at least 0")
        if self.seed > LARGEST_SEED:
            raise ConfigError("seed must be below 2^31")
        unknown_keys = set(self.scratch) - {"towers", "combiner", "vision"}
        if unknown_keys:
            raise ConfigError(f"scratch holds towers, combiner and vision, not {min(unknown_keys)}")

    @property
    def trained_on(self) -> tuple[DatasetConfig, ...]:
        """`train` as a tuple."""
        return _tuple(self.train)

    @property
    def validated_on(self) -> tuple[DatasetConfig, ...]:
        """`validation` as a tuple."""
        return _tuple(self.validation)


def _tuple(given: DataSets) -> tuple[DatasetConfig, ...]:
    return (given,) if isinstance(given, DatasetConfig) else given
