"""What every job script shares: `--config FILE --set key=value`, messages, exit codes."""

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from dafm_ray.config import (
    EvaluateConfig,
    FusionConfig,
    PrecomputeConfig,
    RetrieveConfig,
    StudyConfig,
    load_config,
)
from dafm_ray.errors import DONE, DONE_WITH_FAILURES, DafmError
from dafm_ray.finetune.config import FinetuneConfig, MineConfig
from dafm_ray.uris import above, join, shown

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from dafm_ray.report.evaluate import Evaluation

Config = TypeVar("Config")

INTERRUPTED = 130


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The two arguments of every job."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the job")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, as dataset.split=val; may be given several times",
    )


def run_job(
    kind: type[Config],
    job: Callable[[Config], int],
    plan: Callable[[Config], int] | None = None,
) -> int:
    """Parse the command line of a job script, run it, return its exit code.

    Args:
        kind: of its configuration.
        job: what it does.
        plan: what it does with `--plan` instead, if it has that.
    """
    parser = argparse.ArgumentParser(description=job.__doc__)
    add_config_arguments(parser)
    if plan is not None:
        add_plan_argument(parser)
    arguments = parser.parse_args()
    chosen = plan if plan is not None and arguments.plan else job
    return guarded(lambda: chosen(load_config(kind, arguments.config, arguments.set)))


def add_plan_argument(parser: argparse.ArgumentParser) -> None:
    """`--plan` of a precompute."""
    parser.add_argument(
        "--plan",
        action="store_true",
        help="say what it would take on this cluster (time, storage, what limits it) and stop",
    )


def guarded(action: Callable[[], int]) -> int:
    """Run; a user's mistake ends in its message and exit code, without a traceback."""
    try:
        return action()
    except DafmError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted; finished work is kept, the same command goes on from here")
        return INTERRUPTED


def say(*lines: str) -> None:
    """Messages for people go to standard error; results go to standard output. Credentials that a
    URI holds are left out.
    """
    for line in lines:
        print(shown(line), file=sys.stderr, flush=True)


def precompute_job(config: PrecomputeConfig) -> int:
    """Write the features and similarity tiles of a data set under several sub-models."""
    from dafm_ray.tiles.precompute import QUARANTINE, precompute

    outcome = precompute(config)
    store = outcome.store
    print(
        f"{shown(store.uri)}: {len(store.models)} models, {store.size('queries')} queries, "
        f"{store.size('gallery')} images; {outcome.blocks} blocks computed now"
    )
    for model, texts in outcome.cut.items():
        where = shown(join(store.uri, "cut"))
        say(f"{model} reads {texts} texts cut, they are too long for it; see {where}")
    return _exit_code(len(outcome.failures), shown(join(store.uri, QUARANTINE)))


def plan_job(config: PrecomputeConfig) -> int:
    """Say what a precompute would take on this cluster; nothing is written."""
    from dafm_ray.datasets.registry import load_dataset
    from dafm_ray.tiles.plan import plan

    print("\n".join(plan(config, load_dataset(config.dataset)).lines()))
    return DONE


def retrieve_job(config: RetrieveConfig) -> int:
    """Rank every query of a data set with one sub-model and an exact index of the gallery."""
    from dafm_ray.search.encode import QUARANTINE
    from dafm_ray.search.retrieve import METRICS, RANKINGS, retrieve

    with _alone(config.out):
        found = retrieve(config)
    counted, measured = found.metrics, found.latency
    if counted["queries"]:
        percents = "  ".join(f"{name} {value:.1f}" for name, value in counted["metrics"].items())
        print(f"protocol {counted['protocol']}, {counted['queries']} queries: {percents}")
    if counted["texts_cut"]:
        say(
            f"{len(counted['texts_cut'])} texts are too long for the model and were cut; their "
            f"queries stand in {shown(join(found.out, METRICS))} (texts_cut)"
        )
    print(f"index of {measured['gallery']} images, {measured['index']}")
    for part in ("encode", "search"):
        spent = "  ".join(f"{name} {ms:.2f} ms" for name, ms in measured[f"{part}_ms"].items())
        print(
            f"{part}, one query at a time: {spent} "
            f"({measured['queries']} queries, {measured['device']}, {measured['threads']} threads)"
        )
    print(f"rankings: {shown(join(found.out, RANKINGS))}")
    return _exit_code(found.failures, shown(join(found.out, QUARANTINE)))


def evaluate_job(config: EvaluateConfig) -> int:
    """Evaluate the sub-models and fusions of a store; write metrics, tables and a report."""
    from dafm_ray.report.evaluate import evaluate

    with _alone(config.out):
        return _shown(evaluate(config))


def train_fusion_job(config: FusionConfig) -> int:
    """Train a fusion on the scores of a store, and report on queries it did not learn from."""
    from dafm_ray.fusion.artefact import record_metrics
    from dafm_ray.fusion.train import train_fusion
    from dafm_ray.report.evaluate import evaluate

    out = train_fusion(config)
    reported = config.validation_stores or config.stores
    evaluation = evaluate(
        EvaluateConfig(
            store=reported,
            out=join(out, "report"),
            fusions=("mean@zscore", out),
            cases=config.cases,
            seed=config.seed,
            models=config.models,
        )
    )
    record_metrics(out, {row.name: row.metrics for row in evaluation.table.rows})
    print(f"fusion: {shown(out)}")
    return _shown(evaluation)


def tune_fusion_job(config: StudyConfig) -> int:
    """Sweep over fusions: settings of a network, subsets and orders of models, static fusions."""
    from dafm_ray.report.study import report_study

    report = report_study(config)
    print(report.table)
    print("\n".join(report.notes))
    print(f"study: {shown(report.out)}")
    return _exit_code(report.failures, join(report.out, "trials.csv"))


def finetune_job(config: FinetuneConfig) -> int:
    """Train a sub-model on triplets."""
    from dafm_ray.finetune.trainer import UNFIT, finetune

    trained = finetune(config)
    print(f"weights: {shown(str(trained.weights))}")
    listed = shown(join(above(str(trained.weights)), UNFIT))
    cut = len(trained.unfit) - trained.left_out
    if cut:
        say(
            f"{cut} texts are longer than the model reads and were cut; they are listed in {listed}"
        )
    return _exit_code(trained.left_out, listed)


def negatives_job(config: MineConfig) -> int:
    """Mine the hard negatives of every query, and count what each rule takes out."""
    from dafm_ray.finetune.mining import NEGATIVES, mine_negatives
    from dafm_ray.search.encode import QUARANTINE

    with _alone(config.out):
        found = mine_negatives(config)
    counts = found.counts
    print(f"index of {counts['gallery']} images, {counts['index']}")
    print(f"{counts['negatives']} negatives of {counts['queries']} queries")
    for rule, removed in counts["removed"].items():
        print(f"{removed:10}  taken out: {rule}")
    print(f"{len(counts['without']):10}  queries left without any")
    print(f"negatives: {shown(join(found.out, NEGATIVES))}")
    return _exit_code(found.failures, shown(join(found.out, QUARANTINE)))


def _alone(out: str) -> "AbstractContextManager[None]":
    """While it is held, a second job with the same `out` is refused."""
    from dafm_ray.lease import writing
    from dafm_ray.storage import open_storage

    return writing(open_storage(out))


def _shown(evaluation: "Evaluation") -> int:
    from dafm_ray.report.tables import to_markdown

    print(to_markdown(evaluation.table))
    print("\n".join(evaluation.notes))
    report = shown(str(evaluation.report))
    print(f"report: {report}")
    return _exit_code(evaluation.failures, report)


def _exit_code(failures: int, where: str) -> int:
    if not failures:
        return DONE
    say(f"{failures} items could not be used; they are listed in {where}")
    return DONE_WITH_FAILURES
