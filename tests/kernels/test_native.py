"""Which library is loaded: the one these sources make, or none."""

import logging
import shutil
import subprocess

import pytest
import torch

from outrider.kernels import decoder, native
from outrider.kernels.quantization import quantize

COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")


@needs_compiler
def test_a_compiler_makes_native_code_of_the_sources():
    assert native.is_available() and decoder.is_available()
    assert native.isa() in native.ISAS


@needs_compiler
def test_a_library_of_other_sources_is_told_and_not_called(tmp_path, monkeypatch, caplog):
    source, built = tmp_path / "other.c", tmp_path / "_native.so"
    source.write_text("int outrider_expert_outputs(void) { return 0; }\n")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", built, source], check=True)
    monkeypatch.setattr(native, "library_path", lambda: built)
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert native.library() is None
            assert native.isa() == "torch" and not decoder.is_available()
    finally:
        native.library.cache_clear()
    (record,) = caplog.records
    assert "install again" in record.getMessage() and "outrider_linear" in record.getMessage()


@pytest.mark.parametrize("num_threads", [2, 3, 7])
def test_threads_of_our_own_give_the_bits_of_one(num_threads: int) -> None:
    """Without libgomp: more threads than work, or than processors, included."""
    lib = native.loaded()
    parts = quantize(torch.randn(100, 192, generator=torch.Generator().manual_seed(3)), "int8")
    rows = torch.randn(5, 192, generator=torch.Generator().manual_seed(4))

    def product(threads: int) -> torch.Tensor:
        out = torch.full((5, 100), torch.nan)
        native.linear(rows, parts, (100, 192), fmt="int8", bias=None, out=out, num_threads=threads)
        return out

    expected = product(1)
    lib.outrider_use_fork(None)
    try:
        assert all(torch.equal(product(num_threads), expected) for _ in range(200))
    finally:
        native.borrow_threads(lib)
    assert torch.equal(product(num_threads), expected)
