"""The Triton kernels without a GPU: interpreted and compiled, each in a process of its own.

Whether it is on is decided when Triton is imported, so neither can share a process with the other.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from outrider.kernels.expert_mlp import expert_outputs
from outrider.kernels.linear import linear

pytest.importorskip("triton", reason="Triton has no package for this platform")

ROOT = Path(__file__).parents[2]


def _pytest(folder: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder],
        cwd=ROOT,
        env={**os.environ, "TRITON_DEFAULT_FP_FUSION": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.timeout(900)
def test_interpreted_kernels_equal_the_reference():
    summary = _pytest("tests/kernels/triton_ops", TRITON_INTERPRET="1")
    passed = re.search(r"(\d+) passed", summary)
    assert passed
    assert int(passed.group(1)) >= 100


def test_tensors_of_the_cpu_are_refused_where_nothing_interprets():
    rows, weight = torch.randn(1, 64), torch.randn(64, 64)
    with pytest.raises(ValueError, match="CUDA tensors"):
        linear(rows, {"weight": weight}, fmt="fp32", impl="triton")
    arena = {"gate_up_proj": torch.randn(1, 128, 64), "down_proj": torch.randn(1, 64, 64)}
    first = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="impl='cpu'"):
        expert_outputs(rows, (first, first), arena, fmt="fp32", impl="triton")


def test_an_unknown_implementation_is_named_with_the_accepted_ones():
    with pytest.raises(ValueError, match=r"'tritan'.*reference, cpu, triton"):
        linear(torch.randn(1, 64), {"weight": torch.randn(8, 64)}, fmt="fp32", impl="tritan")
