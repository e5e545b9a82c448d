"""A study on Ray Tune: one Tuner, trials that map the same tiles, a record of each in the folder.

Only a record makes a trial finished. The same command on the same folder tries what has none, so a
killed study loses the trials that were running, and no pickle of an earlier run is ever read.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from dafm_ray.config import Between, StudyConfig, parse_config, to_yaml
from dafm_ray.errors import ConfigError, MachineError, unknown
from dafm_ray.fusion.rank import singles
from dafm_ray.fusion.study import Setting, name_of, settings_of
from dafm_ray.fusion.train import open_stores, refuse_banks
from dafm_ray.fusion.trial import (
    Chance,
    Trial,
    percents,
    record_of,
    recorded,
    reporting,
    run_trial,
    summaries_of,
)
from dafm_ray.lease import writing
from dafm_ray.progress import Progress, progress, status_writer
from dafm_ray.runs import CONFIG, refuse_other
from dafm_ray.session import (
    available_cpus,
    available_gpus,
    cpu_resources,
    ensure_ray,
    one_thread,
)
from dafm_ray.storage import Storage, open_storage
from dafm_ray.tiles.store import TileStore
from dafm_ray.uris import shown

_MACHINE = frozenset({"cpus", "gpus"})
"""Keys that may change between two starts of one study."""

SCORES, ASKED = "scores.txt", "suggested.txt"
"""Digests of what the trials were made of; written when optuna has suggested enough."""

TUNE = "tune"
"""Folder of Ray Tune's own files; its name for the experiment."""


@dataclass(frozen=True)
class Studied:
    """A study brought to its end.

    Attributes:
        study: as configured.
        trials: in the order of the settings, or as they were suggested.
        alone: model -> metric -> percent, of the sub-models by themselves, and of no model under
            `chance`; on the queries that are reported on.
        first: the model that orders start with.
    """

    study: StudyConfig
    trials: tuple[Trial, ...]
    alone: dict[str, dict[str, float]]
    first: str

    @property
    def usable(self) -> list[Trial]:
        """Trials with numbers, the best first; equal ones as they were tried."""
        found = [trial for trial in self.trials if not trial.failure]
        return sorted(found, key=lambda trial: -trial.score)

    @property
    def ordered(self) -> list[Trial]:
        """All of them: the best first, failed ones last."""
        return [*self.usable, *(trial for trial in self.trials if trial.failure)]

    @property
    def keys(self) -> list[str]:
        """Everything that some setting sets."""
        return list(dict.fromkeys(key for trial in self.trials for key in trial.setting))

    @property
    def baseline(self) -> Trial:
        """The trial of the study's baseline."""
        wanted = name_of(self.study.baseline)
        return next(trial for trial in self.trials if trial.name == wanted)


def run_study(study: StudyConfig) -> Studied:
    """Try every setting that has no record yet.

    Raises:
        ConfigError: a key, value, metric or model that there is not; a folder of another study.
        DataError: a store is incomplete or damaged.
        MachineError: another run writes to the folder, or it refuses.
    """
    stores = open_stores(study.base)
    if study.kind != "static":
        refuse_banks(study.base, stores)
    reported = reporting(study, study.base) if study.base.validation_stores else stores
    systems = [*singles(reported[0]), Chance()]
    found = summaries_of([systems] * len(reported), reported)
    alone = {summary.system.name: percents(summary) for summary in found}
    known = alone[Chance.name]
    if study.metric not in known:
        raise ConfigError(f"metric: {unknown('metric', study.metric, known)}")
    models = stores[0].models
    first = study.first or max(models, key=lambda name: (alone[name][study.metric], name))
    if first not in models:
        raise ConfigError(f"first: {unknown('model', first, models)}")
    settings = settings_of(study, models, first)
    storage = open_storage(study.out)
    with writing(storage):
        _claim(study, storage, [*stores, *reported])
        names = [name_of(setting) for setting in settings]
        done = recorded(storage)
        todo = [s for s, name in zip(settings, names, strict=True) if name not in done]
        suggested = [trial for name, trial in done.items() if name not in names]
        wanted = 0 if study.search != "optuna" or _asked(storage) else study.trials
        if todo or len(suggested) < wanted:
            more = max(wanted - len(suggested), 0)
            total = len(done) + len(todo) + more
            status = status_writer(storage)
            with progress("trials", total, len(done), "trial", status) as counted:
                _try(study, todo, suggested, more, counted)
            done = recorded(storage)
        missing = [name for name in names if name not in done]
        if missing:
            raise MachineError(
                f"{len(missing)} of {len(names)} trials have no record, as after an interruption; "
                "the same command tries them, all others are kept"
            )
        if wanted:
            storage.write(ASKED, pa.py_buffer(b""))
    names += sorted(name for name in done if name not in names)
    return Studied(study, tuple(done[name] for name in names), alone, first)


def _claim(study: StudyConfig, storage: Storage, stores: Sequence[TileStore]) -> None:
    """ConfigError if the folder holds another study, or one of other scores."""
    scores = " ".join(store.scores_digest for store in stores).encode()
    with suppress(FileNotFoundError):
        written = storage.read(CONFIG).to_pybytes()
        refuse_other(written, study, _MACHINE, shown(storage.uri))
        if storage.read(SCORES).to_pybytes() != scores:
            raise ConfigError(
                f"{shown(storage.uri)} holds trials of other scores than the stores hold now; "
                "choose another `out`, or delete that folder"
            )
    storage.write(SCORES, pa.py_buffer(scores))
    storage.write(CONFIG, pa.py_buffer(to_yaml(study).encode()))


def _asked(storage: Storage) -> bool:
    """Whether optuna has suggested all it was asked for; it may suggest a setting twice."""
    try:
        storage.read(ASKED)
    except FileNotFoundError:
        return False
    return True


def _try(
    study: StudyConfig,
    todo: Sequence[Setting],
    suggested: Sequence[Trial],
    more: int,
    counted: Progress,
) -> None:
    """One Tuner over the settings without a record, another over those that optuna suggests."""
    # Relative paths of the configuration stay relative to where the job was started.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    ensure_ray()
    for what, needed, there in (
        ("CPUs", study.cpus, available_cpus()),
        ("GPUs", study.gpus, available_gpus()),
    ):
        if needed > there:
            raise ConfigError(f"a trial needs {needed:g} {what}, and the cluster has {there:g}")
    from ray import tune

    # The baseline is never given up.
    patient = [setting for setting in todo if not study.stop_early or setting == study.baseline]
    hasty = [setting for setting in todo if setting not in patient]
    for group, stops in ((patient, False), (hasty, True)):
        if group:
            _fit(study, {"setting": tune.grid_search(group)}, 1, None, stops, counted)
    if more:
        _fit(study, {}, more, _searcher(study, suggested), study.stop_early, counted)


def _fit(
    study: StudyConfig,
    space: dict[str, Any],
    samples: int,
    searcher: Any,
    stops: bool,
    counted: Progress,
) -> None:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    filesystem, path = open_storage(study.out).location
    longest = max([study.base.recipe.epochs, *_values(study, "recipe.epochs")])
    asha = ASHAScheduler(max_t=int(longest), grace_period=1, reduction_factor=3)
    tuner = tune.Tuner(
        tune.with_resources(
            _trainable(study),
            {"cpu": study.cpus, "gpu": study.gpus, **({} if study.gpus else cpu_resources())},
        ),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=samples,
            search_alg=searcher,
            scheduler=asha if stops else None,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[_followed(study, counted)],
        ),
    )
    results = tuner.fit()
    if results.errors:
        reason = str(results.errors[0]).strip().splitlines()[-1]
        raise MachineError(
            f"{len(results.errors)} trials ended without a record, the first with: {reason}. The "
            "same command tries them again; all others are kept"
        )


def _values(study: StudyConfig, key: str) -> list[float]:
    """What a key may be: of a list all, of a range its ends."""
    found: list[float] = []
    for space in study.spaces:
        values = space.get(key, ())
        found += (values.low, values.high) if isinstance(values, Between) else values
    return found


def _followed(study: StudyConfig, counted: Progress) -> Any:
    """A callback that shows progress, and records trials that a scheduler gave up."""
    from ray import tune

    class Followed(tune.Callback):  # type: ignore[misc]
        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            storage = open_storage(study.out)
            name = _trial_name(trial)
            ended = record_of(storage, name)
            if ended is None:
                last = trial.last_result
                score, seconds = float(last["score"]), round(float(last["time_total_s"]), 3)
                setting = _setting(trial.config)
                Trial(name, setting, score, seconds=seconds, stopped=True).write(storage)
            counted.advance(failures=bool(ended and ended.failure))

        def on_trial_error(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            counted.advance(failures=1)

        def __reduce__(self) -> tuple[Any, ...]:
            # Tune pickles its callbacks for a restore that is never asked for.
            return tune.Callback, ()

    return Followed()


def _trainable(study: StudyConfig) -> Any:
    # A worker starts in another folder.
    stores = [TileStore(uri).uri for uri in study.base.stores]
    others = [TileStore(uri).uri for uri in study.base.validation_stores]
    fusion = {**study.fusion, "store": stores, "validation": others}
    values = asdict(replace(study, out=open_storage(study.out).uri, fusion=fusion))

    def trial(given: dict[str, Any]) -> None:
        """The function Ray Tune runs for every setting."""
        from ray import tune

        one_thread()
        own = parse_config(StudyConfig, values, "study")
        storage = open_storage(own.out)
        run_trial(own, _setting(given), storage, lambda score: tune.report({"score": score}))

    return trial


def _setting(given: Mapping[str, Any]) -> Setting:
    setting: Setting = given.get("setting", given)
    return dict(setting)


def _trial_name(trial: Any) -> str:
    return name_of(_setting(trial.config))


def _searcher(study: StudyConfig, suggested: Sequence[Trial]) -> Any:
    """Optuna, told what was found before."""
    try:
        import optuna
    except ImportError:
        raise MachineError("search optuna needs it: pip install 'dafm-ray[optuna]'") from None
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ended = [trial for trial in suggested if not trial.failure and not trial.stopped]
    [space] = study.spaces
    domains = {}
    for key, values in space.items():
        if not isinstance(values, Between):
            domains[key] = tune.choice(list(values))
        elif values.log:
            domains[key] = tune.loguniform(values.low, values.high)
        else:
            domains[key] = tune.uniform(values.low, values.high)
    return OptunaSearch(
        domains,
        metric="score",
        mode="max",
        points_to_evaluate=[trial.setting for trial in ended] or None,
        evaluated_rewards=[trial.score for trial in ended] or None,
        seed=study.seed + len(suggested),  # or the first draws would come again
    )
