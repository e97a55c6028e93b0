"""A layer's chosen experts, straight out of the slots: the ops the runtime calls, by
implementation.

Knows tokens, slots and formats; no experts' names, files or models. `impl` picks who computes:
`reference` (plain truth, slow), `cpu` (native code, or PyTorch where none was built) or `triton`
(CUDA tensors).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from . import cpu
from .activation import ActivationError, canonical_activation
from .quantization import FORMATS, PLAIN_DTYPES
from .reference import combine_reference, expert_outputs_reference
from .ways import Way
from .weights import ACTIVATION_DTYPES, ExpertWeights

IMPLEMENTATIONS = ("reference", "cpu", "triton")

Arena = Mapping[str, Tensor] | ExpertWeights


class KernelArgumentError(ValueError):
    """Tensors that do not fit each other, or an implementation that is not there."""


def supports(
    fmt: str,
    dtype: torch.dtype,
    *,
    activation: str = "silu",
    impl: str = "cpu",
    is_transposed: bool = False,
    is_concatenated: bool = True,
    has_gate: bool = True,
    has_post_expert_norm: bool = False,
) -> bool:
    """Whether the ops here compute such experts; where not, the caller keeps the module's own path.

    The flags are transformers' (`use_experts_implementation`). Loads nothing and never raises.
    """
    if impl not in IMPLEMENTATIONS or fmt not in FORMATS or dtype not in ACTIVATION_DTYPES:
        return False
    try:
        canonical_activation(activation)
    except ActivationError:
        return False
    if not has_gate or has_post_expert_norm:
        return False
    return not is_transposed or fmt in PLAIN_DTYPES


def expert_outputs(
    hidden_states: Tensor,
    assignments: tuple[Tensor, Tensor],
    arena: Arena,
    *,
    fmt: str | None = None,
    activation: str = "silu",
    is_transposed: bool = False,
    is_concatenated: bool = True,
    out: Tensor | None = None,
    out_rows: Tensor | None = None,
    impl: str = "reference",
    way: Way = Way.BY_COUNT,
) -> Tensor:
    """Each assignment's expert output, unweighted; one call per wave.

    hidden_states [T, H]; assignments = (token_idx [N], slot_ids [N]), integers on the same device;
    arena: an `ExpertWeights`, or the mapping one is made of together with `fmt` (and the layout
    flags). Row i of the result goes to `out[out_rows[i]]`, or `out[i]` without `out_rows`; `out`
    [R, H] has hidden_states' dtype and is made if absent. Everything inside an expert is fp32 and
    the row is rounded once. Two exceptions round inner values to hidden_states' dtype as well:
    Triton's grouped products (`grouped_matmul`), and on the CPU more than 4 rows in bf16 of one
    expert where the processor has a bf16 unit (`native.has_bf16_products`). A row's bits
    depend on its input row, its expert's weights and the number of rows of this call that go to
    that slot (so all of an expert's rows belong into one call), and on nothing else with the native
    kernels; with Triton's instead of that number on whether T is above `cuda.MAX_GATHERED_TOKENS`.
    Blocks until done on the CPU; queues on the current stream on CUDA. Raises KernelArgumentError,
    FormatError or ActivationError; reads no slot that is not
    named.
    """
    weights = _weights(
        hidden_states,
        arena,
        fmt=fmt,
        activation=activation,
        is_transposed=is_transposed,
        is_concatenated=is_concatenated,
    )
    token_idx, slot_ids = assignments
    _check_assignments(hidden_states, token_idx, slot_ids)
    num_rows = token_idx.shape[0]
    if out is None:
        if out_rows is not None:
            raise KernelArgumentError("out_rows needs the out tensor that it points into")
        out = hidden_states.new_empty((num_rows, hidden_states.shape[1]))
    _check_out(hidden_states, out, out_rows, num_rows=num_rows)
    if num_rows == 0:
        return out
    if impl == "cpu":
        cpu.expert_outputs(
            hidden_states, token_idx, slot_ids, weights, out=out, out_rows=out_rows, way=way
        )
        return out
    if impl == "triton":
        from . import cuda

        cuda.expert_outputs(hidden_states, token_idx, slot_ids, weights, out=out, out_rows=out_rows)
        return out
    _check_impl(impl)
    _check_range("slot_ids", slot_ids, weights.num_slots)
    _check_range("token_idx", token_idx, hidden_states.shape[0])
    rows = expert_outputs_reference(hidden_states, token_idx, slot_ids, weights)
    if out_rows is None:
        out.copy_(rows)
    else:
        out[out_rows.long()] = rows
    return out


def combine(
    outputs: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, impl: str | None = None
) -> Tensor:
    """Sum a token's experts: outputs [T, K, H], topk_weights [T, K], topk_ids [T, K] -> [T, H].

    Ascending expert id, products and sums each rounded to fp32 (no fused multiply-add), rounded
    once to outputs' dtype: the same bits whatever order the K columns stand in, on every
    implementation. `impl` defaults to the device's: "cpu" or "triton".
    """
    if topk_weights.shape != outputs.shape[:2] or topk_ids.shape != outputs.shape[:2]:
        raise KernelArgumentError(
            f"outputs {tuple(outputs.shape)} need topk_weights and topk_ids of shape "
            f"{tuple(outputs.shape[:2])}; got {tuple(topk_weights.shape)}, {tuple(topk_ids.shape)}"
        )
    if impl is None:
        impl = "triton" if outputs.device.type == "cuda" else "cpu"
    if impl == "cpu":
        return cpu.combine(outputs, topk_weights, topk_ids)
    if impl == "triton":
        from . import cuda

        return cuda.combine(outputs, topk_weights, topk_ids)
    _check_impl(impl)
    return combine_reference(outputs, topk_weights, topk_ids)


def expert_mlp(
    hidden_states: Tensor,
    slot_ids: Tensor,
    topk_weights: Tensor,
    arena: Arena,
    *,
    fmt: str | None = None,
    activation: str = "silu",
    is_transposed: bool = False,
    is_concatenated: bool = True,
    order: Tensor | None = None,
    impl: str = "reference",
) -> Tensor:
    """A layer's routed experts: hidden_states [T, H], slot_ids and topk_weights [T, K] -> [T, H].

    `order` [T, K] are the expert ids that fix the order of the sum (`combine`); without it the slot
    ids serve, and the result then depends on the placement. Rounding and errors as
    `expert_outputs`: each expert's row is rounded to the activation dtype, then combined in fp32
    and rounded once more.
    """
    if slot_ids.dim() != 2 or slot_ids.shape[0] != hidden_states.shape[0]:
        raise KernelArgumentError(
            f"slot_ids must be [{hidden_states.shape[0]}, K] for hidden_states "
            f"{tuple(hidden_states.shape)}; got {tuple(slot_ids.shape)}"
        )
    num_tokens, top_k = slot_ids.shape
    token_idx = torch.arange(num_tokens, device=slot_ids.device).repeat_interleave(top_k)
    outputs = expert_outputs(
        hidden_states,
        (token_idx, slot_ids.reshape(-1)),
        arena,
        fmt=fmt,
        activation=activation,
        is_transposed=is_transposed,
        is_concatenated=is_concatenated,
        impl=impl,
    )
    topk_ids = slot_ids if order is None else order
    return combine(outputs.view(num_tokens, top_k, -1), topk_weights, topk_ids, impl=impl)


def _weights(
    hidden_states: Tensor,
    arena: Arena,
    *,
    fmt: str | None,
    activation: str,
    is_transposed: bool,
    is_concatenated: bool,
) -> ExpertWeights:
    if hidden_states.dim() != 2 or hidden_states.dtype not in ACTIVATION_DTYPES:
        raise KernelArgumentError(
            "hidden_states must be [tokens, hidden] in float32, bfloat16 or float16; got "
            f"{hidden_states.dtype} {tuple(hidden_states.shape)}"
        )
    if isinstance(arena, ExpertWeights):
        if arena.hidden_size != hidden_states.shape[1]:
            raise KernelArgumentError(
                f"the experts take {arena.hidden_size} inputs; hidden_states has "
                f"{hidden_states.shape[1]}"
            )
        return arena
    if fmt is None:
        raise KernelArgumentError(f"fmt is needed to read an arena; accepted: {', '.join(FORMATS)}")
    return ExpertWeights(
        arena,
        hidden_states.shape[1],
        fmt=fmt,
        activation=activation,
        is_transposed=is_transposed,
        is_concatenated=is_concatenated,
    )


def _check_assignments(hidden_states: Tensor, token_idx: Tensor, slot_ids: Tensor) -> None:
    for name, ids in (("token_idx", token_idx), ("slot_ids", slot_ids)):
        if ids.dtype not in (torch.int32, torch.int64) or ids.shape != (token_idx.numel(),):
            raise KernelArgumentError(
                f"{name} must be int32 or int64 [{token_idx.numel()}]; got {ids.dtype} "
                f"{tuple(ids.shape)}"
            )
        if ids.device != hidden_states.device:
            raise KernelArgumentError(
                f"{name} is on {ids.device}, hidden_states on {hidden_states.device}"
            )


def _check_out(
    hidden_states: Tensor, out: Tensor, out_rows: Tensor | None, *, num_rows: int
) -> None:
    enough = out.shape[0] == num_rows if out_rows is None else out_rows.shape == (num_rows,)
    if (
        not enough
        or out.dtype != hidden_states.dtype
        or out.dim() != 2
        or out.shape[1] != hidden_states.shape[1]
        or not out.is_contiguous()
    ):
        raise KernelArgumentError(
            f"out must be contiguous {hidden_states.dtype} [{num_rows}, {hidden_states.shape[1]}] "
            f"(or out_rows of that length); got {out.dtype} {tuple(out.shape)}"
        )


def _check_range(name: str, ids: Tensor, limit: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= limit:
        raise KernelArgumentError(f"{name} holds {low}..{high}; accepted: 0..{limit - 1}")


def _check_impl(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise KernelArgumentError(
            f"unknown implementation {impl!r}; accepted: {', '.join(IMPLEMENTATIONS)}"
        )
