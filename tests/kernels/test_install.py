"""Installing on a machine without a C compiler succeeds, and the kernels then run on PyTorch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import torch
from outrider.kernels import native
from outrider.kernels.expert_mlp import expert_mlp
from outrider.kernels.linear import linear
from outrider.kernels.quantization import quantize

print(native.__file__)
assert native.library_path() is None
assert native.isa() == "torch"
generator = torch.Generator().manual_seed(0)
arena = {}
for name, shape in (("gate_up_proj", (128, 64)), ("down_proj", (64, 64))):
    parts = quantize(torch.randn(4, *shape, generator=generator), "int8")
    arena |= {name: parts["weight"], f"{name}.scale": parts["scale"]}
rows = torch.randn(3, 64, generator=generator).bfloat16()
slots = torch.tensor([[0, 1], [3, 2], [1, 3]])
weights = torch.rand(3, 2, generator=generator)
both = [
    expert_mlp(rows, slots, weights, arena, fmt="int8", impl=impl) for impl in ("cpu", "reference")
]
assert torch.equal(*both) or torch.allclose(*both, rtol=1e-2, atol=1e-2)
one = {"weight": arena["down_proj"][0], "scale": arena["down_proj.scale"][0]}
assert linear(rows, one, fmt="int8").shape == (3, 64)
"""


@pytest.mark.slow
def test_without_a_compiler_it_installs_and_falls_back_to_pytorch(tmp_path):
    source, target = tmp_path / "source", tmp_path / "installed"
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a checkout, so the sources are not known by name")
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    environment = {**os.environ, "CC": "/bin/false"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation",
            "--no-index", "--target", str(target), str(source),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert list(target.rglob("_native*")) == []
    assert (target / "outrider/kernels/csrc/outrider.h").is_file()
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**environment, "PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.startswith(str(target))
