"""Weight formats: what each one stores, and the way there and back.

Knows matrices [N, K] (N output rows, K inputs) with any leading dimensions; knows no experts, files
or models. Every definition is plain PyTorch and is the truth the native and GPU kernels are tested
against.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

FORMATS = ("fp32", "bf16", "fp16", "int8", "int4", "nf4")
GROUP_SIZE = 64  # weights that share one scale (int4, along K) or one absmax (nf4, flat)

PLAIN_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Largest magnitude of an int4 group is stored as -8 * scale; the narrower candidates clip it and
# spend the levels on the rest (relative RMS error of a normal weight 0.095 -> 0.091).
_INT4_SHRINKS = (1.0, 0.92, 0.85)

# The sixteen normal-float levels of "QLoRA" (Dettmers et al. 2023, appendix E), as bitsandbytes has
# them.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

_CHUNK_ELEMENTS = 1 << 18  # temporaries of one step: a few MiB, whatever the tensor's size


class FormatError(ValueError):
    """A weight format, shape or dtype that quantization does not define."""


def check_format(fmt: str) -> None:
    """Raise `FormatError` unless `fmt` is one of `FORMATS`."""
    if fmt not in FORMATS:
        raise FormatError(f"unknown weight format {fmt!r}; accepted: {', '.join(FORMATS)}")


def num_groups(k: int) -> int:
    """Groups of `GROUP_SIZE` that cover K weights; the last may be short."""
    return -(-k // GROUP_SIZE)


def part_shapes(fmt: str, n: int, k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every part that `quantize` makes of one [n, k] matrix, without data.

    int4 rows are padded to whole groups; nf4 is flat, as bitsandbytes lays it out.
    Raises FormatError for an unknown format or, in nf4, an odd number of weights.
    """
    check_format(fmt)
    if fmt in PLAIN_DTYPES:
        return {"weight": (PLAIN_DTYPES[fmt], (n, k))}
    if fmt == "int8":
        return {"weight": (torch.int8, (n, k)), "scale": (torch.float32, (n,))}
    groups = num_groups(k)
    if fmt == "int4":
        return {
            "weight": (torch.uint8, (n, groups * GROUP_SIZE // 2)),
            "scale": (torch.bfloat16, (n, groups)),
        }
    if n * k % 2:
        raise FormatError(f"nf4 packs two weights a byte; {n} x {k} is an odd number of weights")
    return {
        "weight": (torch.uint8, (n * k // 2,)),
        "absmax": (torch.float32, (num_groups(n * k),)),
    }


def quantize(weight: Tensor, fmt: str) -> dict[str, Tensor]:
    """Encode `weight` [..., N, K] (fp32, bf16 or fp16) as named parts with the same leading dims.

    fp32/bf16/fp16: {"weight"} in that dtype.
    int8: symmetric per output row, scale = amax / 127 (fp32 [..., N]), round half to even.
    int4: groups of 64 along K, value = (nibble - 8) * scale; byte j of a group holds weight j low
        and weight j + 32 high; scale bf16 [..., N, G], signed so that the largest magnitude sits at
        -8.
    nf4: blocks of 64 over the flat matrix, equal bit for bit to bitsandbytes' CPU `quantize_4bit`
        (first weight in the high nibble, absmax fp32, no double quantisation).

    A row or group holding NaN or infinity dequantises to NaN throughout in int8 and int4 (damage
    stays visible); nf4 follows bitsandbytes. A zero group gives zeros; a group whose scale
    underflows to zero gives zeros as well. Peak memory is the result plus a few MiB. Raises
    FormatError for an unknown format, another dtype, fewer than two dimensions, or a finite value
    that fp16 cannot hold.
    """
    check_format(fmt)
    if weight.dtype not in _SOURCE_DTYPES:
        raise FormatError(f"cannot quantise {weight.dtype}; accepted: float32, bfloat16, float16")
    if weight.dim() < 2:
        raise FormatError(f"expected a matrix [..., N, K], got shape {tuple(weight.shape)}")
    if fmt in PLAIN_DTYPES:
        return {"weight": _cast(weight, fmt)}
    *lead, n, k = weight.shape
    parts = {
        name: torch.empty((*lead, *shape), dtype=dtype, device=weight.device)
        for name, (dtype, shape) in part_shapes(fmt, n, k).items()
    }
    if fmt == "nf4":
        _quantize_nf4(weight, parts)
        return parts
    rows = weight.reshape(-1, k)
    flat = {name: part.view(rows.shape[0], -1) for name, part in parts.items()}
    encode = _encode_int8 if fmt == "int8" else _encode_int4
    step = max(1, _CHUNK_ELEMENTS // max(k, 1))
    for start in range(0, rows.shape[0], step):
        chunk = slice(start, start + step)
        flat["weight"][chunk], flat["scale"][chunk] = encode(rows[chunk].float())
    return parts


def dequantize(
    parts: Mapping[str, Tensor],
    fmt: str,
    *,
    dtype: torch.dtype,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """Decode parts into a dense [..., N, K] of `dtype`.

    Values are formed in fp32 and rounded once to `dtype`; nf4 instead rounds its levels to `dtype`
    before the product with absmax, because bitsandbytes does (bit for bit equal to its
    `dequantize_4bit`). `shape` is (N, K): needed for nf4, whose parts are flat, and for int4 where
    K is not a multiple of 64; elsewhere it is read off the parts.
    Raises FormatError where the parts do not have the shapes that `part_shapes` gives.
    """
    check_format(fmt)
    weight = parts["weight"]
    if fmt == "nf4":
        if shape is None:
            raise FormatError("nf4 parts are flat: shape=(N, K) is needed to dequantise them")
    elif shape is None:
        n, stored = weight.shape[-2:]
        shape = (n, 2 * stored if fmt == "int4" else stored)
    check_parts(parts, fmt, shape)
    if fmt in PLAIN_DTYPES:
        return weight.to(dtype)
    if fmt == "int8":
        return (weight.float() * parts["scale"].unsqueeze(-1)).to(dtype)
    if fmt == "int4":
        return _decode_int4(weight, parts["scale"], k=shape[1]).to(dtype)
    return _decode_nf4(weight, parts["absmax"], shape, dtype=dtype)


def check_parts(parts: Mapping[str, Tensor], fmt: str, shape: tuple[int, int]) -> None:
    """Raise FormatError unless `parts` hold one or more [N, K] matrices in `fmt`."""
    for name, (dtype, inner) in part_shapes(fmt, *shape).items():
        if name not in parts:
            raise FormatError(f"{fmt} weights need a part {name!r}; got {sorted(parts)}")
        part = parts[name]
        if part.dtype != dtype or tuple(part.shape[part.dim() - len(inner) :]) != inner:
            raise FormatError(
                f"part {name!r} of a {shape[0]} x {shape[1]} {fmt} matrix is {dtype} [..., "
                f"{', '.join(map(str, inner))}]; got {part.dtype} {tuple(part.shape)}"
            )


def _cast(weight: Tensor, fmt: str) -> Tensor:
    cast = weight.to(PLAIN_DTYPES[fmt]).contiguous()
    if fmt == "fp16" and weight.dtype != torch.float16:
        lost = int((cast.isinf() & ~weight.isinf()).sum())
        if lost:
            raise FormatError(f"{lost} weights exceed fp16's 65504; use bf16 or int8")
    return cast


def _encode_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    amax = rows.abs().amax(dim=1, keepdim=True)  # [R, 1]
    scale = torch.where(amax.isfinite(), amax / 127, torch.nan)
    # Division, not a product with the reciprocal: 1 / scale overflows for denormal rows.
    steps = torch.where(scale > 0, rows / scale, 0.0)
    return steps.round_().clamp_(-127, 127).to(torch.int8), scale


def _encode_int4(rows: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, k = rows.shape
    groups = torch.nn.functional.pad(rows, (0, num_groups(k) * GROUP_SIZE - k))
    groups = groups.view(num_rows, -1, GROUP_SIZE)  # [R, G, 64]
    extreme = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))  # [R, G, 1]
    extreme = torch.where(extreme.isfinite(), extreme, torch.nan)
    best_error = best_scale = best_steps = None
    for shrink in _INT4_SHRINKS:
        scale = (extreme * (shrink / -8)).bfloat16().float()
        steps = torch.where(scale.abs() > 0, groups / scale, 0.0).round_().clamp_(-8, 7)
        error = torch.addcmul(groups, steps, scale, value=-1).square_().sum(dim=2, keepdim=True)
        if best_error is None or best_scale is None or best_steps is None:
            best_error, best_scale, best_steps = error, scale, steps
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_steps = torch.where(better, steps, best_steps)
    assert best_scale is not None and best_steps is not None
    nibbles = (best_steps + 8).to(torch.uint8)
    low, high = nibbles.split(GROUP_SIZE // 2, dim=2)
    packed = low | (high << 4)
    return packed.view(num_rows, -1), best_scale.squeeze(2).bfloat16()


def _decode_int4(weight: Tensor, scale: Tensor, *, k: int) -> Tensor:
    packed = weight.unflatten(-1, (-1, GROUP_SIZE // 2))  # [..., G, 32]
    steps = torch.cat((packed & 0xF, packed >> 4), dim=-1).float() - 8
    return (steps * scale.float().unsqueeze(-1)).flatten(-2)[..., :k]


def _nf4_thresholds() -> tuple[float, ...]:
    """Smallest fp32 that is strictly nearer to level i + 1 than to i, distances rounded to fp32."""
    levels = torch.tensor(NF4_LEVELS)
    low, high = levels[:-1], levels[1:]
    middle = (low.double() + high.double()).mul(0.5).float()
    candidates = [middle]
    for _ in range(8):
        candidates.insert(0, torch.nextafter(candidates[0], low))
        candidates.append(torch.nextafter(candidates[-1], high))
    grid = torch.stack(candidates, dim=1)  # [15, 17], ascending
    nearer = (grid - high[:, None]).abs() < (grid - low[:, None]).abs()
    first = nearer.int().argmax(dim=1, keepdim=True)
    return tuple(grid.gather(1, first).squeeze(1).tolist())


def _encode_nf4(blocks: Tensor, thresholds: Tensor, *, short: bool) -> tuple[Tensor, Tensor]:
    """Codes [B, L] and absmax [B] of blocks [B, L], by bitsandbytes' own steps of arithmetic."""
    absmax = blocks.abs().amax(dim=1).float()  # [B]
    scaled = torch.clamp(blocks * (1 / absmax).unsqueeze(1), -1, 1)
    if short:
        # bitsandbytes multiplies a short last block by a 0-d tensor, which does not promote bf16.
        scaled = scaled.to(blocks.dtype).float()
    codes = torch.bucketize(scaled, thresholds, right=True, out_int32=True).to(torch.uint8)
    # argmin takes the first NaN distance: zero blocks (0 * inf) and NaN weights get code 0.
    return codes.masked_fill_(scaled.isnan(), 0), absmax


def _quantize_nf4(weight: Tensor, parts: dict[str, Tensor]) -> None:
    *_, n, k = weight.shape
    full, rest = divmod(n * k, GROUP_SIZE)
    thresholds = torch.tensor(_nf4_thresholds(), device=weight.device)
    matrices = weight.reshape(-1, n * k)
    packed_out = parts["weight"].view(matrices.shape[0], -1)
    absmax_out = parts["absmax"].view(matrices.shape[0], -1)
    step = _CHUNK_ELEMENTS // GROUP_SIZE
    for matrix, packed, absmax in zip(matrices, packed_out, absmax_out, strict=True):
        blocks = matrix[: full * GROUP_SIZE].view(full, GROUP_SIZE)
        halves = packed[: full * GROUP_SIZE // 2].view(full, GROUP_SIZE // 2)
        for start in range(0, full, step):
            chunk = slice(start, start + step)
            codes, absmax[:full][chunk] = _encode_nf4(blocks[chunk], thresholds, short=False)
            halves[chunk] = (codes[:, ::2] << 4) | codes[:, 1::2]
        if rest:
            last = matrix[full * GROUP_SIZE :].unsqueeze(0)
            codes, absmax[full:] = _encode_nf4(last, thresholds, short=True)
            packed[full * GROUP_SIZE // 2 :] = (codes[0, ::2] << 4) | codes[0, 1::2]


def _decode_nf4(
    weight: Tensor, absmax: Tensor, shape: tuple[int, int], *, dtype: torch.dtype
) -> Tensor:
    n, k = shape
    lead = weight.shape[:-1]
    levels = torch.tensor(NF4_LEVELS, device=weight.device).to(dtype).float()
    codes = torch.stack((weight >> 4, weight & 0xF), dim=-1).flatten(-2)  # [..., N * K]
    blocks = torch.nn.functional.pad(codes, (0, num_groups(n * k) * GROUP_SIZE - n * k))
    values = levels[blocks.int()].unflatten(-1, (-1, GROUP_SIZE)) * absmax.unsqueeze(-1)
    return values.flatten(-2)[..., : n * k].to(dtype).reshape(*lead, n, k)
