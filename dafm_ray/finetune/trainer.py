"""Training of a sub-model on Ray Train, whatever it learns from.

The batch is global: with several workers every query meets the targets of all of them. A run of the
same output folder goes on from its last checkpoint.
"""

import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from dafm_ray.config import parse_config
from dafm_ray.datasets.base import label_of
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.files import write_csv, write_text
from dafm_ray.finetune.config import FinetuneConfig
from dafm_ray.finetune.contrast import InBatch, loss_weights
from dafm_ray.finetune.dpo import Preference
from dafm_ray.finetune.inversion import Inversion
from dafm_ray.finetune.objective import Objective, several_workers
from dafm_ray.finetune.step import step
from dafm_ray.finetune.triplets import LEFT_OUT, Unfit
from dafm_ray.finetune.validation import validation_recall
from dafm_ray.models.base import FrozenModel
from dafm_ray.models.checkpoints import TRAINED_ON, trained_on
from dafm_ray.models.registry import resolve
from dafm_ray.runs import claimed, refuse_larger, run_workers, write_status
from dafm_ray.session import ensure_ray
from dafm_ray.storage import Storage, open_storage, results

SELECTION = "R@10"
WEIGHTS = "weights.safetensors"
UNFIT = "unfit.csv"
"""What training could not use as it is, beside the weights."""

_MACHINE = frozenset({"workers", "cpus_per_worker", "use_gpu", "loader_workers", "out"})
"""Keys that may change between two starts of one run."""
State = dict[str, Any]
Report = Callable[[dict[str, float], State], None]
Measured = tuple[dict[str, float], list[Unfit]]


def build(config: FinetuneConfig) -> FrozenModel:
    """The model in its starting state; only `config.parts` take gradients.

    Raises:
        ConfigError: a part that names nothing, or the family cannot be trained.
        DataError: fewer triplets than a batch.
    """
    found, model_id = resolve(config.model)
    queries = [query for data in config.trained_on for query in load_dataset(data).queries]
    labelled = sum(bool(query.targets) for query in queries)
    if labelled < config.batch_size:
        raise DataError(
            f"{labelled} triplets do not fill one batch of {config.batch_size}; lower batch_size"
        )
    model = found.start(model_id, config.scratch, [q.captions for q in queries], config.seed)
    loss_weights(model, config.loss)
    names = [name for name, _ in model.module.named_parameters()]
    for part in config.parts:
        if not any(_is_below(name, (part,)) for name in names):
            offered = sorted({name.split(".")[0] for name in names})
            raise ConfigError(f"parts: {part!r} names no parameter; choose among {offered}")
    for name, parameter in model.module.named_parameters():
        parameter.requires_grad_(_is_below(name, config.parts))
    return model


def _is_below(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a parameter or module is one of the parts or belongs to one; "" is everything."""
    return any(part in ("", name) or name.startswith(f"{part}.") for part in parts)


def train(
    config: FinetuneConfig,
    model: FrozenModel,
    prepare: Callable[[nn.Module], nn.Module],
    report: Report,
    state: State | None = None,
    rank: int = 0,
) -> None:
    """Train and validate, epoch by epoch.

    Args:
        config: the job.
        model: from `build`, on its device.
        prepare: wraps the loss for gradient synchronisation.
        report: receives metrics and the state to resume from, after every epoch.
        state: of an earlier run.
        rank: of this worker.

    Raises:
        DataError: a loss that is no longer a number.
    """
    objective = objective_of(config, model, rank)
    steps = objective.steps
    if not steps:
        raise DataError(
            f"the triplets that can be used do not fill one batch of {config.batch_size}; lower "
            f"batch_size ({len(objective.unfit)} queries are left out or cut)"
        )
    validation = [load_dataset(data) for data in config.validated_on]
    device = str(objective.device)
    forward = prepare(objective)
    learning = [p for p in model.module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        learning,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    schedule = _schedule(optimiser, config, steps)
    scaler = torch.amp.GradScaler(objective.device.type, enabled=config.precision == "fp16")
    unfit = set(objective.unfit)
    progress = {"epoch": 0, "best": -1.0, "stale": 0}
    best = _weights(model, config.parts)
    if state is not None:
        model.module.load_state_dict(state["weights"], strict=False)
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        scaler.load_state_dict(state["scaler"])
        objective.restore(state["objective"])
        progress, best = state["progress"], state["best"]
        unfit |= {Unfit(*one) for one in state["unfit"]}
    while progress["epoch"] < config.epochs and progress["stale"] < config.patience:
        epoch = int(progress["epoch"])
        torch.manual_seed(config.seed * 100_003 + epoch * 101 + rank)
        _learning_mode(model, config.parts)
        objective.begin(epoch)
        unfit.update(objective.unfit)
        losses = []
        for batch in objective.batches(epoch):
            unfit.update(batch.unfit)
            losses.append(
                step(
                    forward,
                    objective,
                    batch,
                    optimiser,
                    scaler,
                    config.chunk,
                    config.gradient_clip,
                )
            )
            schedule.step()
        model.module.eval()
        recall, unseen = _agreed(lambda: validation_recall(model, validation, device))
        unfit = _everyones({*unfit, *unseen})
        better = recall[SELECTION] > progress["best"]
        if better:
            best = _weights(model, config.parts)
        progress = {
            "epoch": epoch + 1,
            "best": max(recall[SELECTION], progress["best"]),
            "stale": 0 if better else progress["stale"] + 1,
        }
        report(
            {"epoch": epoch + 1, "loss": sum(losses) / len(losses), **recall},
            {
                "weights": _weights(model, config.parts),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
                "scaler": scaler.state_dict(),
                "objective": objective.kept(),
                "progress": progress,
                "best": best,
                "unfit": sorted(astuple(one) for one in unfit),
            },
        )


def objective_of(config: FinetuneConfig, model: FrozenModel, rank: int) -> Objective[Any]:
    """What a job minimises."""
    datasets = [load_dataset(data) for data in config.trained_on]
    if config.preference is not None:
        return Preference(model, config, datasets, rank)
    if config.inversion is not None:
        return Inversion(model, config, datasets, rank)
    return InBatch(model, config, datasets, rank)


def _schedule(
    optimiser: torch.optim.Optimizer, config: FinetuneConfig, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if config.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        config.learning_rate,
        total_steps=config.epochs * steps,
        pct_start=config.pct_start,
        div_factor=config.div_factor,
    )


def _agreed(measure: Callable[[], Measured]) -> Measured:
    """What the first worker measures, on every worker.

    Running statistics differ between workers, and workers that stop at different epochs hang.
    """
    if not several_workers():
        return measure()
    measured = [measure() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(measured)
    agreed = measured[0]
    assert agreed is not None
    return agreed


def _everyones(unfit: Collection[Unfit]) -> set[Unfit]:
    """What any worker could not use."""
    if not several_workers():
        return set(unfit)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, list(unfit))
    return {one for several in found for one in several}


def _weights(model: FrozenModel, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """What training may have changed."""
    return {
        key: tensor.detach().cpu().clone()
        for key, tensor in model.module.state_dict().items()
        if _is_below(key, parts)
    }


def _learning_mode(model: FrozenModel, parts: tuple[str, ...]) -> None:
    """Training mode where something learns; frozen parts keep their running statistics."""
    model.module.eval()
    for name, part in model.module.named_modules():
        if _is_below(name, parts):
            part.train()


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        weights: path or URI of the best epoch's.
        unfit: what could not be used as it is.
    """

    weights: Path | str
    unfit: tuple[Unfit, ...]

    @property
    def left_out(self) -> int:
        """Queries and images that nothing was learnt from."""
        return sum(one.what == LEFT_OUT for one in self.unfit)


def finetune(config: FinetuneConfig) -> Trained:
    """Train on Ray Train; the best weights are `out/weights.safetensors`.

    Beside it: `config.yaml`, `history.json` (loss and recall of every epoch), `unfit.csv` (queries
    and images that could not be used as they are), `start.safetensors` (the model before, where no
    other file holds it) and, while it runs, `status.json`.

    Raises:
        ConfigError, DataError: see `build` and `train`.
        MachineError: another run writes there.
    """
    # Relative paths of the configuration stay relative to where the job was started.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    start = build(config)
    out = open_storage(config.out)
    ensure_ray()
    refuse_larger(config.workers, config.cpus_per_worker, config.use_gpu)
    with claimed(out, config, _MACHINE):
        return _finetune(config, start, out)


def _finetune(config: FinetuneConfig, start: FrozenModel, out: Storage) -> Trained:
    checkpoint = run_workers(
        _worker,
        asdict(replace(config, out=out.uri)),
        out,
        config.epochs,
        config.workers,
        config.cpus_per_worker,
        config.use_gpu,
        "train",
    )
    labels = [label_of(of.name, of.split, of.category, of.root) for of in config.trained_on]
    vision = str(config.scratch.get("vision", ""))
    seen = [*trained_on(config.model.partition("@")[2]), *trained_on(vision)]
    with results(out.uri, WEIGHTS) as root:
        if config.scratch or config.inversion:  # no file holds the model before its training
            save_weights(start, root / "start.safetensors", learned_from=seen)
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", weights_only=True)
            history = json.loads((Path(folder) / "history.json").read_text())
        start.module.load_state_dict(state["best"], strict=False)
        unfit = tuple(Unfit(*one) for one in state["unfit"])
        save_weights(start, root / WEIGHTS, learned_from=[*seen, *labels])
        write_text(root / "history.json", json.dumps(history, indent=1) + "\n")
        write_csv(root / UNFIT, ("item", "what", "reason"), [astuple(one) for one in unfit])
    return Trained(out.place(WEIGHTS), unfit)


def save_weights(
    model: FrozenModel,
    path: Path,
    dtype: torch.dtype = torch.float32,
    learned_from: Sequence[str] = (),
) -> None:
    """Write a model's weights with what its family needs to build it again, and the labels of the
    data sets it learned from.
    """
    tensors = {
        key: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for key, tensor in model.module.state_dict().items()
    }
    values = {**model.header(), TRAINED_ON: list(learned_from)}
    header = {key: json.dumps(value) for key, value in values.items()}
    save_file(tensors, path, metadata=header)
    _sort_header(path)


def _sort_header(path: Path) -> None:
    """Equal weights are equal files: safetensors writes the keys of its metadata in any order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(size))
        head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
        text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))


def _worker(values: dict[str, Any]) -> None:
    """The function Ray Train runs in every worker."""
    import tempfile

    import ray.train
    import ray.train.torch

    config = parse_config(FinetuneConfig, values, "train_loop_config")
    context = ray.train.get_context()
    torch.set_num_threads(config.cpus_per_worker)
    model = build(config)
    model.module.to(ray.train.torch.get_device())
    state, history = None, []
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", weights_only=True, map_location="cpu")
            history = json.loads((Path(folder) / "history.json").read_text())

    def prepare(loss: nn.Module) -> nn.Module:
        wrapped: nn.Module = ray.train.torch.prepare_model(
            loss, parallel_strategy_kwargs={"find_unused_parameters": True}
        )
        return wrapped

    def report(metrics: dict[str, float], state: State) -> None:
        history.append(metrics)
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if context.get_world_rank() == 0:
                torch.save(state, Path(folder) / "state.pt")
                (Path(folder) / "history.json").write_text(json.dumps(history))
                saved = ray.train.Checkpoint.from_directory(folder)
                write_status(config.out, "train", len(history), config.epochs)
            ray.train.report(metrics, checkpoint=saved)

    train(config, model, prepare, report, state, context.get_world_rank())
