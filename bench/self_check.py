"""Whether this machine's devices compute and generate as they must, before any speed is believed.

Runs on the built-in model: kernels against plain PyTorch, then the engine's tokens against
transformers' own modules and against themselves under every budget and with prefetching. A CUDA
device, where there is one, is held to the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels import native
from ..kernels.expert_mlp import combine, expert_outputs
from ..kernels.quantization import quantize
from ..kernels.weights import ExpertWeights
from ..runtime.config import EngineConfig
from ..runtime.engine import Engine
from ..runtime.errors import OutriderError
from ..runtime.models.loading import resolve_folder
from ..runtime.request import SamplingParams
from .workload import built_in_texts

_HIDDEN, _INNER, _SLOTS, _TOP_K = 256, 128, 8, 4
# Rows of a decode step and of a prompt, which go by different kernels.
_ROWS = (5, 40)
_NUM_TOKENS = 16
_PROMPT_CHARACTERS = 60
# Relative error of a row against the reference in fp32, by the activations' dtype.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# Budgets, prefetch: what must not change a token.
_SETTINGS = (("all", "off"), ("25%", "off"), ("25%", "on"), ("2%", "on"), ("50%", "auto"))


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what was looked at, whether it holds, and what was found."""

    name: str
    is_ok: bool
    detail: str


def self_check() -> list[Check]:
    """All checks of this machine, in order. Blocks for about a minute; raises nothing of theirs."""
    checks = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        checks.extend(_of_device(device))
    if not torch.cuda.is_available():
        checks.append(Check("cuda", True, "PyTorch sees no CUDA device: nothing there to check"))
    return checks


def _of_device(device: str) -> Iterator[Check]:
    for fmt in ("bf16", "int8", "int4", "nf4"):
        for dtype in _TOLERANCE:
            yield _guarded(
                f"{device} kernels, {fmt} weights, {dtype}", _kernels, device, fmt, dtype
            )
    yield _guarded(f"{device} tokens, fp32, against transformers' modules", _against_plain, device)
    yield _guarded(f"{device} tokens, any budget and prefetching", _against_itself, device)


def _guarded(name: str, check, *arguments) -> Check:
    try:
        return check(name, *arguments)
    except (OutriderError, RuntimeError, ValueError) as error:
        return Check(name, False, f"{type(error).__name__}: {error}")


def _kernels(name: str, device: str, fmt: str, dtype: torch.dtype) -> Check:
    errors = [_error(device, fmt, dtype, num_rows=num_rows) for num_rows in _ROWS]
    which = native.isa() if device == "cpu" else torch.cuda.get_device_name()
    # Not `max`: no comparison with a NaN holds, so that it would be lost or kept by its place.
    is_ok = all(error < _TOLERANCE[dtype] for error in errors)
    shown = ", ".join(f"{error:.1e}" for error in errors)
    return Check(name, is_ok, f"relative error {shown} of {_ROWS[0]}, {_ROWS[1]} rows ({which})")


def _error(device: str, fmt: str, dtype: torch.dtype, *, num_rows: int) -> float:
    generator = torch.Generator().manual_seed(0)
    arena: dict[str, torch.Tensor] = {}
    sizes = {"gate_up_proj": (2 * _INNER, _HIDDEN), "down_proj": (_HIDDEN, _INNER)}
    for projection, shape in sizes.items():
        slots = [
            quantize(torch.randn(*shape, generator=generator) * 0.05, fmt) for _ in range(_SLOTS)
        ]
        for part in slots[0]:
            key = projection if part == "weight" else f"{projection}.{part}"
            arena[key] = torch.stack([one[part] for one in slots])
    states = torch.randn(num_rows, _HIDDEN, generator=generator).to(dtype)
    topk_ids = torch.stack(
        [torch.randperm(_SLOTS, generator=generator)[:_TOP_K] for _ in range(num_rows)]
    )
    topk_weights = torch.rand(num_rows, _TOP_K, generator=generator)
    token_idx = torch.arange(num_rows).repeat_interleave(_TOP_K)

    def output(impl: str, where: str) -> torch.Tensor:
        weights = ExpertWeights(
            {key: part.to(where) for key, part in arena.items()}, _HIDDEN, fmt=fmt
        )
        assignments = (token_idx.to(where), topk_ids.reshape(-1).to(where))
        rows = expert_outputs(states.to(where), assignments, weights, impl=impl)
        rows = rows.view(num_rows, _TOP_K, _HIDDEN)
        return combine(rows, topk_weights.to(where), topk_ids.to(where), impl=impl).cpu()

    truth = output("reference", "cpu").double()
    found = output("cpu" if device == "cpu" else "triton", device).double()
    return float((found - truth).norm() / truth.norm())


def _generated(device: str, *, dtype: str, budget: str, prefetch: str) -> list[list[int]]:
    config = EngineConfig(
        device=device,
        dtype=dtype,  # type: ignore[arg-type]
        expert_memory=budget,
        prefetch=prefetch,  # type: ignore[arg-type]
    )
    with Engine.from_config(config) as engine:
        params = SamplingParams(max_tokens=_NUM_TOKENS, temperature=0.0, ignore_eos=True)
        return [list(result.token_ids) for result in engine.generate(_prompts(), params)]


def _prompts() -> list[str]:
    return [text[:_PROMPT_CHARACTERS] for _, text in built_in_texts(2)]


def _against_plain(name: str, device: str) -> Check:
    """transformers' classes on their own loading, cache and experts, one prompt at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_folder(None)
    # Any: what `generate` wants of a model is more than checkers can follow.
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    expected = []
    for prompt in _prompts():
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            output = model.generate(
                ids, max_new_tokens=_NUM_TOKENS, min_new_tokens=_NUM_TOKENS, do_sample=False
            )
        expected.append(output[0, ids.shape[1] :].tolist())
    found = _generated(device, dtype="fp32", budget="25%", prefetch="on")
    return _compared(name, found, expected)


def _against_itself(name: str, device: str) -> Check:
    first, *others = (
        _generated(device, dtype="auto", budget=budget, prefetch=prefetch)
        for budget, prefetch in _SETTINGS
    )
    for found in others:
        check = _compared(name, found, first)
        if not check.is_ok:
            return check
    return Check(name, True, f"{len(_SETTINGS)} settings, the same {2 * _NUM_TOKENS} tokens")


def _compared(name: str, found: list[list[int]], expected: list[list[int]]) -> Check:
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours != theirs:
            places = range(min(len(ours), len(theirs)))
            place = next((i for i in places if ours[i] != theirs[i]), len(places) - 1)
            return Check(
                name, False, f"prompt {index}: token {place} is {ours[place]}, not {theirs[place]}"
            )
    return Check(name, True, f"the same {sum(map(len, found))} tokens")
