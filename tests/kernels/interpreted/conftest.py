"""Tests of the Triton kernels in its interpreter, which has to be on before Triton is imported.

Collected only where TRITON_INTERPRET=1: tests/kernels/test_triton.py runs them so, in a process of
their own. Dtypes are fp16 and fp32: the interpreter is silently wrong in bf16. A program is Python
here, so shapes are small and blocks large; `shipped_blocks` asks for those of the table.
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def large_blocks(request, tmp_path, monkeypatch):
    if "shipped_blocks" in request.fixturenames:
        return
    from outrider.kernels import blocks
    from outrider.kernels.quantization import FORMATS

    table = {}
    for fmt in FORMATS:
        table[blocks.table_key("gathered", fmt, 0, "any")] = blocks.Blocks(64, 64)
        table[blocks.table_key("grouped", fmt, 0, "any")] = blocks.Blocks(64, 64, block_m=16)
    path = tmp_path / "blocks.json"
    blocks.save_table(path, table)
    monkeypatch.setattr(blocks, "TABLE", path)


@pytest.fixture
def shipped_blocks():
    """Run with the block table that the package ships."""
