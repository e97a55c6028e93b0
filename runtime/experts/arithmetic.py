"""What an expert computes, on the views of the slot its weights lie in.

The kernels serve the layouts and activations that they know; every other family goes through its
own module's activation on plain matrix products, so that an unusual one is right first. Knows
slots, never experts, and moves no weights.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from ...kernels import native, quantization
from ...kernels.decoder import token_outputs
from ...kernels.expert_mlp import expert_outputs
from ...kernels.ways import ways
from ...kernels.weights import ExpertWeights
from ..errors import OutriderError
from .slots import SlotArena

_PLAIN_FORMATS = frozenset({"fp32", "bf16", "fp16"})


class ExpertArithmetic(Protocol):
    """Computes chosen rows by chosen slots.

    With `native_weights` a native pass over all layers computes the same bits from those slots,
    with `device_weights` a device's own decoder does.
    A row's bits depend on its input, its expert and how many rows that expert has in the step;
    never on slots, on waves, or on which experts share a call.
    """

    @property
    def native_weights(self) -> ExpertWeights | None: ...

    @property
    def device_weights(self) -> ExpertWeights | None: ...

    def outputs(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        *,
        slots: Sequence[int],
        rows: Sequence[np.ndarray],
        top_k: int,
        out: torch.Tensor,
        num_streamed: int | None = None,
    ) -> None:
        """Write `out[rows[i]]` for the expert in `slots[i]`: unweighted outputs, [T * K, H].

        `num_streamed` as for `kernels.ways.ways`, of the rows of hidden_states.

        hidden_states [T, H]; `rows[i]` holds flat positions t * top_k + k. On the CPU it blocks
        until they are written.
        """
        ...


class KernelArithmetic:
    """The gathered kernels: one call for all experts of a wave.

    `native_weights` are the slots as a native pass wants them, or None where no native code serves.
    """

    def __init__(self, weights: ExpertWeights, *, impl: str) -> None:
        self._weights = weights
        self._impl = impl
        self.native_weights = weights if impl == "cpu" and native.serves(weights) else None
        self.device_weights = weights if impl == "triton" else None

    def outputs(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        *,
        slots: Sequence[int],
        rows: Sequence[np.ndarray],
        top_k: int,
        out: torch.Tensor,
        num_streamed: int | None = None,
    ) -> None:
        """As `ExpertArithmetic.outputs`; `module` is not asked."""
        num_rows = hidden_states.shape[0]
        if num_rows == 1 and self.native_weights is not None and hidden_states.is_contiguous():
            # What stands around a token's call otherwise takes as long as small experts do.
            ((_, _, way),) = ways(1, num_streamed)
            positions = [int(row[0]) for row in rows]
            token_outputs(hidden_states, slots, positions, self._weights, out=out, way=way)
            return
        # In numpy, since each op of torch on a handful of indices costs ten times as much.
        positions = np.concatenate(rows)
        slot_ids = np.repeat(np.asarray(slots), [len(one) for one in rows])
        token_idx = positions // top_k
        indices = np.stack([token_idx, slot_ids, positions])  # [3, N]: one copy to a device
        for begin, count, way in ways(num_rows, num_streamed):
            some = torch.from_numpy(indices)
            if count < num_rows:
                is_chosen = (token_idx >= begin) & (token_idx < begin + count)
                some = torch.from_numpy(indices[:, is_chosen])
            if hidden_states.is_cuda:
                # From pageable memory the copy would wait for all that is queued before it.
                some = some.pin_memory().to(hidden_states.device, non_blocking=True)
            expert_outputs(
                hidden_states,
                (some[0], some[1]),
                self._weights,
                out=out,
                out_rows=some[2],
                impl=self._impl,
                way=way,
            )


class ModuleArithmetic:
    """Plain products on slot views around the activation of the family's own experts module.

    `is_transposed` says that blocks hold projections as [in, out], as some checkpoints do.
    """

    native_weights: ExpertWeights | None = None
    device_weights: ExpertWeights | None = None

    def __init__(self, arena: SlotArena, *, fmt: str, is_transposed: bool) -> None:
        self._arena = arena
        self._format = fmt
        self._is_transposed = is_transposed

    def outputs(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        *,
        slots: Sequence[int],
        rows: Sequence[np.ndarray],
        top_k: int,
        out: torch.Tensor,
        num_streamed: int | None = None,
    ) -> None:
        """As `ExpertArithmetic.outputs`; `module` is the experts module, its weights on meta."""
        del num_streamed  # one way of computing
        for slot, row in zip(slots, rows, strict=True):
            positions = torch.from_numpy(row).to(hidden_states.device)
            states = hidden_states[positions // top_k]  # [n, H]
            out[positions] = self._expert(module, slot, states).to(out.dtype)

    def _expert(self, module: Any, slot: int, states: torch.Tensor) -> torch.Tensor:
        if module.has_gate:
            projected = self._linear(module, slot, states, name="gate_up_proj")  # [n, 2I]
            activated = module._apply_gate(projected)  # [n, I]
        else:
            activated = module.act_fn(self._linear(module, slot, states, name="up_proj"))
        return self._linear(module, slot, activated, name="down_proj")  # [n, H]

    def _linear(self, module: Any, slot: int, states: torch.Tensor, *, name: str) -> torch.Tensor:
        weight = self._weight(module, slot, name, dtype=states.dtype)  # [out, in]
        bias_name = f"{name}_bias"
        bias = None
        if bias_name in self._arena.views:
            bias = self._arena.view(slot, bias_name).to(states.dtype)
        return functional.linear(states, weight, bias)

    def _weight(self, module: Any, slot: int, name: str, *, dtype: torch.dtype) -> torch.Tensor:
        if self._format in _PLAIN_FORMATS:
            weight = self._arena.view(slot, name).to(dtype)
            return weight.T if self._is_transposed else weight
        shape = getattr(module, name).shape[1:]
        parts = {
            part.partition(".")[2] or "weight": self._arena.view(slot, part)
            for part in self._arena.views
            if part.partition(".")[0] == name
        }
        out_in = (shape[1], shape[0]) if module.is_transposed else (shape[0], shape[1])
        return quantization.dequantize(parts, self._format, dtype=dtype, shape=out_in)


class ClosedArithmetic:
    """Of a tier that was closed: holds no slots and computes nothing."""

    native_weights: ExpertWeights | None = None
    device_weights: ExpertWeights | None = None

    def outputs(self, *arguments: Any, **options: Any) -> None:
        """Always refused."""
        raise OutriderError("the engine was closed")
