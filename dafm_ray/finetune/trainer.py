"""Supervised training of a sub-model on Ray Train.

The contrastive batch is global: with several workers every query meets the targets of all of
them. A run of the same output folder goes on from its last checkpoint.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from dafm_ray.config import parse_config
from dafm_ray.datasets.base import label_of
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.errors import ConfigError, DataError, unknown
from dafm_ray.finetune.config import FinetuneConfig
from dafm_ray.finetune.losses import in_batch_contrastive
from dafm_ray.finetune.triplets import Batch, Triplets, epoch_batches, load_batches, shifted
from dafm_ray.finetune.validation import validation_recall
from dafm_ray.models.base import Contrast, FrozenModel
from dafm_ray.models.checkpoints import TRAINED_ON, trained_on
from dafm_ray.models.registry import resolve
from dafm_ray.progress import status_line
from dafm_ray.runs import STATUS, claim, refuse_larger, run_workers
from dafm_ray.session import ensure_ray

SELECTION = "R@10"
_MACHINE = frozenset({"workers", "cpus_per_worker", "use_gpu", "loader_workers", "out"})
"""Keys that may change between two starts of one run."""
State = dict[str, Any]
Report = Callable[[dict[str, float], State], None]


class TripletLoss(nn.Module):
    """A model whose forward pass is the loss of a batch, so that gradients can be synchronised."""

    def __init__(self, model: FrozenModel, config: FinetuneConfig) -> None:
        super().__init__()
        self.weights = model.module
        self._model = model
        self._config = config
        self._loss_weights = loss_weights(model, config.loss)

    def forward(self, batch: Batch) -> Tensor:
        """Contrastive loss of this worker's queries against the targets of all workers."""
        config, model = self._config, self._model
        device = next(self.weights.parameters()).device
        references = shifted(batch.references_B3HW, config.shift).to(device)
        targets = shifted(batch.targets_B3HW, config.shift).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            terms = model.terms(
                references, batch.captions_B, targets, config.logit_scale, self._loss_weights
            )
        ids_B = batch.target_ids_B.to(device)
        loss = torch.zeros((), device=device)
        for contrast in terms.contrasts.values():
            loss = loss + contrast.weight * self._contrastive(contrast, ids_B)
        for weight, penalty in terms.penalties.values():
            loss = loss + weight * penalty.float()
        return loss

    def _contrastive(self, contrast: Contrast, ids_B: Tensor) -> Tensor:
        candidates, ids_N, first = _gathered(contrast.candidates.float(), ids_B)
        scores_BN = contrast.scale * self._model.score(contrast.queries.float(), candidates)
        target_B = first + torch.arange(len(ids_B), device=ids_B.device)
        same_BN = ids_N[target_B][:, None] == ids_N[None, :]
        return in_batch_contrastive(scores_BN, target_B, same_BN)


def loss_weights(model: FrozenModel, given: Mapping[str, float]) -> dict[str, float]:
    """The family's weights with the job's own values.

    Raises:
        ConfigError: a term that the family's loss does not have.
    """
    for name in given:
        if name not in model.loss_weights:
            raise ConfigError(unknown("term of this family's loss", name, model.loss_weights))
    return {**model.loss_weights, **given}


def _gathered(features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, int]:
    """Candidates and target ids of all workers, and where this worker's begin."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return features, ids, 0
    from torch.distributed.nn.functional import all_gather

    everywhere = [torch.empty_like(ids) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, ids)
    parts = all_gather(features)  # type: ignore[no-untyped-call]
    return torch.cat(parts), torch.cat(everywhere), dist.get_rank() * len(ids)


def build(config: FinetuneConfig) -> FrozenModel:
    """The model in its starting state; only `config.parts` take gradients.

    Raises:
        ConfigError: a part that names nothing, or the family cannot be trained.
        DataError: fewer triplets than a batch.
    """
    found, model_id = resolve(config.model)
    queries = load_dataset(config.trained_on[0]).queries
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
    triplets = Triplets(load_dataset(config.trained_on[0]), model, config.identity)
    validation = load_dataset(config.validated_on[0])
    steps = len(epoch_batches(triplets, config.batch_size, config.seed, 0, rank, config.workers))
    device = str(next(model.module.parameters()).device)
    loss_of = prepare(TripletLoss(model, config))
    learning = [p for p in model.module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        learning, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, config.learning_rate, total_steps=config.epochs * steps, pct_start=0.15
    )
    progress = {"epoch": 0, "best": -1.0, "stale": 0}
    best = _weights(model)
    if state is not None:
        model.module.load_state_dict(state["weights"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        progress, best = state["progress"], state["best"]
    while progress["epoch"] < config.epochs and progress["stale"] < config.patience:
        epoch = int(progress["epoch"])
        torch.manual_seed(config.seed * 100_003 + epoch * 101 + rank)
        _learning_mode(model, config.parts)
        batches = epoch_batches(
            triplets, config.batch_size, config.seed, epoch, rank, config.workers
        )
        losses = []
        for batch in load_batches(triplets, batches, config.loader_workers):
            losses.append(_step(loss_of, batch, optimiser, config.gradient_clip))
            schedule.step()
        model.module.eval()
        recall = _agreed(lambda: validation_recall(model, validation, device))
        better = recall[SELECTION] > progress["best"]
        if better:
            best = _weights(model)
        progress = {
            "epoch": epoch + 1,
            "best": max(recall[SELECTION], progress["best"]),
            "stale": 0 if better else progress["stale"] + 1,
        }
        report(
            {"epoch": epoch + 1, "loss": sum(losses) / steps, **recall},
            {
                "weights": _weights(model),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
                "progress": progress,
                "best": best,
            },
        )


def _step(loss_of: nn.Module, batch: Batch, optimiser: torch.optim.Optimizer, clip: float) -> float:
    """One optimiser step; the loss of the batch before it."""
    loss: Tensor = loss_of(batch)
    if not torch.isfinite(loss):
        raise DataError(f"the loss is {loss.item()}; lower learning_rate")
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    if clip:
        learning = [p for group in optimiser.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(learning, clip)
    optimiser.step()
    return loss.item()


def _agreed(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What the first worker measures, on every worker.

    Running statistics differ between workers, and workers that stop at different epochs hang.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return measure()
    measured = [measure() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(measured)
    agreed = measured[0]
    assert agreed is not None
    return agreed


def _weights(model: FrozenModel) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().clone() for key, tensor in model.module.state_dict().items()}


def _learning_mode(model: FrozenModel, parts: tuple[str, ...]) -> None:
    """Training mode where something learns; frozen parts keep their running statistics."""
    model.module.eval()
    for name, part in model.module.named_modules():
        if _is_below(name, parts):
            part.train()


def finetune(config: FinetuneConfig) -> Path:
    """Train on Ray Train; returns the path of the best weights, `out/weights.safetensors`.

    Beside it: `config.yaml`, `history.json` (loss and recall of every epoch) and, while it runs,
    `status.json`.

    Raises:
        ConfigError, DataError: see `build` and `train`.
    """
    # Relative paths of the configuration stay relative to where the job was started.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    start = build(config)
    out = Path(config.out).resolve()
    ensure_ray()
    refuse_larger(config.workers, config.cpus_per_worker, config.use_gpu)
    claim(out, config, _MACHINE)
    checkpoint = run_workers(
        _worker,
        asdict(replace(config, out=str(out))),
        out,
        config.epochs,
        config.workers,
        config.cpus_per_worker,
        config.use_gpu,
        "train",
    )
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / "state.pt", weights_only=True)
        history = json.loads((Path(folder) / "history.json").read_text())
    start.module.load_state_dict(state["best"])
    train = config.trained_on[0]
    label = label_of(train.name, train.split, train.category, train.root)
    seen = trained_on(config.model.partition("@")[2])
    save_weights(start, out / "weights.safetensors", learned_from=[*seen, label])
    (out / "history.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
    return out / "weights.safetensors"


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
                line = status_line("train", len(history), config.epochs)
                (Path(config.out) / STATUS).write_bytes(line)
            ray.train.report(metrics, checkpoint=saved)

    train(config, model, prepare, report, state, context.get_world_rank())
