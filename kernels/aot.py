"""The Triton kernels compiled to machine code without a GPU, and what the compiler says of them.

Knows which variants are shipped and what the architectures allow; runs nothing. Figures hold for
one compiler version; the table beside it, `compiled.json`, names the one it was made with and is
renewed by `make aot`.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import choice, decode_attention, gathered, grouped_matmul, residual_norm, weighted_sum
from .blocks import TABLE, Blocks, load_table, table_key
from .compiled import COMPILED, Figures, variant_name

ARCHITECTURES = (80, 86, 89, 90)
# Shared memory one block may have (CUDA C++ programming guide, table of compute capabilities).
SHARED_LIMITS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
DECODE_KERNELS = ("gate_up", "rows", "linear")
KERNELS = (*DECODE_KERNELS, "grouped_gate_up", "grouped_rows")
# What a decoded token takes beside products: kernel, warps, constants at DeepSeek-MoE-16B's sizes.
_HEADS = {"A": 16, "G": 16, "D": 128, "BLOCK_D": 128}
_SPLITS = {"SPLITS": decode_attention.NUM_SPLITS}
TOKEN_KERNELS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "combine": (
        weighted_sum._combine_kernel,
        weighted_sum.NUM_WARPS,
        {"TOP_K": 6, "PADDED_K": 8, "BLOCK_H": weighted_sum.BLOCK_H},
    ),
    "residual_norm": (
        residual_norm._residual_norm_kernel,
        residual_norm.NUM_WARPS,
        {"NUM_ADDED": 2, "BLOCK_H": 2048},
    ),
    "place": (
        decode_attention._place_kernel,
        1,
        {**_HEADS, "QUERY_NORM": 0, "KEY_NORM": 0, "BLOCK_WIDTH": 2048},
    ),
    "attend": (
        decode_attention._attend_kernel,
        decode_attention.NUM_WARPS,
        {**_HEADS, **_SPLITS, "WINDOW": 0, "BLOCK_KEYS": decode_attention.BLOCK_KEYS},
    ),
    "merge": (decode_attention._merge_kernel, 1, {**_SPLITS, "D": 128, "BLOCK_D": 128}),
    "choose": (
        choice._choose_kernel,
        choice.NUM_WARPS,
        {
            "TOP_K": 6,
            "PADDED_K": 8,
            "BLOCK_E": 64,
            "RENORMALISED": True,
            "ROUNDS_SCORES": True,
            "ROUNDS_WEIGHTS": True,
        },
    ),
}
FORMATS = ("bf16", "fp16", "int8", "int4", "nf4", "fp32")

_WEIGHT_BITS = {"bf16": 16, "fp16": 16, "fp32": 32, "int8": 8, "int4": 4, "nf4": 4}
_WEIGHTS = {"int8": "*i8", "int4": "*u8", "nf4": "*u8"}
_SCALES = {"int8": "*fp32", "int4": "*bf16", "nf4": "*fp32"}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class CompilerError(RuntimeError):
    """A variant that does not compile, or whose figures cannot be read."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel as launched: kernel, weight format, activation dtype, architecture."""

    kernel: str
    fmt: str
    dtype: str
    arch: int

    @property
    def name(self) -> str:
        """Key of its row in the table."""
        return variant_name(self.kernel, self.fmt, self.dtype, self.arch)

    @property
    def weight_loads(self) -> int:
        """Loads of 16 bytes that a step over its weights takes in each thread (decode kernels)."""
        sizes = self.blocks
        step = sizes.block_n * sizes.block_k * _WEIGHT_BITS[self.fmt] // 8
        return step // (16 * 32 * sizes.num_warps) * (2 if self.kernel == "gate_up" else 1)

    @property
    def blocks(self) -> Blocks:
        """The sizes that the shipped table gives it."""
        if self.kernel in TOKEN_KERNELS:
            return Blocks(1, 1, num_warps=TOKEN_KERNELS[self.kernel][1])
        op = "grouped" if self.kernel.startswith("grouped") else "gathered"
        table = load_table(TABLE)
        mine = table_key(op, self.fmt, 0, self.arch)
        return table[mine if mine in table else table_key(op, self.fmt, 0, "any")]


def variants(
    *, architectures: Iterable[int] = ARCHITECTURES, kernels: Iterable[str] = KERNELS
) -> list[Variant]:
    """Every variant that is shipped, each format with the activations it is mostly met with."""
    kernels = tuple(kernels)
    chosen = []
    for arch in architectures:
        for fmt in FORMATS:
            dtype = fmt if fmt in ("fp16", "fp32") else "bf16"
            chosen += [Variant(kernel, fmt, dtype, arch) for kernel in kernels]
        chosen += [Variant(kernel, "bf16", "bf16", arch) for kernel in TOKEN_KERNELS]
    return chosen


def compile_variant(variant: Variant) -> Figures:
    """Compile to a cubin for the variant's architecture (a second or two; needs no GPU).

    Raises CompilerError where Triton, its assembler or the figures fail.
    """
    source, options = _source(variant)
    target = GPUTarget("cuda", variant.arch, 32)
    try:
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:
        raise CompilerError(f"{variant.name} does not compile: {error}") from error
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _resource_usage(file.name, variant)
        loop = _longest_loop(_output("nvdisasm", "-c", file.name, variant=variant))
    return Figures(
        registers=usage["REG"],
        spill_bytes=usage["LOCAL"] + usage["STACK"],
        shared_bytes=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        loop_instructions=loop,
        wide_loads=len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", compiled.asm["ptx"])),
    )


def compile_table(chosen: Iterable[Variant]) -> dict[str, Any]:
    """Figures of the chosen variants under the compiler's version, as `compiled.json` has them."""
    rows = {variant.name: asdict(compile_variant(variant)) for variant in chosen}
    return {"triton": triton.__version__, "variants": rows}


def write_table(path: Path = COMPILED) -> None:
    """Compile every variant (minutes) and write their figures; `python -m outrider.kernels.aot`."""
    path.write_text(json.dumps(compile_table(variants()), indent=1) + "\n")


def _source(variant: Variant) -> tuple[ASTSource, dict[str, Any]]:
    if variant.kernel in TOKEN_KERNELS:
        return _token_source(variant)
    blocks, fmt = variant.blocks, variant.fmt
    activation, weight = f"*{variant.dtype}", _WEIGHTS.get(fmt, f"*{fmt}")
    types = {
        "w_ptr": weight,
        "s_ptr": _SCALES.get(fmt, weight),
        "bias_ptr": weight,
        "levels_ptr": "*fp32",
        "h_ptr": "*fp32",
        # The rows of `rows` are the fp32 ones between the projections.
        "x_ptr": "*fp32" if variant.kernel == "rows" else activation,
        "out_ptr": activation,
    }
    sizes = {"BLOCK_M": blocks.block_m, "BLOCK_N": blocks.block_n, "BLOCK_K": blocks.block_k}
    constants: dict[str, Any] = {
        **sizes,
        "FORMAT": fmt if fmt in _SCALES else "plain",
        "HAS_BIAS": False,
        "WIDE": False,
        "DENSE": variant.kernel == "linear",
        "ACTIVATION": "silu" if variant.kernel.endswith("gate_up") else "",
        "CONCATENATED": True,
        "stride_k": 1,
    }
    kernel = {
        "gate_up": gathered._gate_up_kernel,
        "rows": gathered._rows_kernel,
        "linear": gathered._rows_kernel,
    }.get(variant.kernel, grouped_matmul._grouped_kernel)
    return _ast(kernel, types, constants), blocks.options


def _token_source(variant: Variant) -> tuple[ASTSource, dict[str, Any]]:
    kernel, num_warps, constants = TOKEN_KERNELS[variant.kernel]
    activation, indices = f"*{variant.dtype}", ("position", "length", "capacity", "address", "ids")
    types = {name: activation for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {f"{name}_ptr": "*i64" for name in indices}
    types |= {"weights_ptr": "*fp32", "part_ptr": "*fp32"}
    types |= dict.fromkeys(("eps", "epsilon", "scaling"), "fp32")
    is_fused = variant.kernel != "combine"
    return _ast(kernel, types, constants), {"num_warps": num_warps, "enable_fp_fusion": is_fused}


def _ast(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> ASTSource:
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    # Not named: indices end in _ptr, sizes and strides do not.
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "*i64" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    # What a launch finds: tensors aligned to 16 bytes, sizes and strides multiples of 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name not in constants and signature[name] != "fp32"
    }
    return ASTSource(kernel, signature, constexprs=constants, attrs=aligned)


def _output(tool: str, *arguments: str, variant: Variant) -> str:
    result = subprocess.run(
        [str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise CompilerError(f"{variant.name}: {tool} failed: {result.stderr[:200]}")
    return result.stdout


def _resource_usage(file: str, variant: Variant) -> dict[str, int]:
    text = _output("cuobjdump", "--dump-resource-usage", file, variant=variant)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text))
    if not {"REG", "STACK", "LOCAL"} <= set(found):
        raise CompilerError(f"{variant.name}: no resource usage in {text[:200]!r}")
    return {name: int(value) for name, value in found.items()}


def _longest_loop(listing: str) -> int:
    """Instructions of the longest run between a label and a branch back to it; 0 without one."""
    starts: dict[str, int] = {}
    count = longest = 0
    for line in listing.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            starts[label.group(1)] = count
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            count += 1
            branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)
            # A branch to itself is the padding behind every kernel.
            if branch and starts.get(branch.group(1), count) < count - 1:
                longest = max(longest, count - starts[branch.group(1)])
    return longest


if __name__ == "__main__":
    write_table()
