"""What a card should make of decode at a model's sizes: calculated, and verified by no card.

Joins the sizes of a step, the block table and the compiler's figures for the model of `occupancy`.
"""

from collections.abc import Sequence
from typing import Any

from ..kernels.blocks import TABLE, load_table, table_key
from ..kernels.compiled import read_table, variant_name
from ..runtime.errors import UsageError
from .kernel_cases import Case
from .model_shapes import Geometry, bits, model_shapes
from .occupancy import RTX_3090, Card, Launch, expected

CARDS = {"rtx3090": RTX_3090}
# The combine, and the row numbers that the gathered kernels are given.
_OTHER_LAUNCHES = 2
_PACKED_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4, "nf4": 4}


def calculated(case: Case, impl: str) -> dict[str, Any] | None:
    """The expected share for an RTX 3090 of a Triton decode row of one token, else None."""
    if impl != "triton" or case.phase != "decode" or case.num_tokens != 1 or case.op == "combine":
        return None
    return expected_row(model_shapes()[case.shape], case.op, case.fmt, RTX_3090)


def expected_rows(
    card: str, *, shapes: Sequence[str], formats: Sequence[str]
) -> list[dict[str, Any]]:
    """Of every decode op, shape and format: INTERFACES' row with a calculated share and no speed.

    Raises UsageError for a card that is not known.
    """
    if card not in CARDS:
        raise UsageError(f"--expected {card!r} is unknown; accepted: {', '.join(CARDS)}")
    return [
        {
            "op": op,
            "impl": "triton",
            "format": fmt,
            "shape": shape,
            "phase": "decode",
            "gb_per_s": None,
            "share_of_read": None,
            "error": None,
            "expected": expected_row(model_shapes()[shape], op, fmt, CARDS[card]),
        }
        for shape in shapes
        for op in ("expert_mlp", "linear")
        for fmt in formats
    ]


def expected_row(model: Geometry, op: str, fmt: str, card: Card) -> dict[str, Any]:
    """One token's experts (gate and up, then down), or one square matrix, on `card`."""
    hidden, inner, top_k = model.hidden_size, model.expert_size, model.top_k
    if op == "linear":
        launches = [_launch("linear", fmt, card, matrices=1, rows=hidden, inputs=hidden)]
        return expected(launches, card).as_dict(card)
    launches = [
        _launch("gate_up", fmt, card, matrices=top_k, rows=inner, inputs=hidden),
        _launch("rows", fmt, card, matrices=top_k, rows=hidden, inputs=inner),
    ]
    return expected(launches, card, num_other_launches=_OTHER_LAUNCHES).as_dict(card)


def _launch(kernel: str, fmt: str, card: Card, *, matrices: int, rows: int, inputs: int) -> Launch:
    table = load_table(TABLE)
    mine = table_key("gathered", fmt, 0, card.arch)
    blocks = table[mine if mine in table else table_key("gathered", fmt, 0, "any")]
    dtype = fmt if fmt in ("fp16", "fp32") else "bf16"
    figures = read_table()[1][variant_name(kernel, fmt, dtype, card.arch)]
    projections = 2 if kernel == "gate_up" else 1
    return Launch(
        figures=figures,
        num_programs=matrices * -(-rows // blocks.block_n),
        num_bytes=round(matrices * projections * rows * inputs * bits(fmt) / 8),
        step_bytes=blocks.block_n * blocks.block_k * _PACKED_BITS[fmt] // 8,
    )
