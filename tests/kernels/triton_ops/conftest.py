"""Tests of the Triton kernels: on a CUDA device, else in Triton's interpreter.

The interpreter has to be on before Triton is imported: tests/kernels/test_triton.py runs these so,
in a process of its own with TRITON_INTERPRET=1. There a program is Python, so shapes are small and
blocks large (`shipped_blocks` asks for those of the table), and bf16 is left out, in which the
interpreter is silently wrong. On a card the blocks are always those that are shipped.
"""

import pytest
import torch
from triton_device import IS_INTERPRETED

if not IS_INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_itemcollected(item):
    if not IS_INTERPRETED:
        item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def large_blocks(request, tmp_path, monkeypatch):
    if "shipped_blocks" in request.fixturenames or not IS_INTERPRETED:
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
