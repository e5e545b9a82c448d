"""One frozen dataclass per job, read from YAML. Every default of a job is written here.

An unknown key or a wrong type is an error that names the key and the nearest known one.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from dafm_ray.errors import ConfigError

FORBID: dict[str, str] = {"extra": "forbid"}
_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")
_UNKNOWN_KEY = "unexpected_keyword_argument"
Config = TypeVar("Config")
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda"]
Order = Literal["rank", "file", "hash"]
TemperatureMode = Literal["paper", "paper_clamped", "centred", "fixed"]


@dataclass(frozen=True)
class DatasetConfig:
    """What opens a data set.

    Attributes:
        name: `icons`, `icon-names`, `cirr`, `fashioniq` or `folder`.
        split: of the data set; a folder has none.
        root: folder or URI of images (and of annotations, unless they lie elsewhere); the icons
            need none.
        annotations: folder or URI of captions/ and image_splits/, if it is not `root`.
        category: `dress`, `shirt` or `toptee` of FashionIQ.
        gallery: of FashionIQ: the whole split, or only the references and targets of its queries
            (the "VAL split", easier and not comparable).
        images: tar (webdataset) or Parquet shards that hold the images instead of plain files:
            a file, a folder, a pattern as `shards/*.tar`, or a URI of one.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    name: str
    split: str = ""
    root: str = ""
    annotations: str = ""
    category: str = ""
    gallery: Literal["original", "val-split"] = "original"
    images: str = ""


@dataclass(frozen=True)
class ModelConfig:
    """One frozen sub-model and its actor pool.

    Attributes:
        name: short name in the store and in tables.
        id: `family:variant@weights`.
        actors: size of the pool.
        num_gpus: GPUs an actor takes; a fraction lets several share one, 0 runs on CPUs. `auto`
            takes the fraction whose memory the model was measured to need, or CPUs where the
            cluster has no GPU.
        batch: images or queries of one forward pass, at most `encode_block`; 0 is measured once.
            Fixed at the store's first run of the model.
        precision: bf16 and fp16 run the model under autocast; `auto` is fp32 on CPUs, bf16 or else
            fp16 on GPUs. Fixed at the store's first run of the model.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    name: str
    id: str
    actors: int = 1
    num_gpus: float | Literal["auto"] = 0.0
    batch: int = 0
    precision: Precision = "auto"


@dataclass(frozen=True)
class PrecomputeConfig:
    """Features and similarity tiles.

    Attributes:
        dataset: what is searched.
        models: the sub-models, one actor pool each.
        store: folder or URI.
        encode_block: images or queries decoded, encoded and committed together; fixed at the
            store's first run.
        tile_queries: rows of a tile; fixed at the store's first run.
        tile_candidates: columns of a tile; fixed at the store's first run.
        score_type: float16 halves the store and makes ties; fixed at the store's first run.
        shortlist: 0 keeps the score of every candidate. K keeps, of each query, the candidates that
            are among the first K of any model, with their scores under all models: for galleries
            where a score of every query and candidate makes no sense. Fixed at the store's first
            run, with the models.
        scoring_gpus: GPUs a tile takes while it is scored; 0 scores on CPUs.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    dataset: DatasetConfig
    models: tuple[ModelConfig, ...]
    store: str
    encode_block: int = 64
    tile_queries: int = 512
    tile_candidates: int = 32768
    score_type: Literal["float32", "float16"] = "float32"
    shortlist: int = 0
    scoring_gpus: float = 0.0

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ConfigError(f"models: the name {min(twice)!r} stands twice")
        if not names:
            raise ConfigError("models: name at least one model")
        for key in ("encode_block", "tile_queries", "tile_candidates"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be at least 1")
        if self.shortlist < 0:
            raise ConfigError("shortlist must be at least 0")
        for model in self.models:
            if model.actors < 1 or (model.num_gpus != "auto" and model.num_gpus < 0):
                raise ConfigError(f"models: {model.name} needs actors >= 1 and num_gpus >= 0")
            if model.num_gpus != "auto" and model.num_gpus > 1 and model.num_gpus % 1:
                raise ConfigError(f"models: {model.name}: num_gpus above 1 must be whole")
            if model.batch < 0:
                raise ConfigError(f"models: {model.name} needs batch >= 0")


LARGEST_SEED = 2**31 - 1

BANK_T = 1.5
"""t of a query bank, see `fusion/bank.py`."""

FOLDS = 5

STATIC_FUSIONS = (
    "mean@zscore",
    "combsum@minmax",
    "combmnz@minmax",
    "mean@dbsf",
    "rrf",
    "borda",
)


@dataclass(frozen=True)
class EvaluateConfig:
    """Metrics, tables and the report of a store.

    Attributes:
        store: of the queries to report; several stores of one protocol, as the categories of
            FashionIQ, are reported together.
        out: folder or URI of the results.
        fusions: static fusions, sub-models or static fusions with `+bank`, folders or URIs of
            trained fusions.
        tune_on: store or stores of other queries on which convex weights are searched; empty
            leaves the convex row out, unless a trained fusion brings its own.
        bank: store of other queries over the same gallery, of which query banks are made; by
            default the queries themselves, each without its fold.
        bank_t: of the banks of static fusions, see `fusion/bank.py`.
        against: folder of an earlier evaluation of the same queries, or its `metrics.json`; what
            both ranked is compared.
        chance: whether every single model is compared with a random order of the candidates.
        starts: model -> the model of the same stores it was fine-tuned from, compared beside
            chance.
        studies: folders of finished studies of orders, whose figure is shown.
        cases: queries shown with pictures.
        seed: of the resampling and of the sample of cases.
        models: which of the stores'; all by default.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    store: str | tuple[str, ...]
    out: str
    fusions: tuple[str, ...] = STATIC_FUSIONS
    tune_on: str | tuple[str, ...] = ()
    bank: str = ""
    bank_t: float = BANK_T
    against: str = ""
    chance: bool = False
    starts: dict[str, str] = field(default_factory=dict)
    studies: tuple[str, ...] = ()
    cases: int = 12
    seed: int = 0
    models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _refuse_circles(self.starts)
        if self.cases < 0:
            raise ConfigError("cases must be at least 0")
        if not 0 < self.bank_t < math.inf:
            raise ConfigError("bank_t must be a number above 0")
        if not self.stores:
            raise ConfigError("store: name at least one")

    @property
    def stores(self) -> tuple[str, ...]:
        """`store` as a tuple."""
        return _several(self.store)

    @property
    def tuning_stores(self) -> tuple[str, ...]:
        """`tune_on` as a tuple."""
        return _several(self.tune_on)


def _refuse_circles(starts: Mapping[str, str]) -> None:
    for name in starts:
        line = [name]
        while line[-1] in starts:
            line.append(starts[line[-1]])
            if line[-1] in line[:-1]:
                raise ConfigError(
                    f"starts: {line[-1]!r} is its own start ({' from '.join(line)}); name the "
                    "model whose weights it was fine-tuned from"
                )


def _several(given: str | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,) if given else ()
    return given


@dataclass(frozen=True)
class RetrieveConfig:
    """Rankings of one sub-model from an exact index of the gallery, without tiles.

    Attributes:
        dataset: what is searched.
        model: `family:variant@weights`.
        index: folder of kept indexes; one of the same weights and gallery is used again.
        out: folder of the results.
        top: candidates a query.
        device: `auto` takes a GPU where there is one.
        batch: images or queries of one forward pass.
        shards: Ray actors that hold the index, for galleries that one process cannot; they are not
            kept. 0 searches in the process itself.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    dataset: DatasetConfig
    model: str
    index: str
    out: str
    top: int = 50
    device: Device = "auto"
    batch: int = 64
    shards: int = 0

    def __post_init__(self) -> None:
        if min(self.top, self.batch) < 1 or self.shards < 0:
            raise ConfigError("top and batch must be at least 1, shards at least 0")


@dataclass(frozen=True)
class NegativesConfig:
    """Candidates a query is trained against; all of them unless one of these is above 0.

    Attributes:
        top: those that the models like best together.
        random: others, drawn anew for every batch.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    top: int = 0
    random: int = 0

    def __post_init__(self) -> None:
        if min(self.top, self.random) < 0:
            raise ConfigError("negatives: top and random must be at least 0")


@dataclass(frozen=True)
class Recipe:
    """How a fusion is fitted.

    Attributes:
        objective: `log_rank`, a smooth logarithm of the target's rank, or `info_nce` (DAFM, eq. 6).
        temperature: how the loss moves tau, see `fusion/temperature.py`.
        tau: where it starts.
        tau_unit: `raw`: of the sub-models' own scores, as the paper's 0.02 for cosines;
            `normalised`: of the normalised scores.
        scaling: S of DAFM's eq. 7.
        temperature_every: whether tau moves after every `step`, by its loss, or after every
            `epoch`, by the mean of its losses; DAFM leaves that open.
        lowest_factor: of one step, in mode `paper_clamped`.
        tau_bounds: as multiples of the start, in modes `paper_clamped` and `centred`.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        epochs: passes over the queries.
        batch: queries of a step, of all workers together.
        model_dropout: probability that a query has to do without a model.
        negatives: a few candidates a query instead of all, which is an approximation.
        seed: of the order of the queries, of dropped models and of random negatives.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    objective: Literal["log_rank", "info_nce"] = "log_rank"
    temperature: TemperatureMode = "fixed"
    tau: float = 0.15
    tau_unit: Literal["normalised", "raw"] = "normalised"
    scaling: float = 500.0
    temperature_every: Literal["step", "epoch"] = "step"
    lowest_factor: float = 0.5
    tau_bounds: tuple[float, float] = (0.25, 5.0)
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    epochs: int = 4
    batch: int = 256
    model_dropout: float = 0.0
    negatives: NegativesConfig = NegativesConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("learning_rate", "tau", "scaling"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"recipe.{key} must be a number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError("recipe.weight_decay must be a number of at least 0")
        if self.epochs < 0 or self.batch < 1 or not 0 <= self.seed <= LARGEST_SEED:
            raise ConfigError(
                "recipe: epochs must be at least 0, batch at least 1, seed in [0, 2^31)"
            )
        if not 0 <= self.model_dropout < 1:
            raise ConfigError("recipe.model_dropout must be at least 0 and below 1")
        low, high = self.tau_bounds
        if not (0 < low <= 1 <= high < math.inf and 0 < self.lowest_factor <= 1):
            raise ConfigError(
                "recipe: tau_bounds must hold 1 between them, lowest_factor be in (0, 1]"
            )


@dataclass(frozen=True)
class NetworkConfig:
    """Size and kind of a LightFusion, see `fusion/lightfusion.py`.

    Attributes:
        width: of the hidden layer.
        kernel: of the filter along the candidates, odd; 1 is none, and no order can matter.
        order: of the candidates under a filter: by their mean score (`rank`), as in the annotation
            file (`file`; the paper's, which leaks), or as stored (`hash`; arbitrary).
        gate: mix the models by the statistics of a query's scores.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    width: int = 32
    kernel: int = 1
    order: Order = "rank"
    gate: bool = False

    def __post_init__(self) -> None:
        if self.width < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError("network: width must be at least 1, kernel odd and at least 1")


@dataclass(frozen=True)
class FusionConfig:
    """A LightFusion, trained on Ray Train.

    Attributes:
        store: whose queries are learned from; several, as the categories of FashionIQ, give one
            fusion for all.
        out: folder or URI of the artefact, its checkpoints and its report.
        protocol: `out-of-fold`: a network a fold that it does not see, which is what the report
            ranks it with. `train->val`: one network from all queries, reported on `validation`.
        validation: store or stores of other queries, which are reported on instead.
        models: which of the store's; all by default.
        folds: of queries, whose groups are never split; they also keep a query out of its bank.
        seeds: networks a fold, whose scores are averaged.
        new_queries: what ranks queries of no fold: the mean of all networks' `scores`, or one
            network of their mean `weights`, which costs less.
        normalisation: of the scores of one query under one model.
        bank_t: of the query bank, see `fusion/bank.py`; 0 trains without a bank.
        profiles: a channel a model of how alike reference and candidate score for the bank's
            queries, see `fusion/profiles.py`.
        references: models whose similarity of reference and candidate is a channel.
        sees_reference: leave the reference's own score at the network's input, where the data set
            masks it; for the audit of the order leak.
        start: weights a network starts from: `convex` (searched, with the strength of the bank) or
            `mean`.
        network: its size and kind.
        recipe: how it is fitted.
        workers: Ray Train workers, which share every batch.
        use_gpu: one GPU a worker.
        cases: queries of the report shown with pictures.
        seed: of the folds and of the networks.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    store: str | tuple[str, ...]
    out: str
    protocol: Literal["out-of-fold", "train->val"] = "out-of-fold"
    validation: str | tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    folds: int = FOLDS
    seeds: int = 1
    new_queries: Literal["scores", "weights"] = "scores"
    normalisation: Literal["zscore", "minmax", "rank", "dbsf", "none"] = "zscore"
    bank_t: float = BANK_T
    profiles: bool = True
    references: tuple[str, ...] = ()
    sees_reference: bool = False
    start: Literal["convex", "mean"] = "convex"
    network: NetworkConfig = NetworkConfig()
    recipe: Recipe = Recipe()
    workers: int = 1
    use_gpu: bool = False
    cases: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stores:
            raise ConfigError("store: name at least one")
        if self.protocol == "train->val" and not self.validation_stores:
            raise ConfigError("protocol train->val needs `validation`, a store of other queries")
        if min(self.seeds, self.workers) < 1 or self.folds < 3:
            raise ConfigError("seeds and workers must be at least 1, folds at least 3")
        if not 0 <= self.bank_t < math.inf:
            raise ConfigError("bank_t must be a number of at least 0")
        if self.profiles and not self.bank_t:
            raise ConfigError(
                "profiles come from a query bank; set bank_t above 0, or profiles false"
            )
        if self.start == "convex" and self.normalisation != "zscore":
            raise ConfigError("convex weights are those of z-scores; set start: mean")
        if self.recipe.tau_unit == "raw" and self.normalisation not in ("zscore", "none"):
            raise ConfigError("tau_unit raw has a meaning for normalisation zscore and none alone")
        if self.cases < 0 or not 0 <= self.seed <= LARGEST_SEED:
            raise ConfigError("cases must be at least 0, seed in [0, 2^31)")

    @property
    def stores(self) -> tuple[str, ...]:
        """`store` as a tuple."""
        return _several(self.store)

    @property
    def validation_stores(self) -> tuple[str, ...]:
        """`validation` as a tuple."""
        return _several(self.validation)


@dataclass(frozen=True)
class Between:
    """A range of a search space.

    Attributes:
        low: smallest value.
        high: largest.
        log: drawn evenly by its logarithm.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf or (self.log and self.low <= 0):
            raise ConfigError("a range needs low < high, and low above 0 for log")


Space = dict[str, Between | tuple[Any, ...]]
"""Key -> its values: all of a list, or draws from a range."""


_FIXED = frozenset(
    {"store", "validation", "protocol", "out", "folds", "seed", "workers", "use_gpu", "cases"}
)
"""Keys of a FusionConfig that a study does not vary: trials on other queries or folds would learn
from what the choice is reported on, or from more than others."""


@dataclass(frozen=True)
class StudyConfig:
    """A sweep on Ray Tune: many fusions of the same scores, and what to learn from them.

    Attributes:
        kind: `networks` trains a fusion for every setting of the space and chooses one; `orders`
            trains every subset of the models once, and grows fusions model by model in several
            orders; `static` ranks with static fusions, which need no training.
        fusion: keys of a FusionConfig, without `out`: what every setting changes. Its `store` is
            learned and chosen on; a `validation` store is what the choice is reported on.
        out: folder or URI.
        spaces: dotted keys of a FusionConfig (`static`: of a StaticSetting) and their values. Each
            space is searched for itself, which is how one thing at a time is varied. In `static`,
            `weights.*` stands for the weight of every model.
        search: how a space with ranges is drawn from: `random`, evenly spread, or `optuna`, which
            learns from what was found. A space of lists alone is tried in full.
        trials: settings drawn from each space that has a range.
        baseline: the setting that the chosen one is compared with; always tried.
        metric: what decides.
        report_folds: folds whose labels no trial sees and on which the choice is reported, where
            there is no `validation` store.
        stop_early: give up settings that are behind after an epoch (ASHA).
        first: in `orders`, the model that orders start with; by default the best one alone.
        grown: in `orders`, which orders a fusion is grown in: those that begin with `first`, `all`,
            or `none`.
        most_orders: in `orders`, at most so many are grown and named in the figure, drawn by
            `seed`.
        cpus: of a trial; a fraction lets several share one.
        gpus: of a trial; a fraction lets several share one.
        seed: of the draws.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    kind: Literal["networks", "orders", "static"]
    fusion: dict[str, Any]
    out: str
    spaces: tuple[Space, ...] = ()
    search: Literal["random", "optuna"] = "random"
    trials: int = 24
    baseline: dict[str, Any] = field(default_factory=dict)
    metric: str = "R@10"
    report_folds: int = 2
    stop_early: bool = False
    first: str = ""
    grown: Literal["first", "all", "none"] = "first"
    most_orders: int = 6
    cpus: float = 1.0
    gpus: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind == "orders" and (self.spaces or self.baseline):
            raise ConfigError("kind orders has no space and no baseline: it tries every subset")
        if self.kind != "orders" and not all(self.spaces or [{}]):
            raise ConfigError("spaces: name at least one key and its values in each")
        for key, values in (pair for space in self.spaces for pair in space.items()):
            if not isinstance(values, Between) and not values:
                raise ConfigError(f"spaces: {key} has no values")
            if self.kind == "networks" and key.partition(".")[0] in _FIXED:
                raise ConfigError(f"spaces: {key} is the same for every trial; set it in `fusion`")
        if _FIXED & self.baseline.keys():
            raise ConfigError("baseline: what is in `fusion` alone is the same for every trial")
        if self.kind == "static" and self.fusion.get("validation"):
            raise ConfigError("kind static chooses out of fold; it takes no validation store")
        if self.search == "optuna" and (len(self.spaces) != 1 or self.kind != "networks"):
            raise ConfigError("search optuna takes one space, of kind networks")
        if min(self.trials, self.most_orders) < 1 or not 0 <= self.seed <= LARGEST_SEED:
            raise ConfigError("trials and most_orders must be at least 1, seed in [0, 2^31)")
        if not 0 < self.cpus < math.inf or not 0 <= self.gpus < math.inf:
            raise ConfigError("cpus must be above 0, gpus at least 0")
        if self.report_folds < 1 or self.report_folds > self.base.folds - 2:
            raise ConfigError(
                "report_folds must be at least 1 and leave two of fusion.folds to choose with"
            )

    @property
    def base(self) -> FusionConfig:
        """`fusion` as a configuration of its own."""
        return self.with_setting({})

    def with_setting(self, setting: Mapping[str, Any]) -> FusionConfig:
        """What a setting trains.

        Raises:
            ConfigError: a key that there is not, a value that it cannot have.
        """
        # A validation store is of other queries, whatever a trial is chosen on.
        protocol = "train->val" if self.fusion.get("validation") else "out-of-fold"
        given = {"out": "", "protocol": protocol, **self.fusion}
        values = json.loads(json.dumps(given))
        for key, value in setting.items():
            _put(values, key, value, f"spaces: {key}")
        return parse_config(FusionConfig, values, "fusion")


@dataclass(frozen=True)
class StaticSetting:
    """One static fusion of a study.

    Attributes:
        system: a static fusion as `mean@zscore`, or `convex`.
        weights: of `convex`, model -> weight; divided by their sum.
        k: of `rrf`.
        strength: of a query bank; 0 takes none.
        bank_t: of that bank.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    system: str = "mean@zscore"
    weights: dict[str, float] = field(default_factory=dict)
    k: float = 60
    strength: float = 0.0
    bank_t: float = BANK_T

    def __post_init__(self) -> None:
        if min(self.weights.values(), default=0) < 0 or self.k <= 0 or self.strength < 0:
            raise ConfigError("weights and strength must be at least 0, k above 0")
        if not 0 < self.bank_t < math.inf:
            raise ConfigError("bank_t must be a number above 0")


def load_config(kind: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a job's configuration.

    Args:
        kind: one of the dataclasses above.
        path: YAML file whose keys are its fields.
        overrides: `key=value` with dotted keys, as `dataset.split=val`; values are YAML.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a wrong type.
    """
    values = read_yaml(path, "the configuration ")
    for override in overrides:
        _set(values, override)
    return parse_config(kind, values, str(path))


def read_yaml(path: str | Path, what: str = "") -> dict[str, Any]:
    """The keys and values of a file.

    Args:
        path: of the file.
        what: it is, for the message.

    Raises:
        ConfigError: no such file, or not YAML.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {what}{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines")
    return values


def parse_config(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """Check plain values against a dataclass and build it; see `load_config`."""
    from pydantic import TypeAdapter, ValidationError

    try:
        text = json.dumps(values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}; quote the value") from None
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(kind, error.errors())}") from None


def to_yaml(config: Any) -> str:
    """The resolved configuration, to be written beside the results."""
    plain = json.loads(json.dumps(asdict(config)))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: write key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override!r}: the value is not YAML") from None
    _put(values, key, value, f"--set {override!r}")


def _put(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key, as `models.0.batch`."""
    *path, last = key.split(".")
    target: Any = values
    for part in path:
        if isinstance(target, list) and part.isdigit() and int(part) < len(target):
            target = target[int(part)]
        elif isinstance(target, dict):
            target = target.setdefault(part, {})
        else:
            raise ConfigError(f"{where}: there is no section or entry {part!r}")
    if isinstance(target, list) and last.isdigit() and int(last) < len(target):
        target[int(last)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise ConfigError(f"{where}: there is no section or entry {last!r}")


def _explain(kind: type, errors: Sequence[Mapping[str, Any]]) -> str:
    """The error that says most: a misspelt key is also a missing one, and a value that fits no
    member of a union has an error for each.
    """
    first = min(errors, key=lambda error: (error["type"] != _UNKNOWN_KEY, -len(error["loc"])))
    location = first["loc"]
    key, _ = _walk(kind, location)
    if first["type"] == _UNKNOWN_KEY:
        known = [f.name for f in fields(_walk(kind, location[:-1])[1])]
        near = get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if first["type"] in ("missing", "missing_argument"):
        if isinstance(location[-1], int):
            key, _ = _walk(kind, location[:-1])
            return f"{key!r} has too few entries, found {first['input']!r}"
        return f"the key {key!r} is missing"
    same = [e for e in errors if _walk(kind, e["loc"])[0] == key]
    same = [error for error in same if len(error["loc"]) == len(location)]
    said = dict.fromkeys(re.sub(r"^Input should be ", "", str(e["msg"])) for e in same)
    message = " or ".join(said)
    if len(said) > 1 or message != first["msg"]:
        message = f"the value should be {message}"
    found = first["input"]
    if isinstance(found, str) and _EXPONENT.fullmatch(found):
        message += " (YAML reads 2e-3 as text; write 2.0e-3)"
    return f"{key!r}: {message}, found {found!r}" if key else message


def _walk(kind: Any, location: Sequence[int | str]) -> tuple[str, Any]:
    """The dotted key, as a user writes it, and its type: without the names that pydantic gives to
    members of unions.
    """
    parts = []
    for part in location:
        kind = _without_none(kind)
        inner = [arg for arg in get_args(kind) if arg is not ...]
        if get_origin(kind) in (Union, UnionType):
            kind = next((arg for arg in inner if getattr(arg, "__name__", "") == part), inner[-1])
            continue
        hints = get_type_hints(kind) if is_dataclass(kind) else {}
        kind = hints.get(str(part)) if hints else (inner[-1] if inner else None)
        parts.append(str(part))
    return ".".join(parts), _without_none(kind)


def _without_none(kind: Any) -> Any:
    """What may be null, if it is not; pydantic gives the one member of such a union no name."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    members = [arg for arg in get_args(kind) if arg is not type(None)]
    return members[0] if len(members) == 1 else kind
