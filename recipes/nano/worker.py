"""Threads that share a training step: each takes the next part of the batch, until none is left.

On a machine with other work to do, threads that meet once a step lose less than threads that meet
inside every matrix product. Owns the twins of the model; knows nothing of optimisers and schedules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor, nn

from outrider.runtime.models.deepseek import DeepseekForCausalLM, DeepseekTopKRouter

from .loss import expert_balance, head_cross_entropy

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PartResult:
    """Of one part of a batch: nats a token, mean balance of the layers, choices [MoE layers, E]."""

    loss: float
    balance: float
    counts: Tensor


class Worker:
    """A model, perhaps a twin that shares another's weights, with gradients of its own."""

    def __init__(self, model: DeepseekForCausalLM) -> None:
        self.model = model
        self._counts: list[Tensor] = []
        self._balance: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, DeepseekTopKRouter):
                module.register_forward_hook(self._observe_router)

    def twin(self) -> Worker:
        """Another worker over the same weights; call it before any gradient exists."""
        model = copy.deepcopy(self.model)
        for module in model.modules():
            if isinstance(module, DeepseekTopKRouter):
                module._forward_hooks.clear()
        for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            theirs.data = mine.data
        return Worker(model)

    def backward(self, part: Tensor, context: int, *, scale: float) -> PartResult:
        """Adds the part's gradients, times `scale`.

        part [B, S + 1] tokens, of which `context` at a time attend to each other.
        """
        self._counts.clear()
        self._balance.clear()
        inputs, targets = part[:, :-1].reshape(-1, context), part[:, 1:].flatten()
        hidden = self.model.model(inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        loss = head_cross_entropy(hidden, self.model.lm_head.weight, targets)
        balance = torch.stack(self._balance)
        alpha = self.model.config.aux_loss_alpha
        ((loss + alpha * balance.sum()) * scale).backward()
        return PartResult(loss.item(), balance.mean().item(), torch.stack(self._counts))

    def _observe_router(
        self, _module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        if torch.is_grad_enabled():
            logits, _, indices = output
            self._counts.append(
                torch.bincount(indices.flatten(), minlength=logits.shape[-1]).float()
            )
            self._balance.append(expert_balance(logits, self._counts[-1]))


class Crew:
    """Workers and their threads; each thread computes on one core."""

    def __init__(self, first: Worker, size: int) -> None:
        self.workers = [first, *(first.twin() for _ in range(size - 1))]
        self._pool = ThreadPoolExecutor(
            size, "nano-worker", initializer=torch.set_num_threads, initargs=(1,)
        )

    def backward(self, parts: Iterable[Tensor], context: int, *, scale: float) -> list[PartResult]:
        """Works through all parts; afterwards the first worker's model holds the summed gradients.

        Which worker takes which part depends on time, and so do the last bits of the sums, unless
        there is but one worker.
        """
        results: list[PartResult] = []

        def work(worker: Worker, part: Tensor) -> None:
            results.append(worker.backward(part, context, scale=scale))

        self._share(parts, work)
        for twin in self.workers[1:]:
            pairs = zip(self.workers[0].model.parameters(), twin.model.parameters(), strict=True)
            self._share(pairs, lambda _, pair: _move_gradient(*pair))
        return results

    def each(self, items: Iterable[T], do: Callable[[T], None]) -> None:
        """Calls `do` with every item, on whichever thread is free."""
        self._share(items, lambda _, item: do(item))

    def _share(self, items: Iterable[T], do: Callable[[Worker, T], None]) -> None:
        queue: SimpleQueue[T] = SimpleQueue()
        for item in items:
            queue.put(item)

        def drain(worker: Worker) -> None:
            while True:
                try:
                    item = queue.get_nowait()
                except Empty:
                    return
                do(worker, item)

        for finished in [self._pool.submit(drain, worker) for worker in self.workers]:
            finished.result()


def _move_gradient(target: nn.Parameter, source: nn.Parameter) -> None:
    if source.grad is None:
        return
    target.grad = source.grad if target.grad is None else target.grad.add_(source.grad)
    source.grad = None
