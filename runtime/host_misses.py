"""Misses computed where their weights lie: in host memory, by the CPU, while the link is busy.

The CPU rounds otherwise than the device, so results are not those of fetching, bit for bit. Has not
run beside a GPU.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ..collect.schema import ExpertKey
from .experts.arithmetic import ExpertArithmetic
from .experts.cache import ExpertCache
from .experts.transfer import TransferEngine

MEMORY = 0.2
"""Weight of the newest measurement of the CPU's speed."""


class HostMisses:
    """Chooses among a layer's missed experts those to compute on the host, and computes them.

    `host` and `arithmetic` are the host cache and the ops over its arena. "host" takes every missed
    expert that host memory holds; "auto" so many that CPU and link would end together, by their
    measured speeds. One thread; `compute` blocks.
    """

    def __init__(
        self,
        mode: Literal["host", "auto"],
        *,
        host: ExpertCache,
        arithmetic: ExpertArithmetic,
        transfers: TransferEngine,
        nbytes: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._mode = mode
        self._host = host
        self._arithmetic = arithmetic
        self._transfers = transfers
        self._nbytes = nbytes
        self._clock = clock
        self._expert_s = 0.0

    def choose(self, keys: Sequence[ExpertKey], cache: ExpertCache) -> list[ExpertKey]:
        """Those of `keys` to compute here: none that hold a slot or are on their way to one."""
        missed = [key for key in keys if cache.state(key) is None]
        held = [key for key in missed if self._host.lookup(key) is not None]
        if self._mode == "host":
            return held
        bandwidth = self._transfers.bandwidth()
        if not self._expert_s or not bandwidth:
            return held[:1]  # to learn what one takes
        copy_s = self._nbytes / bandwidth
        waiting_s = self._transfers.outstanding_bytes() / bandwidth
        share = (waiting_s + len(missed) * copy_s) / (copy_s + self._expert_s)
        return held[: int(share)]

    def compute(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        *,
        rows: Mapping[ExpertKey, np.ndarray],
        top_k: int,
        out: torch.Tensor,
    ) -> None:
        """Write `out[rows[key]]` of each expert; arguments as `ExpertArithmetic.outputs` has them.

        Every expert must be in host memory: what `choose` answered, before anything else is asked.
        """
        began = self._clock()
        states = hidden_states.cpu()
        results = states.new_empty(out.shape)
        with self._host.pin(rows) as lease:
            for key in rows:
                self._host.record_use(key)
            self._arithmetic.outputs(
                module,
                states,
                slots=[lease.slots[key] for key in rows],
                rows=list(rows.values()),
                top_k=top_k,
                out=results,
            )
        positions = torch.from_numpy(np.concatenate(list(rows.values())))
        out[positions.to(out.device)] = results[positions].to(out.device)
        expert_s = (self._clock() - began) / len(rows)
        self._expert_s += (expert_s - self._expert_s) * (MEMORY if self._expert_s else 1.0)
