"""The `dafm` command. Imports torch and Ray only where a command needs them."""

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dafm_ray.config import (
    BANK_T,
    FOLDS,
    STATIC_FUSIONS,
    DatasetConfig,
    EvaluateConfig,
    FusionConfig,
    PrecomputeConfig,
    RetrieveConfig,
    StudyConfig,
    load_config,
)
from dafm_ray.errors import DONE, ConfigError, DataError, refusals, unknown
from dafm_ray.evaluation.submission_format import LENGTHS
from dafm_ray.finetune.config import FinetuneConfig, MineConfig
from dafm_ray.job import (
    add_config_arguments,
    add_plan_argument,
    evaluate_job,
    finetune_job,
    guarded,
    negatives_job,
    plan_job,
    precompute_job,
    retrieve_job,
    say,
    train_fusion_job,
    tune_fusion_job,
)
from dafm_ray.submit import ADDRESS, JOBS, Submission, submit
from dafm_ray.uris import is_uri, join, local_path, shown

if TYPE_CHECKING:
    from dafm_ray.fusion.base import Fusion
    from dafm_ray.tiles.store import TileStore

if TYPE_CHECKING:
    from dafm_ray.report.audits.base import Audit

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    command: Command = parsed.command
    return guarded(lambda: command(parsed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dafm", description="Composed image retrieval on Ray: run, fuse, evaluate."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = _add(commands, "demo", _demo, "the whole way on the icons, with a report")
    demo.add_argument("--out", type=_local, default=Path("runs/demo"), help="default: runs/demo")
    demo.add_argument(
        "--from-scratch", action="store_true", help="train the sub-models first (about an hour)"
    )

    precompute = _add(
        commands, "precompute", _precompute, "features and similarity tiles; resumes by itself"
    )
    add_config_arguments(precompute)
    add_plan_argument(precompute)
    for name, command, text in (
        ("retrieve", _retrieve, "rank every query with one sub-model and an index, no tiles"),
        ("finetune", _finetune, "train a sub-model on triplets"),
        ("negatives", _negatives, "the hard negatives that a fine-tune would learn from"),
    ):
        add_config_arguments(_add(commands, name, command, text))

    send = _add(commands, "submit", _submit, "run a job on a cluster; ends with its exit code")
    send.add_argument("job", choices=JOBS, help="a script of jobs/: " + ", ".join(JOBS))
    add_config_arguments(send)
    add_plan_argument(send)
    send.add_argument(
        "--address",
        default="",
        metavar="URL",
        help=f"the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, {ADDRESS}",
    )
    send.add_argument(
        "--working-dir",
        type=_local,
        default=Path(),
        metavar="DIR",
        help="the repository; default: .",
    )
    send.add_argument("--runtime-env", type=Path, metavar="FILE", help="as deploy/runtime_env.yaml")
    for what in ("cpus", "gpus"):
        send.add_argument(
            f"--{what}",
            type=float,
            default=0,
            metavar="N",
            help="of the job's own process; default: 0, which is on the head",
        )

    evaluate = _add(commands, "evaluate", _evaluate, "metrics, tables and the report of a store")
    evaluate.add_argument(
        "store",
        nargs="+",
        help="folder or URI of a store; several, as FashionIQ's categories, give one report",
    )
    evaluate.add_argument("--out", required=True, help="folder or URI of the results")
    evaluate.add_argument(
        "--models",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="which models of the store; default: all",
    )
    evaluate.add_argument(
        "--fusion",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="static fusions, any system with +bank, folders or URIs of trained fusions; default: "
        + " ".join(STATIC_FUSIONS),
    )
    _add_tuning_argument(evaluate)
    _add_bank_argument(evaluate)
    evaluate.add_argument(
        "--against", default="", metavar="RUN", help="an earlier evaluation of the same queries"
    )
    evaluate.add_argument(
        "--chance", action="store_true", help="compare every model with a random order"
    )
    evaluate.add_argument(
        "--start",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=START",
        help="models and what they were fine-tuned from, to compare with it and with chance",
    )
    evaluate.add_argument(
        "--study",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="finished studies of orders, whose figure is shown",
    )
    evaluate.add_argument("--cases", type=int, default=12, help="queries shown with pictures")

    fuse = _group(commands, "fuse", "learned fusions")
    train = _add(fuse, "train", _fuse_train, "LightFusion on Ray Train, with a report")
    add_config_arguments(train)
    tune = _add(fuse, "tune", _fuse_tune, "a study on Ray Tune, with a report; resumes by itself")
    add_config_arguments(tune)
    onnx = _add(fuse, "export", _fuse_export, "a trained fusion as an ONNX graph")
    onnx.add_argument("fusion", help="folder or URI of a trained fusion")
    onnx.add_argument(
        "--to", default="", metavar="FILE", help="path or URI; default: fusion.onnx in that folder"
    )

    rank = _add(commands, "rank", _rank, "the first candidates of every query, as Parquet")
    _add_system_arguments(rank)
    rank.add_argument("--top", type=int, default=50, metavar="K", help="default: 50")
    rank.add_argument("--out", required=True, metavar="FILE", help="a Parquet file, or a URI")

    search = _add(commands, "search", _search, "one query: an image and what shall differ")
    search.add_argument("store")
    search.add_argument("--image", required=True, type=_local, metavar="FILE", help="the reference")
    search.add_argument("--text", required=True, nargs="+", help="what the wanted one differs in")
    search.add_argument(
        "--fusion", default="mean@zscore", metavar="NAME", help="as for `dafm rank`"
    )
    search.add_argument("--top", type=int, default=10, metavar="K", help="default: 10")
    search.add_argument(
        "--reference",
        default="",
        metavar="ID",
        help="of the image, if it is in the gallery: it is left out, and compared with",
    )
    search.add_argument(
        "--exclude", nargs="+", default=[], metavar="ID", help="gallery images to leave out"
    )
    _add_bank_argument(search)
    search.add_argument(
        "--out",
        type=_local,
        default=Path("search.html"),
        metavar="FILE",
        help="page with the pictures; default: search.html",
    )

    audit = _group(commands, "audit", "what may make a number say more than it does")
    order = _add(audit, "order", _audit_order, "what positions alone find")
    order.add_argument("what", metavar="STORE|DATASET", help="or cirr, fashioniq, icons, folder")
    for name in ("split", "category", "annotations", "root"):
        order.add_argument(f"--{name}", default="", help="of that data set")
    equal = _add(audit, "ties", _audit_ties, "what the order of equal scores decides")
    twins = _add(audit, "duplicates", _audit_duplicates, "candidates and queries that are the same")
    alone = _add(audit, "modality", _audit_modality, "what the image or the text alone solves")
    alone.add_argument("--image-only", default="", metavar="MODEL", help="that sees no text")
    alone.add_argument("--text-only", default="", metavar="MODEL", help="that sees no image")
    short = _add(audit, "shortlist", _audit_shortlist, "what ranking shortlists loses")
    short.add_argument(
        "--whole", required=True, metavar="STORE", help="the scores of all candidates"
    )
    short.add_argument("--fusion", default="mean@zscore", metavar="NAME", help="as for `dafm rank`")
    seen = _add(audit, "stacking", _audit_stacking, "whether models have seen these queries")
    seen.add_argument(
        "--held-out", default="", metavar="STORE", help="queries that no model has seen"
    )
    for each in (equal, twins, alone, short, seen):
        each.add_argument("store")
    for each in (order, equal, twins, alone, short, seen):
        each.add_argument("--json", type=_local, metavar="FILE", help="all of it, for machines")

    data = _group(commands, "data", "data sets")
    check = _add(data, "check", _data_check, "what is wrong, or odd, about a data set")
    check.add_argument("name", help="cirr, fashioniq, icons or folder")
    check.add_argument("--root", default="", metavar="DIR", help="folder or URI of images")
    check.add_argument("--annotations", default="", metavar="DIR", help="default: --root")
    check.add_argument("--images", default="", metavar="SHARDS", help="tar or Parquet shards")
    check.add_argument("--split", default="", help="default: every split")
    check.add_argument("--category", default="", help="default: every category")
    check.add_argument("--json", type=_local, metavar="FILE", help="all findings, for machines")
    make = _add(data, "make", _data_make, "the icons in the layout of another data set")
    make.add_argument("layout", help="cirr-like or fashioniq-like")
    make.add_argument("--from", dest="source", default="icons", help="icons, the only source")
    make.add_argument("--out", required=True, type=_local, metavar="DIR", help="a new folder")

    submission = _group(commands, "submission", "files for the CIRR test server")
    write = _add(submission, "write", _submission_write, "what a system ranks, as server files")
    _add_system_arguments(write)
    write.add_argument("--metric", choices=LENGTHS, help="one file alone")
    write.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="or URI; gets a file a metric, METRIC.json",
    )
    files = _add(submission, "check", _submission_check, "what is wrong with server files")
    files.add_argument("file", nargs="+", type=_local, help=".json or .json.gz")
    files.add_argument("--annotations", default="", metavar="DIR", help="of CIRR")
    files.add_argument("--split", default="", help="of the annotations; default: test1")

    tiles = _group(commands, "tiles", "look into a store, bring scores in and out")
    _add(tiles, "info", _tiles_info, "what is in a store").add_argument("store")
    bank = _add(tiles, "bank", _tiles_bank, "statistics of a query bank, kept beside the tiles")
    bank.add_argument("store")
    bank.add_argument("--t", type=float, default=BANK_T, help=f"default: {BANK_T}")
    bank.add_argument("--folds", type=int, default=FOLDS, help=f"default: {FOLDS}")
    bank.add_argument("--seed", type=int, default=0, help="of the folds; default: 0")
    verify = _add(tiles, "verify", _tiles_verify, "check every checksum")
    verify.add_argument("store")
    verify.add_argument(
        "--repair", action="store_true", help="drop unsound tiles, so that precompute makes them"
    )

    ingest = _add(tiles, "ingest", _tiles_ingest, "scores made elsewhere become a store")
    ingest.add_argument("scores", help="score folder, or a file of `tiles export`")
    ingest.add_argument("--out", required=True, metavar="STORE", help="folder or URI of the store")
    ingest.add_argument(
        "--dataset", default="", metavar="NAME", help="take queries and gallery from annotations"
    )
    for name in ("split", "category", "annotations", "root"):
        ingest.add_argument(f"--{name}", default="", help="of that data set")
    export = _add(tiles, "export", _tiles_export, "one Parquet file, a row a query")
    export.add_argument("store")
    export.add_argument("--to", required=True, metavar="FILE", help="path or URI")

    models = _group(commands, "models", "the sub-models")
    _add(models, "list", _models_list, "families that can be loaded")
    describe = _add(models, "describe", _models_describe, "what a family reads and costs")
    describe.add_argument("name", help="family or family:variant")
    fits = _add(models, "check", _models_check, "what a weights file holds, and whether it fits")
    fits.add_argument("name", help="family:variant")
    fits.add_argument("--weights", required=True, metavar="FILE", help="as in a model id")

    _add(commands, "env", _env, "versions and machine, for a bug report")
    return parser


def _local(text: str) -> Path:
    """A path on this machine, for argparse; a URI would become a folder called `s3:`."""
    if is_uri(text):
        raise argparse.ArgumentTypeError(f"{shown(text)} is a URI; name a local path")
    return local_path(text)


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    command: Command,
    text: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=command)
    return parser


def _add_system_arguments(parser: argparse.ArgumentParser) -> None:
    """A store and the one system that ranks it, for `_store_and_system`."""
    parser.add_argument("store")
    ranks_by = parser.add_mutually_exclusive_group()
    ranks_by.add_argument(
        "--fusion",
        default="mean@zscore",
        metavar="NAME",
        help="a static fusion, a sub-model, either with +bank, or the folder or URI of a trained "
        "fusion; default: mean@zscore",
    )
    _add_tuning_argument(ranks_by)
    _add_bank_argument(parser)


def _add_tuning_argument(parser: "argparse._ActionsContainer") -> None:
    parser.add_argument(
        "--tune-on",
        nargs="+",
        action="extend",
        default=[],
        metavar="STORE",
        help="other queries on which to search convex weights",
    )


def _add_bank_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bank",
        default="",
        metavar="STORE",
        help="other queries over the same gallery, of which query banks are made; default: the "
        "store's own queries, each without its fold",
    )


def _group(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str
) -> "argparse._SubParsersAction[argparse.ArgumentParser]":
    group = commands.add_parser(name, help=text, description=text)
    return group.add_subparsers(required=True, metavar="COMMAND")


def _demo(arguments: argparse.Namespace) -> int:
    from dafm_ray.demo.run import run_demo
    from dafm_ray.report.tables import to_markdown

    evaluation = run_demo(arguments.out, arguments.from_scratch, say)
    print(to_markdown(evaluation.table))
    print("\n".join(evaluation.notes))
    print(f"report: {Path(evaluation.report).resolve()}")
    return DONE


def _precompute(arguments: argparse.Namespace) -> int:
    job = plan_job if arguments.plan else precompute_job
    return job(load_config(PrecomputeConfig, arguments.config, arguments.set))


def _finetune(arguments: argparse.Namespace) -> int:
    return finetune_job(load_config(FinetuneConfig, arguments.config, arguments.set))


def _retrieve(arguments: argparse.Namespace) -> int:
    return retrieve_job(load_config(RetrieveConfig, arguments.config, arguments.set))


def _negatives(arguments: argparse.Namespace) -> int:
    return negatives_job(load_config(MineConfig, arguments.config, arguments.set))


def _submit(arguments: argparse.Namespace) -> int:
    submission = Submission(
        arguments.job,
        Path(arguments.config),
        arguments.set,
        arguments.working_dir,
        arguments.runtime_env,
        arguments.cpus,
        arguments.gpus,
        arguments.plan,
    )
    return submit(submission, arguments.address, lambda text: print(text, end="", flush=True))


def _evaluate(arguments: argparse.Namespace) -> int:
    return evaluate_job(
        EvaluateConfig(
            store=tuple(arguments.store),
            out=arguments.out,
            models=tuple(arguments.models),
            fusions=tuple(arguments.fusion or STATIC_FUSIONS),
            tune_on=tuple(arguments.tune_on),
            bank=arguments.bank,
            against=arguments.against,
            chance=arguments.chance,
            starts=_starts(arguments.start),
            studies=tuple(arguments.study),
            cases=arguments.cases,
        )
    )


def _starts(given: Sequence[str]) -> dict[str, str]:
    starts: dict[str, str] = {}
    for pair in given:
        name, _, start = pair.partition("=")
        if not name or not start:
            raise ConfigError(f"--start {pair!r}: write NAME=START, both models of the store")
        if starts.setdefault(name, start) != start:
            raise ConfigError(f"--start: {name!r} has two starts, {starts[name]} and {start}")
    return starts


def _fuse_train(arguments: argparse.Namespace) -> int:
    return train_fusion_job(load_config(FusionConfig, arguments.config, arguments.set))


def _fuse_tune(arguments: argparse.Namespace) -> int:
    return tune_fusion_job(load_config(StudyConfig, arguments.config, arguments.set))


def _fuse_export(arguments: argparse.Namespace) -> int:
    from dafm_ray.fusion.artefact import load_artefact
    from dafm_ray.fusion.onnx import export_onnx
    from dafm_ray.storage import result_file

    where = arguments.to or join(arguments.fusion, "fusion.onnx")
    with result_file(where) as file:
        export_onnx(load_artefact(arguments.fusion), file)
    print(shown(where))
    return DONE


def _rank(arguments: argparse.Namespace) -> int:
    from dafm_ray.fusion.rankings import write_rankings
    from dafm_ray.storage import result_file

    if arguments.top < 1:
        raise ConfigError(f"--top must be at least 1, not {arguments.top}")
    store, system = _store_and_system(arguments)
    with result_file(arguments.out) as file:
        write_rankings(store, system, arguments.top, file)
    print(f"{shown(arguments.out)}: {system.name}")
    return DONE


def _store_and_system(arguments: argparse.Namespace) -> "tuple[TileStore, Fusion]":
    from dafm_ray.fusion.systems import Maker, open_for, tuned_on
    from dafm_ray.report.stores import refuse_leaks
    from dafm_ray.tiles.store import TileStore

    name, tuned = arguments.fusion, None
    store = open_for(name, arguments.store)
    if arguments.tune_on:
        others = [TileStore(uri) for uri in arguments.tune_on]
        refuse_leaks([store], others)
        tuned = tuned_on(others)
        name = tuned[0].name
    made = Maker([name], bank_source=arguments.bank, tuned=tuned).on(store)
    say(*made.notes)
    return store, made.systems[-1]


def _submission_write(arguments: argparse.Namespace) -> int:
    from dafm_ray.fusion.submit import write_submission
    from dafm_ray.storage import results

    store, system = _store_and_system(arguments)
    metrics = [arguments.metric] if arguments.metric else list(LENGTHS)
    with results(arguments.out, "") as folder:
        checks = write_submission(store, system, folder, metrics)
    print(f"{shown(arguments.out)}: {system.name}")
    for file, checked in checks.items():
        for line in checked.lines():
            print(f"{shown(join(arguments.out, file.name))}: {line}")
    return DONE


def _submission_check(arguments: argparse.Namespace) -> int:
    from dafm_ray.datasets.registry import read_dataset
    from dafm_ray.evaluation.submission import check_submission

    queries, gallery_ids = None, None
    if arguments.annotations:
        split = arguments.split or "test1"
        named = DatasetConfig("cirr", split, annotations=arguments.annotations)
        dataset = read_dataset(named).dataset()
        queries, gallery_ids = dataset.queries, dataset.gallery.ids
    elif arguments.split:
        raise ConfigError("--split says nothing without --annotations DIR")
    faulty = False
    for file in arguments.file:
        checked = check_submission(file, queries, gallery_ids)
        faulty |= bool(checked.faults)
        for line in checked.lines():
            print(f"{file}: {line}")
    return DataError.exit_code if faulty else DONE


def _search(arguments: argparse.Namespace) -> int:
    from dafm_ray.datasets.images import decode
    from dafm_ray.fusion.search import search
    from dafm_ray.fusion.systems import Maker, open_for
    from dafm_ray.report.answer import answer_page

    if not arguments.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: there is no such folder")
    try:
        image = decode(arguments.image.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {arguments.image}: {error.strerror}") from None
    except DataError as error:
        raise DataError(f"{arguments.image}: {error}") from None
    store = open_for(arguments.fusion, arguments.store)
    made = Maker([arguments.fusion], bank_source=arguments.bank).on(store)
    system = made.systems[-1]
    found = search(
        store,
        system,
        image,
        arguments.text,
        arguments.top,
        arguments.exclude,
        arguments.reference,
    )
    say(*made.notes)
    for one in found:
        print(f"{one.rank:4}  {one.score:9.4f}  {one.id}")
    page = answer_page(store, system.name, image, arguments.text, found, made.notes)
    with refusals(arguments.out):
        arguments.out.write_text(page, encoding="utf-8")
    print(f"pictures: {arguments.out.resolve()}")
    return DONE


def _audit_order(arguments: argparse.Namespace) -> int:
    from dafm_ray.report.audits.order import audit_order

    keys = ("split", "category", "annotations", "root")
    named = DatasetConfig("", **{key: getattr(arguments, key) for key in keys})
    return _audited(audit_order(arguments.what, named), arguments.json)


def _audit_ties(arguments: argparse.Namespace) -> int:
    from dafm_ray.report.audits.ties import audit_ties
    from dafm_ray.tiles.store import TileStore

    return _audited(audit_ties(TileStore(arguments.store)), arguments.json)


def _audit_duplicates(arguments: argparse.Namespace) -> int:
    from dafm_ray.report.audits.duplicates import audit_duplicates
    from dafm_ray.tiles.store import TileStore

    return _audited(audit_duplicates(TileStore(arguments.store)), arguments.json)


def _audit_modality(arguments: argparse.Namespace) -> int:
    from dafm_ray.report.audits.modality import audit_modality
    from dafm_ray.tiles.store import TileStore

    store = TileStore(arguments.store)
    found = audit_modality(store, arguments.image_only, arguments.text_only)
    return _audited(found, arguments.json)


def _audit_shortlist(arguments: argparse.Namespace) -> int:
    from dafm_ray.report.audits.shortlist import audit_shortlist
    from dafm_ray.tiles.store import TileStore

    short, whole = TileStore(arguments.store), TileStore(arguments.whole)
    return _audited(audit_shortlist(short, whole, arguments.fusion), arguments.json)


def _audit_stacking(arguments: argparse.Namespace) -> int:
    from dafm_ray.report.audits.stacking import audit_stacking
    from dafm_ray.tiles.store import TileStore

    held_out = TileStore(arguments.held_out) if arguments.held_out else None
    return _audited(audit_stacking(TileStore(arguments.store), held_out), arguments.json)


def _audited(found: "Audit", file: Path | None) -> int:
    from dafm_ray.markdown import markdown_table

    table = found.table
    print(markdown_table(table.header, table.shown, table.words))
    print(f"\n{table.text}\n" + "\n".join(found.notes))
    if file is not None:
        with refusals(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            content = {"what": found.what, "notes": found.notes, **found.details}
            file.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return DataError.exit_code if found.leaks else DONE


def _data_check(arguments: argparse.Namespace) -> int:
    from dafm_ray.datasets.check import check
    from dafm_ray.datasets.check_table import to_json, to_text

    keys = ("name", "split", "root", "annotations", "category", "images")
    found = check(DatasetConfig(**{key: getattr(arguments, key) for key in keys}))
    print(to_text(found))
    if arguments.json:
        with refusals(arguments.json):
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(to_json(found), indent=1) + "\n", "utf-8")
    return DataError.exit_code if found.changes_metric else DONE


def _data_make(arguments: argparse.Namespace) -> int:
    from dafm_ray.datasets.make import LAYOUTS

    if arguments.layout not in LAYOUTS:
        raise ConfigError(unknown("layout", arguments.layout, LAYOUTS))
    if arguments.source != "icons":
        raise ConfigError(unknown("source", arguments.source, ["icons"]))
    LAYOUTS[arguments.layout](arguments.out)
    print(f"{arguments.out}: the icons in the layout of {arguments.layout.removesuffix('-like')}")
    return DONE


def _tiles_ingest(arguments: argparse.Namespace) -> int:
    from dafm_ray.tiles.ingest import ingest

    named = None
    keys = ("split", "category", "annotations", "root")
    given = [f"--{key}" for key in keys if getattr(arguments, key)]
    if given and not arguments.dataset:
        raise ConfigError(f"{given[0]} says nothing without --dataset NAME")
    if arguments.dataset:
        named = DatasetConfig(arguments.dataset, **{key: getattr(arguments, key) for key in keys})
    done = ingest(arguments.scores, arguments.out, named)
    say(*done.notes)
    store = done.store
    print(
        f"{shown(store.uri)}: {store.size('queries')} queries, {store.size('gallery')} candidates"
    )
    for system in done.coverage:
        scored = f"{100 * (1 - system.missing):.1f} % of the pairs scored"
        empty = f", {system.empty_queries} queries without any" if system.empty_queries else ""
        print(f"{system.model}: {system.dtype}, {scored}{empty}")
    return DONE


def _tiles_export(arguments: argparse.Namespace) -> int:
    from dafm_ray.storage import result_file
    from dafm_ray.tiles.export import export
    from dafm_ray.tiles.store import TileStore

    with result_file(arguments.to) as file:
        export(TileStore(arguments.store), str(file))
    print(shown(arguments.to))
    return DONE


def _tiles_info(arguments: argparse.Namespace) -> int:
    from dafm_ray.tiles.store import TileStore

    store = TileStore(arguments.store)
    manifest = store.manifest
    print(f"{shown(store.uri)}: {manifest.title}, protocol {manifest.protocol}")
    listed = f", shortlists of the first {manifest.shortlist}" if manifest.shortlist else ""
    print(
        f"{manifest.queries_size} queries x {manifest.gallery_size} images, "
        f"{manifest.score_type}, tiles {manifest.grid.tile_queries} x "
        f"{manifest.grid.tile_candidates}{listed}"
    )
    done = store.finished()
    for name in store.models:
        keys = store.score_keys(name)
        finished = sum(key in done for key in keys)
        entry = manifest.models[name]
        encoding = f", {entry.encoding}" if entry.encoding else ""
        print(f"{name}: {finished} of {len(keys)} tiles, {entry.id}{encoding}")
    print(f"{len(store.failures())} items in quarantine")
    return DONE


def _tiles_bank(arguments: argparse.Namespace) -> int:
    from dafm_ray.fusion.bank import own_bank
    from dafm_ray.fusion.folds import bank_folds
    from dafm_ray.tiles.store import TileStore

    store = TileStore(arguments.store)
    store.refuse_incomplete()
    fold_of_Q = bank_folds(store.queries, arguments.folds, arguments.seed)
    bank = own_bank(store, fold_of_Q, arguments.t, profiles=True)
    print(f"{shown(store.uri)}: {bank.note}")
    for name, hubs_N in zip(bank.models, bank.without(), strict=True):
        most = ", ".join(store.gallery_ids[n] for n in hubs_N.argsort()[::-1][:3])
        print(f"{name}: hub statistics from {hubs_N.min():.2f} to {hubs_N.max():.2f} ({most})")
    return DONE


def _tiles_verify(arguments: argparse.Namespace) -> int:
    from dafm_ray.lease import writing
    from dafm_ray.tiles.store import TileStore

    store = TileStore(arguments.store)
    if arguments.repair:
        with writing(store.storage):
            for path in store.repair():
                print(f"{path}: dropped")
    checked, problems = 0, 0
    for path, problem in store.verify():
        checked += 1
        if problem:
            problems += 1
            print(f"{path}: {problem}")
    if problems:
        raise DataError(
            f"{problems} of {checked} files of {store.uri} are not sound; run "
            "`dafm tiles verify --repair`, then `dafm precompute` (or `dafm tiles ingest`) again"
        )
    missing = len(store.missing())
    print(
        f"{shown(store.uri)}: {checked} files, every checksum holds; {missing} tiles not computed "
        "yet"
    )
    return DONE


def _models_list(arguments: argparse.Namespace) -> int:
    from dafm_ray.models.registry import families

    for name, where in sorted(families().items()):
        print(f"{name:12} {where}")
    return DONE


def _models_describe(arguments: argparse.Namespace) -> int:
    from dafm_ray.models.describe import describe

    for line in describe(arguments.name):
        print(line)
    return DONE


def _models_check(arguments: argparse.Namespace) -> int:
    from dafm_ray.models.describe import check

    for line in check(arguments.name, arguments.weights):
        print(line)
    return DONE


def _env(arguments: argparse.Namespace) -> int:
    from dafm_ray.tiles.manifest import library_versions

    print(f"python {platform.python_version()}, {platform.platform()}, {platform.machine()}")
    for name, version in library_versions().items():
        print(f"{name} {version}")
    return DONE
