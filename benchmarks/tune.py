"""A study on Ray Tune against the same trainings in a bare loop, two at a time."""

import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path

from benchmarks.fusion import scores
from dafm_ray.config import StudyConfig
from dafm_ray.fusion.study import settings_of
from dafm_ray.fusion.trial import run_trial
from dafm_ray.fusion.tune import run_study
from dafm_ray.session import ensure_ray, one_thread
from dafm_ray.storage import open_storage

TRIALS, AT_ONCE = 16, 2
QUERIES, CANDIDATES = 1500, 1500


def overhead() -> float:
    """Wall time of a study of 16 trials, Ray being up, over that of the bare loop."""
    with scores(QUERIES, CANDIDATES) as store, tempfile.TemporaryDirectory() as folder:
        rates = tuple(0.001 * n for n in range(1, TRIALS))
        study = StudyConfig(
            "networks",
            {"store": store.uri, "recipe": {"epochs": 2}},
            str(Path(folder) / "bare"),
            ({"recipe.learning_rate": rates},),
        )
        settings = settings_of(study, store.models, store.models[0])
        assert len(settings) == TRIALS
        # As Ray does it; numpy's own threads would make the loop three times slower.
        os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
        started = time.perf_counter()
        with multiprocessing.get_context("spawn").Pool(AT_ONCE, one_thread) as pool:
            pool.starmap(_bare, [(study, setting) for setting in settings], chunksize=1)
        bare = time.perf_counter() - started
        shutil.rmtree(Path(store.uri) / "banks")  # found by the second to come
        started = time.perf_counter()
        ensure_ray()
        print(f"Ray was started in {time.perf_counter() - started:.1f} s")
        started = time.perf_counter()
        run_study(StudyConfig(study.kind, study.fusion, str(Path(folder) / "tune"), study.spaces))
        ours = time.perf_counter() - started
    print(f"{TRIALS} trials: {ours:.1f} s, in a bare loop {bare:.1f} s")
    return ours / bare


def _bare(study: StudyConfig, setting: dict[str, object]) -> None:
    run_trial(study, setting, open_storage(study.out))
