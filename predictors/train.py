"""The training loop of the learned families: AdamW by accelerate, early stopping, resumable epochs.

Knows samples, losses and a network; what the network is, is its family's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .calibration import inclusion
from .context import UNKNOWN, Window
from .encoder import Frames, Vocabulary
from .errors import PredictorError
from .examples import Examples
from .losses import balance, make_curriculum, set_loss
from .presets import begun_with

if TYPE_CHECKING:
    from .journal import Journal
    from .network import NetworkFamily
    from .presets import Settings

WARM_UP = 0.05
FINAL_RATE = 0.05
FURTHER_WEIGHT = 0.5
"""Weight of the loss at horizon 2, which is asked for less often and bounded by what is unknown."""

MAX_VALIDATION_TOKENS = 16_384
PART = "network"


@dataclass(slots=True)
class SampleBatch:
    """Whole samples padded to one length: frames, bases and targets of each horizon."""

    frames: Frames
    bases: dict[int, Tensor]
    used: dict[int, Tensor]
    valid: dict[int, Tensor]
    rows: np.ndarray


def sample_batch(
    family: NetworkFamily, examples: Examples, samples: np.ndarray, *, in_table: bool
) -> SampleBatch:
    """The samples [B] of `examples`, as a network is trained on them.

    `in_table`: the statistics were counted over these rows, so each row's base is what they would
    be without it.
    """
    shape = examples.shape
    starts, ends = examples.sample_offsets[samples], examples.sample_offsets[samples + 1]
    length = int((ends - starts).max())
    rows = starts[:, None] + np.arange(length)
    is_there = rows < ends[:, None]
    rows = np.where(is_there, rows, starts[:, None])
    has_past = is_there & (np.arange(length) > 0)
    past = np.where(has_past, rows - 1, rows)
    frames = _frames(family.vocabulary, examples, rows, past=past, has_past=has_past)
    frames.is_there = torch.from_numpy(is_there)
    states = [examples.hidden[layer_idx][past] for layer_idx in family.hidden_layers]
    if states:
        frames.hidden = torch.from_numpy(np.concatenate(states, axis=2))
    bases, used, valid = {}, {}, {}
    flat = rows.ravel()
    window = _last_window(examples, flat, past=past.ravel(), has_past=has_past.ravel())
    for horizon in range(1, family.horizon + 1):
        is_known = has_past & (rows + horizon - 1 < ends[:, None])
        targets = np.where(is_known, rows + horizon - 1, rows).ravel()
        base = (
            family.statistics.log_odds_without(
                window,
                horizon,
                cells=examples.cells(targets),
                in_table=is_known.ravel(),
            )
            if in_table
            else family.statistics.log_odds(window, horizon)
        )
        size = (*rows.shape, shape.num_moe_layers, shape.num_experts)
        bases[horizon] = torch.from_numpy(base).view(size)
        used[horizon] = torch.from_numpy(examples.membership(targets)).view(size)
        valid[horizon] = torch.from_numpy(is_known)
    return SampleBatch(frames, bases, used, valid, rows)


def train_network(
    family: NetworkFamily,
    examples: Examples,
    validation: Examples,
    *,
    settings: Settings,
    progress: Journal,
) -> None:
    """Train `family.network` in place and leave it at its best validation loss.

    Runs in one process or in several that accelerate has launched; the same seed gives the same
    weights on a CPU, interrupted or not (with the same number of threads and processes).
    """
    Training(family, examples, validation, settings=settings, progress=progress).run()


class Training:
    """One run: optimiser, schedule, epochs, and what a resume needs of them."""

    def __init__(
        self,
        family: NetworkFamily,
        examples: Examples,
        validation: Examples,
        *,
        settings: Settings,
        progress: Journal,
    ) -> None:
        from accelerate import Accelerator

        precision: Any = settings.precision
        self._accelerator = Accelerator(
            mixed_precision=precision, cpu=not torch.cuda.is_available()
        )
        self._family = family
        self._examples = examples
        self._validation = validation
        self._settings = settings
        self._progress = progress
        self._network = family.network
        decayed = [one for one in self._network.parameters() if one.dim() > 1]
        others = [one for one in self._network.parameters() if one.dim() <= 1]
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=settings.lr,
        )
        self._wrapped, self._optimizer = self._accelerator.prepare(self._network, optimizer)
        mean_length = len(examples) / (len(examples.sample_offsets) - 1)
        processes = self._accelerator.num_processes
        samples = max(1, round(settings.batch_size / mean_length / processes)) * processes
        self._batch_samples = min(samples, len(examples.sample_offsets) - 1)
        self._steps_per_epoch = max(1, (len(examples.sample_offsets) - 1) // self._batch_samples)
        self._curriculum = make_curriculum(
            settings.curriculum,
            examples.topk_ids,
            examples.shape.num_experts,
            epochs=settings.epochs,
        )
        device = self._accelerator.device
        self._weights = (
            torch.from_numpy(balance(examples.frequencies())).to(device)
            if settings.balanced
            else None
        )
        self._best: dict[str, Tensor] = {}
        self._best_loss = math.inf
        self._best_epoch = -1
        self._next_epoch = 0

    def run(self) -> None:
        """All epochs that are left; then the best weights."""
        self._resume()
        settings = self._settings
        for epoch in range(self._next_epoch, settings.epochs):
            if epoch - self._best_epoch > settings.patience:
                break
            loss = self._epoch(epoch)
            judged = self._judge()
            if judged["validation_loss"] < self._best_loss:
                self._best_loss, self._best_epoch = judged["validation_loss"], epoch
                self._best = _copy(self._network.state_dict())
            self._next_epoch = epoch + 1
            self._progress.record(epoch=epoch + 1, loss=loss, **judged)
            self._save()
        if not self._best:
            raise PredictorError(
                "training did not give a single finite validation loss; lower --lr"
            )
        self._network.load_state_dict(self._best)
        # Takes mixed precision and the wrapper of several processes off again.
        self._accelerator.unwrap_model(self._wrapped, keep_fp32_wrapper=False).cpu().eval()

    def _epoch(self, epoch: int) -> float:
        settings, accelerator = self._settings, self._accelerator
        rank, processes = accelerator.process_index, accelerator.num_processes
        torch.manual_seed(settings.seed * 10_007 + epoch * processes + rank)
        generator = np.random.default_rng((settings.seed, epoch))
        order = generator.permutation(len(self._examples.sample_offsets) - 1)
        self._wrapped.train()
        total = 0.0
        for step in range(self._steps_per_epoch):
            self._progress(f"epoch {epoch + 1}", step, self._steps_per_epoch)
            first = step * self._batch_samples + rank * (self._batch_samples // processes)
            samples = np.sort(order[first : first + self._batch_samples // processes])
            batch = sample_batch(self._family, self._examples, samples, in_table=True)
            rate = self._rate(epoch * self._steps_per_epoch + step)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            loss = self._loss(batch, epoch)
            accelerator.backward(loss)
            if settings.clip:
                accelerator.clip_grad_norm_(self._wrapped.parameters(), settings.clip)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            total += loss.item()
        self._progress(f"epoch {epoch + 1}", self._steps_per_epoch, self._steps_per_epoch)
        return total / self._steps_per_epoch

    def _loss(self, batch: SampleBatch, epoch: int) -> Tensor:
        settings, device = self._settings, self._accelerator.device
        bases = {horizon: base.to(device) for horizon, base in batch.bases.items()}
        used = {horizon: one.to(device) for horizon, one in batch.used.items()}
        valid = {horizon: one.to(device) for horizon, one in batch.valid.items()}
        with self._accelerator.autocast():
            scores = self._wrapped(batch.frames.to(device), bases)
        total = torch.zeros((), device=device)
        for horizon, score in scores.items():
            is_valid = valid[horizon]
            cells = is_valid[:, :, None].to(torch.float32)
            if self._curriculum is not None:
                counted = self._curriculum.weights(batch.rows.ravel(), epoch)
                cells = cells * torch.from_numpy(counted).to(device).view(*is_valid.shape, -1)
            each = set_loss(
                score.float(),
                used[horizon],
                loss=settings.loss,
                top_k=self._examples.shape.top_k,
                weights=self._weights,
            )
            weight = 1.0 if horizon == 1 else FURTHER_WEIGHT
            num_cells = cells.expand_as(each).sum().clamp_min(1.0)
            total = total + weight * (each * cells).sum() / num_cells
        if settings.auxiliary_weight:
            auxiliary = self._network.auxiliary(scores, used, valid)
            total = total + settings.auxiliary_weight * auxiliary
        return total

    @torch.no_grad()
    def _judge(self) -> dict[str, float]:
        """Log loss and recall@k of held-out rows, of both horizons."""
        self._network.eval()
        validation, shape = self._validation, self._validation.shape
        samples = np.arange(len(validation.sample_offsets) - 1)
        samples = samples[:: max(1, len(validation) // MAX_VALIDATION_TOKENS)]
        losses, recalls = [], []
        device = self._accelerator.device
        for part in np.array_split(samples, math.ceil(len(samples) / 32)):
            batch = sample_batch(self._family, validation, part, in_table=False)
            bases = {horizon: base.to(device) for horizon, base in batch.bases.items()}
            scores = self._network(batch.frames.to(device), bases)
            results = []
            for horizon, score in scores.items():
                kept = batch.valid[horizon].numpy()
                predicted = score.float().cpu().numpy()[kept]
                used = batch.used[horizon].numpy()[kept]
                results.append(_quality(predicted, used, shape.top_k))
            losses.append([sum(loss) for loss, _ in results])
            recalls.append([sum(recall) for _, recall in results])
        counts = self._counts(samples)
        loss = np.sum(losses, axis=0) / counts
        recall = np.sum(recalls, axis=0) / counts
        judged = {"validation_loss": float(loss[0] + FURTHER_WEIGHT * loss[1:].sum())}
        for index, value in enumerate(recall):
            judged[f"recall_{index + 1}"] = float(value)
        return judged

    def _counts(self, samples: np.ndarray) -> np.ndarray:
        lengths = np.diff(self._validation.sample_offsets)[samples]
        return np.array(
            [
                max(1, np.maximum(lengths - horizon, 0).sum())
                for horizon in range(1, self._family.horizon + 1)
            ]
        )

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a half cosine down to a twentieth."""
        steps = self._settings.epochs * self._steps_per_epoch
        warm = max(1.0, WARM_UP * steps)
        if step < warm:
            return self._settings.lr * (step + 1) / warm
        left = 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))
        return self._settings.lr * (FINAL_RATE + (1.0 - FINAL_RATE) * left)

    def _save(self) -> None:
        tensors = {f"network.{k}": v for k, v in self._network.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self._best.items()}
        for index, moments in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in moments.items()}
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        self._progress.save(
            PART,
            arrays,
            {
                **begun_with(self._examples, self._settings),
                "next_epoch": self._next_epoch,
                "best_epoch": self._best_epoch,
                "best_loss": self._best_loss,
            },
        )

    def _resume(self) -> None:
        found = self._progress.load(PART, begun_with=begun_with(self._examples, self._settings))
        if found is None:
            return
        arrays, state = found
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        self._network.load_state_dict(_part(tensors, "network."))
        self._best = _part(tensors, "best.")
        optimizer = self._optimizer.state_dict()
        for name, tensor in _part(tensors, "optimizer.").items():
            index, _, moment = name.partition(".")
            optimizer["state"].setdefault(int(index), {})[moment] = tensor
        self._optimizer.load_state_dict(optimizer)
        self._next_epoch, self._best_epoch = state["next_epoch"], state["best_epoch"]
        self._best_loss = state["best_loss"]
        self._progress.keep_epochs(self._next_epoch)


def _frames(
    vocabulary: Vocabulary,
    examples: Examples,
    rows: np.ndarray,
    *,
    past: np.ndarray,
    has_past: np.ndarray,
) -> Frames:
    cells = examples.cells(past.ravel()).reshape(*rows.shape, -1)
    weights = np.repeat(has_past[:, :, None], cells.shape[2], axis=2).astype(np.float32)
    past_ids = np.where(has_past, vocabulary.rows(examples.token_id[past].astype(np.int64)), 0)
    return Frames(
        ids=torch.from_numpy(vocabulary.rows(examples.token_id[rows].astype(np.int64))),
        past_ids=torch.from_numpy(past_ids),
        cells=torch.from_numpy(cells),
        weights=torch.from_numpy(weights),
        hidden=torch.zeros(*rows.shape, 0),
        has_past=torch.from_numpy(has_past),
        is_there=torch.from_numpy(has_past),
    )


def _last_window(
    examples: Examples, rows: np.ndarray, *, past: np.ndarray, has_past: np.ndarray
) -> Window:
    """What the statistics look at: the token's id and the experts of the one before it."""
    none = np.zeros((len(rows), 1, 0, 0), np.float32)
    return Window(
        token_id=examples.token_id[rows].astype(np.int64),
        past_ids=np.where(has_past, examples.token_id[past], UNKNOWN)[:, None],
        topk_ids=examples.topk_ids[past].astype(np.int64)[:, None],
        topk_weights=none,
        hidden=none,
        length=has_past.astype(np.int64),
    )


def _quality(scores: np.ndarray, used: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Per row: the log loss summed over experts, and recall@k, both means over layers."""
    probability = inclusion(scores, top_k)
    chance = np.maximum(np.where(used, probability, 1.0 - probability), 1e-7)
    best = np.argpartition(-scores, top_k - 1, axis=2)[:, :, :top_k]
    recall = np.take_along_axis(used, best, axis=2).mean(axis=(1, 2))
    return -np.log(chance).sum(axis=2).mean(axis=1), recall


def _copy(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
