"""The native library: found, loaded with ctypes, and called with plain addresses.

Knows the C descriptors of `csrc/outrider.h` and `csrc/dispatch.h`; chooses nothing but who lends
the threads. Calls release the GIL and block until done.
"""

import ctypes
import logging
from collections.abc import Mapping
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .activation import ACTIVATIONS
from .quantization import FORMATS, GROUP_SIZE
from .ways import Way
from .weights import ExpertWeights

logger = logging.getLogger(__name__)

_FORMAT_IDS = {name: index for index, name in enumerate(FORMATS)}
DTYPE_IDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SCALE_PARTS = {"int8": "scale", "int4": "scale", "nf4": "absmax"}
ISAS = ("avx512_bf16", "avx512_vnni", "avx512", "avx2", "neon", "generic")
_STATUS = {
    1: "token_idx holds a token that hidden_states has not",
    2: "slot_ids holds a slot that the arena has not",
    3: "out_rows holds a row that out has not",
}


class NativeArgumentError(ValueError):
    """An index that points outside the tensors; nothing was computed."""


class Matrix(ctypes.Structure):
    """`Matrix` of csrc/outrider.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("weight_stride", ctypes.c_int64),
        ("scale_stride", ctypes.c_int64),
        ("bias_stride", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("bias_format", ctypes.c_int32),
    )


class _Experts(ctypes.Structure):
    _fields_ = (
        ("gate_up", Matrix),
        ("down", Matrix),
        ("num_slots", ctypes.c_int64),
        ("activation", ctypes.c_int32),
        ("is_concatenated", ctypes.c_int32),
    )


class _Inputs(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("token_idx", ctypes.c_void_p),
        ("slot_ids", ctypes.c_void_p),
        ("out_rows", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("num_assignments", ctypes.c_int64),
        ("num_out_rows", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("token_idx_wide", ctypes.c_int32),
        ("slot_ids_wide", ctypes.c_int32),
        ("out_rows_wide", ctypes.c_int32),
        ("way", ctypes.c_int32),
    )


def library_path() -> Path | None:
    """Where the built library lies, or None if installation found no compiler."""
    places = (Path(__file__).with_name(f"_native{suffix}") for suffix in EXTENSION_SUFFIXES)
    return next(filter(Path.exists, places), None)


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where there is none to load."""
    path = library_path()
    if path is None:
        return None
    try:
        lib = load(path)
    except OSError:
        return None
    except AttributeError as error:  # ctypes' word for a call that a library has not
        logger.warning(
            "%s was built from other sources (%s), so PyTorch computes, slower; install again",
            path.name,
            error,
        )
        return None
    borrow_threads(lib)
    return lib


def load(path: Path) -> ctypes.CDLL:
    """Load a build of `csrc` and declare its calls.

    Raises OSError as the loader does, AttributeError where the build lacks one of the calls.
    """
    lib = ctypes.CDLL(str(path))
    pointer, wide, narrow, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    lib.outrider_expert_outputs.argtypes = [pointer, pointer, narrow]
    lib.outrider_linear.argtypes = [pointer] * 3 + [wide, wide] + [narrow] * 3
    lib.outrider_combine.argtypes = [pointer, pointer, pointer, wide, wide, wide, narrow, pointer]
    lib.outrider_read.argtypes = [pointer, wide, narrow]
    lib.outrider_read.restype = ctypes.c_float
    lib.outrider_use_fork.argtypes, lib.outrider_use_fork.restype = [pointer], None
    lib.outrider_use_isa.argtypes = [ctypes.c_char_p]
    lib.outrider_isa.restype = ctypes.c_char_p
    lib.outrider_product_ns.restype = wide
    lib.outrider_has_bf16_products.argtypes = [narrow]
    lib.outrider_rms_norm.argtypes = [pointer, pointer, real, wide, wide, narrow, pointer, narrow]
    lib.outrider_attend.argtypes = [pointer, *[pointer, wide] * 2, *[pointer] * 2, *[narrow] * 2]
    lib.outrider_gated_mlp.argtypes = [pointer, pointer, wide, pointer, narrow, narrow]
    lib.outrider_add_residual.argtypes = [pointer, pointer, pointer, wide, wide, narrow, narrow]
    lib.outrider_choose.argtypes = [pointer, pointer, wide, *[pointer] * 4]
    lib.outrider_gate_rows.argtypes = [pointer, pointer, wide, wide, narrow]
    lib.outrider_decode.argtypes = [pointer, pointer]
    lib.outrider_forecast_layers.argtypes = [pointer] * 8 + [narrow]
    lib.outrider_forecast_token.argtypes = [pointer] * 6 + [wide] * 3 + [narrow]
    lib.outrider_token_rows.argtypes = [pointer] * 4 + [wide, wide, narrow, narrow, pointer, narrow]
    return lib


def borrow_threads(lib: ctypes.CDLL) -> bool:
    """Let `lib` run on the threads of the libgomp that PyTorch loaded; True if there is one.

    Two pools fight for the cores, since libgomp's threads spin after each of PyTorch's operations:
    a layer between two of them took 1.6 ms on libgomp's own threads, 2.9 ms on ours (2 cores).
    """
    gomp = _loaded_libgomp()
    if gomp is None:
        lib.outrider_use_fork(None)
        return False
    lib.outrider_use_fork(ctypes.cast(gomp.GOMP_parallel, ctypes.c_void_p))
    return True


def _loaded_libgomp() -> ctypes.CDLL | None:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = sorted({line.split()[-1] for line in lines if "libgomp" in line})
    own = [path for path in paths if Path(torch.__file__).parent in Path(path).parents]
    chosen = own or paths
    return ctypes.CDLL(chosen[0]) if len(chosen) == 1 else None


def is_available() -> bool:
    """Whether the native kernels can be called."""
    return library() is not None


def isa() -> str:
    """Which kernels run: one of `ISAS`, or `torch` without the library."""
    lib = library()
    return "torch" if lib is None else lib.outrider_isa().decode()


def use_isa(name: str) -> bool:
    """Compute with the kernels of `name` from now on; False where processor or build lacks them.

    The widest is chosen without being asked; tests and measurements ask for the others.
    """
    lib = library()
    return lib is not None and bool(lib.outrider_use_isa(name.encode()))


def has_bf16_products(fmt: str, dtype: torch.dtype) -> bool:
    """Whether many rows of `dtype` meet weights of `fmt` in the processor's bf16 unit."""
    lib = library()
    if lib is None or dtype != torch.bfloat16:
        return False
    return bool(lib.outrider_has_bf16_products(_FORMAT_IDS[fmt]))


def serves(weights: ExpertWeights) -> bool:
    """Whether the native code computes these experts (else PyTorch does)."""
    if library() is None or weights.is_transposed or weights.gate_up["weight"].device.type != "cpu":
        return False
    return serves_width(weights.fmt, weights.hidden_size) and serves_width(
        weights.fmt, weights.intermediate_size
    )


def serves_width(fmt: str, k: int) -> bool:
    """Whether rows of `k` weights can be streamed: nf4's flat blocks must not straddle rows."""
    return k > 0 and (fmt != "nf4" or k % GROUP_SIZE == 0)


_experts: WeakKeyDictionary[ExpertWeights, _Experts] = WeakKeyDictionary()


def expert_outputs(
    hidden_states: Tensor,
    token_idx: Tensor,
    slot_ids: Tensor,
    weights: ExpertWeights,
    *,
    out: Tensor,
    out_rows: Tensor | None,
    num_threads: int,
    way: Way = Way.BY_COUNT,
) -> None:
    """Write every assignment's row of `out`; NativeArgumentError for an index out of range."""
    lib = loaded()
    descriptor = experts_of(weights)
    if hidden_states.stride(1) != 1:
        hidden_states = hidden_states.contiguous()
    token_idx, slot_ids = token_idx.contiguous(), slot_ids.contiguous()
    rows = None if out_rows is None else out_rows.contiguous()
    inputs = _Inputs(
        x=hidden_states.data_ptr(),
        out=out.data_ptr(),
        token_idx=token_idx.data_ptr(),
        slot_ids=slot_ids.data_ptr(),
        out_rows=None if rows is None else rows.data_ptr(),
        num_tokens=hidden_states.shape[0],
        x_stride=hidden_states.stride(0) * hidden_states.element_size(),
        num_assignments=token_idx.shape[0],
        num_out_rows=out.shape[0],
        format=DTYPE_IDS[hidden_states.dtype],
        token_idx_wide=token_idx.dtype == torch.int64,
        slot_ids_wide=slot_ids.dtype == torch.int64,
        out_rows_wide=rows is not None and rows.dtype == torch.int64,
        way=way,
    )
    check_status(
        lib.outrider_expert_outputs(ctypes.byref(descriptor), ctypes.byref(inputs), num_threads)
    )


def linear(
    hidden_states: Tensor,
    parts: Mapping[str, Tensor],
    shape: tuple[int, int],
    *,
    fmt: str,
    bias: Tensor | None,
    out: Tensor,
    num_threads: int,
) -> None:
    """out [T, N] = hidden_states [T, K] by the contiguous [N, K] matrix in `parts`, plus bias."""
    matrix = matrix_of(parts, shape, fmt=fmt, bias=bias)
    check_status(
        loaded().outrider_linear(
            ctypes.byref(matrix),
            hidden_states.data_ptr(),
            out.data_ptr(),
            hidden_states.shape[0],
            hidden_states.stride(0) * hidden_states.element_size(),
            DTYPE_IDS[hidden_states.dtype],
            Way.BY_COUNT,
            num_threads,
        )
    )


def combine(outputs: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, out: Tensor) -> None:
    """out [T, H] = the fixed-order sum of contiguous outputs [T, K, H]; weights fp32, ids int64."""
    num_tokens, top_k, hidden = outputs.shape
    check_status(
        loaded().outrider_combine(
            outputs.data_ptr(),
            topk_weights.data_ptr(),
            topk_ids.data_ptr(),
            num_tokens,
            top_k,
            hidden,
            DTYPE_IDS[outputs.dtype],
            out.data_ptr(),
        )
    )


def read(tensor: Tensor, *, num_threads: int) -> None:
    """Read a contiguous tensor once and throw it away: the benchmark's yardstick."""
    loaded().outrider_read(tensor.data_ptr(), tensor.numel() * tensor.element_size(), num_threads)


def product_s() -> float:
    """Seconds that calls of this process have spent in products of matrices so far."""
    lib = library()
    return 0.0 if lib is None else 1e-9 * lib.outrider_product_ns()


def loaded() -> ctypes.CDLL:
    """The library, where `is_available` has said that there is one."""
    lib = library()
    assert lib is not None
    return lib


def check_status(status: int) -> None:
    """Raise what a native call's status means; 0 is nothing."""
    if status == 4:
        raise MemoryError("the native kernels could not allocate their working memory")
    if status:
        raise NativeArgumentError(_STATUS[status])


def experts_of(weights: ExpertWeights) -> ctypes.Structure:
    """The C descriptor of these experts, made once; valid as long as `weights` is alive."""
    descriptor = _experts.get(weights)
    if descriptor is None:
        descriptor = _experts[weights] = _describe(weights)
    return descriptor


def matrix_of(
    parts: Mapping[str, Tensor], shape: tuple[int, int], *, fmt: str, bias: Tensor | None
) -> Matrix:
    """The C descriptor of one contiguous [N, K] matrix; goes by addresses, keeps nothing alive."""
    one = {name: part.unsqueeze(0) for name, part in parts.items()}
    return _matrix(one, None if bias is None else bias.unsqueeze(0), shape, fmt=fmt)


def _describe(weights: ExpertWeights) -> _Experts:
    hidden, intermediate = weights.hidden_size, weights.intermediate_size
    return _Experts(
        gate_up=_matrix(
            weights.gate_up, weights.gate_up_bias, (2 * intermediate, hidden), fmt=weights.fmt
        ),
        down=_matrix(weights.down, weights.down_bias, (hidden, intermediate), fmt=weights.fmt),
        num_slots=weights.num_slots,
        activation=ACTIVATIONS.index(weights.activation),
        is_concatenated=weights.is_concatenated,
    )


def _matrix(
    parts: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int], *, fmt: str
) -> Matrix:
    weight = parts["weight"]
    matrix = Matrix(
        weight=weight.data_ptr(),
        weight_stride=weight.stride(0) * weight.element_size(),
        n=shape[0],
        k=shape[1],
        format=_FORMAT_IDS[fmt],
    )
    if fmt in _SCALE_PARTS:
        scale = parts[_SCALE_PARTS[fmt]]
        matrix.scale = scale.data_ptr()
        matrix.scale_stride = scale.stride(0) * scale.element_size()
    if bias is not None:
        matrix.bias = bias.data_ptr()
        matrix.bias_stride = bias.stride(0) * bias.element_size()
        matrix.bias_format = DTYPE_IDS[bias.dtype]
    return matrix
