"""The ops at the sizes of real models, each as arms that can be called, timed and checked.

Every call takes other slots of an arena of gigabytes, so its weights come from memory and not from
a cache. Knows no clock and no table.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor

from ..kernels.expert_mlp import combine, expert_outputs
from ..kernels.linear import linear, prepared
from ..kernels.reference import combine_reference
from .expert_case import ExpertCase, relative_error
from .model_shapes import Geometry
from .torch_arms import TorchExperts, TorchLinear

# Relative RMS error that a result may have, by activation dtype: what rounding alone gives, twice
# over for an expert's row and the sum of rows. PyTorch's own ops round in between as well.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
TORCH_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
MAX_PREFILL_FLOPS = 2e10
MAX_PREFILL_EXPERTS = 8


@dataclass(frozen=True, slots=True)
class Arm:
    """One implementation of an op: `call(turn)` computes with the weights of that turn; `error()`
    is its relative RMS error on those of turn 0, against dequantised weights in fp32."""

    impl: str
    call: Callable[[int], object]
    error: Callable[[], float]
    tolerance: float


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one model's sizes. `num_bytes` one call reads (weights and scales; of the combine
    the rows read and written); `flops` counts a multiply-add as two."""

    op: str
    shape: str
    fmt: str
    phase: str
    num_tokens: int
    num_bytes: int
    flops: int
    arms: tuple[Arm, ...]
    dense: tuple[int, int, int] | None = None
    """Rows, inputs, outputs of a dense product that prefill is compared with."""


def cases(
    experts: ExpertCase,
    models: Sequence[tuple[str, Geometry]],
    *,
    impls: Sequence[str],
    dtype: torch.dtype,
    decode_tokens: int,
    prefill_tokens: int,
) -> Iterator[Case]:
    """Every op and phase of the models whose experts `experts` stands for."""
    for name, model in models:
        decode = _Experts(experts, name, model, dtype, impls)
        yield decode.decode(decode_tokens)
        yield decode.prefill(prefill_tokens)
        for phase, tokens in (("decode", decode_tokens), ("prefill", prefill_tokens)):
            yield _linear_case(experts, name, phase, tokens, dtype=dtype, impls=impls)
        if experts.fmt == "bf16":  # rows of activations: the weights' format is not in them
            for phase, tokens in (("decode", decode_tokens), ("prefill", prefill_tokens)):
                yield _combine_case(name, model, phase, tokens, dtype=dtype, device=experts.device)


class _Experts:
    def __init__(
        self,
        experts: ExpertCase,
        name: str,
        model: Geometry,
        dtype: torch.dtype,
        impls: Sequence[str],
    ) -> None:
        self._experts, self._name, self._model = experts, name, model
        self._dtype, self._impls = dtype, impls

    def decode(self, num_tokens: int) -> Case:
        """A step of a few tokens: every chosen expert and the combine, as the engine calls them."""
        experts, top_k = self._experts, self._model.top_k
        rows = _rows(num_tokens, experts.hidden, self._dtype, experts.device)
        turns = list(self._turns(num_tokens * top_k))
        weights = torch.rand(num_tokens, top_k, generator=torch.Generator().manual_seed(3))
        weights = weights.to(experts.device)
        token_idx = torch.arange(num_tokens, device=experts.device).repeat_interleave(top_k)
        arms = []
        for impl in self._impls:
            if impl == "torch":
                torch_experts = TorchExperts.of(experts, self._dtype)
                if torch_experts is None or num_tokens > 1:
                    continue
                run, truth = torch_experts.runner(rows, turns, weights)
                arms.append(_arm("torch", run, truth, TORCH_TOLERANCE[self._dtype]))
                continue

            def call(turn: int, impl: str = impl) -> Tensor:
                ids = turns[turn % len(turns)]
                out = expert_outputs(rows, (token_idx, ids), experts.weights, impl=impl)
                return combine(
                    out.view(num_tokens, top_k, -1),
                    weights,
                    ids.view(num_tokens, top_k),
                    impl=None if impl == "triton" else impl,
                )

            arms.append(_arm(impl, call, self._truth(rows, turns, weights), self._tolerance))
        num_experts = len(turns[0].unique())
        return Case(
            op="expert_mlp",
            shape=self._name,
            fmt=experts.fmt,
            phase="decode",
            num_tokens=num_tokens,
            num_bytes=num_experts * experts.expert_bytes,
            flops=2 * num_tokens * top_k * 3 * experts.hidden * experts.inner,
            arms=tuple(arms),
        )

    def prefill(self, num_tokens: int) -> Case:
        """A prompt's rows at as many experts as a second of work allows, without the combine."""
        experts, model = self._experts, self._model
        per_expert = max(1, num_tokens * model.top_k // model.num_experts)
        flops = 2 * per_expert * 3 * experts.hidden * experts.inner
        count = int(min(MAX_PREFILL_EXPERTS, experts.num_slots, MAX_PREFILL_FLOPS // flops))
        count = max(1, count)
        rows = _rows(num_tokens, experts.hidden, self._dtype, experts.device)
        generator = torch.Generator().manual_seed(4)
        token_idx = torch.cat(
            [torch.randperm(num_tokens, generator=generator)[:per_expert] for _ in range(count)]
        ).to(experts.device)
        turns = [ids.repeat_interleave(per_expert) for ids in self._turns(count)]

        def truth() -> Tensor:
            blocks = turns[0].view(count, per_expert)
            return torch.cat(
                [
                    experts.expert_rows(rows[token_idx.view(count, -1)[i]], int(blocks[i, 0]))
                    for i in range(count)
                ]
            )

        arms = []
        for impl in self._impls:
            if impl == "torch":  # its matrix product is what every prefill row is compared with
                continue

            def call(turn: int, impl: str = impl) -> Tensor:
                ids = turns[turn % len(turns)]
                return expert_outputs(rows, (token_idx, ids), experts.weights, impl=impl)

            arms.append(_arm(impl, call, truth, self._tolerance))
        return Case(
            op="expert_mlp",
            shape=self._name,
            fmt=experts.fmt,
            phase="prefill",
            num_tokens=num_tokens,
            num_bytes=count * experts.expert_bytes,
            flops=count * flops,
            arms=tuple(arms),
            dense=(num_tokens, experts.hidden, 2 * experts.inner),
        )

    @property
    def _tolerance(self) -> float:
        return TOLERANCE[self._dtype]

    def _turns(self, count: int) -> Iterator[Tensor]:
        """Slots [count] of each call, in turn over the whole arena."""
        num_slots = self._experts.num_slots
        order = torch.randperm(num_slots, generator=torch.Generator().manual_seed(5)).tolist()
        slots = cycle(order)
        for _ in range(max(1, num_slots // min(count, num_slots))):
            chosen = list(islice(slots, count))
            yield torch.tensor(chosen, device=self._experts.device)

    def _truth(
        self, rows: Tensor, turns: Sequence[Tensor], weights: Tensor
    ) -> Callable[[], Tensor]:
        def truth() -> Tensor:
            ids = turns[0].view(weights.shape)
            out = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
            for token in range(ids.shape[0]):
                for choice in range(ids.shape[1]):
                    one = self._experts.expert_rows(
                        rows[token : token + 1], int(ids[token, choice])
                    )
                    out[token] += weights[token, choice] * one[0]
            return out

        return truth


def _linear_case(
    experts: ExpertCase,
    name: str,
    phase: str,
    num_tokens: int,
    *,
    dtype: torch.dtype,
    impls: Sequence[str],
) -> Case:
    """A square matrix as attention has them: the first rows of every slot's gate and up."""
    hidden, fmt = experts.hidden, experts.fmt
    shape = (min(hidden, 2 * experts.inner), hidden)
    matrices = [
        experts.rows_of("gate_up_proj", slot, shape[0]) for slot in range(experts.num_slots)
    ]
    rows = _rows(num_tokens, hidden, dtype, experts.device)

    def truth() -> Tensor:
        return experts.matrix_product(rows, matrices[0], shape)

    arms = []
    for impl in impls:
        if impl == "torch":
            torch_linear = TorchLinear.of(matrices, shape, fmt, dtype)
            if torch_linear is None or phase == "prefill":
                continue
            run = torch_linear.runner(rows)
            arms.append(_arm("torch", run, truth, TORCH_TOLERANCE[dtype]))
            continue
        products = None
        if impl == "cpu" and phase == "decode":
            products = [prepared(parts, fmt=fmt, columns=hidden) for parts in matrices]

        def call(turn: int, impl: str = impl, products: list | None = products) -> Tensor:
            place = turn % len(matrices)
            product = None if products is None else products[place]
            if product is not None:
                return product(rows, num_tokens)
            return linear(rows, matrices[place], fmt=fmt, impl=impl)

        arms.append(_arm(impl, call, truth, TOLERANCE[dtype]))
    return Case(
        op="linear",
        shape=name,
        fmt=fmt,
        phase=phase,
        num_tokens=num_tokens,
        num_bytes=sum(part.numel() * part.element_size() for part in matrices[0].values()),
        flops=2 * num_tokens * shape[0] * shape[1],
        arms=tuple(arms),
        dense=(num_tokens, shape[1], shape[0]) if phase == "prefill" else None,
    )


def _combine_case(
    name: str,
    model: Geometry,
    phase: str,
    num_tokens: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    top_k, hidden = model.top_k, model.hidden_size
    outputs = _rows(num_tokens * top_k, hidden, dtype, device).view(num_tokens, top_k, hidden)
    generator = torch.Generator().manual_seed(6)
    ids = torch.stack(
        [torch.randperm(model.num_experts, generator=generator)[:top_k] for _ in range(num_tokens)]
    ).to(device)
    weights = torch.rand(num_tokens, top_k, generator=generator).to(device)

    def call(turn: int) -> Tensor:
        return combine(outputs, weights, ids)

    def error() -> float:
        # The same sums in the same order: nothing but equality will do.
        return relative_error(call(0), combine_reference(outputs, weights, ids))

    return Case(
        op="combine",
        shape=name,
        fmt=_DTYPE_NAMES[dtype],
        phase=phase,
        num_tokens=num_tokens,
        num_bytes=(top_k + 1) * num_tokens * hidden * outputs.element_size(),
        flops=2 * top_k * num_tokens * hidden,
        arms=(Arm("triton" if device.type == "cuda" else "cpu", call, error, 0.0),),
    )


_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _arm(
    impl: str, call: Callable[[int], Tensor], truth: Callable[[], Tensor], tolerance: float
) -> Arm:
    return Arm(impl, call, lambda: relative_error(call(0), truth()), tolerance)


def _rows(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, width, generator=generator).to(dtype).to(device)
