"""The Triton kernels as machine code: nothing spilled, shared memory within bounds, wide loads."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no package for this platform")

from outrider.kernels import aot
from outrider.kernels.compiled import Figures, read_table

# Compiled anew here: one architecture, what decode runs in every format, and a grouped kernel.
PROGRAM = """
import json, sys
from outrider.kernels import aot
chosen = aot.variants(architectures=[86], kernels=["gate_up", "rows"])
chosen.append(aot.Variant("grouped_gate_up", "nf4", "bf16", 86))
json.dump(aot.compile_table(chosen), sys.stdout)
"""


def _check(variant: aot.Variant, figures: Figures) -> None:
    assert figures.spill_bytes == 0, variant.name
    assert figures.shared_bytes <= aot.SHARED_LIMITS[variant.arch], variant.name
    assert figures.registers <= 255, variant.name
    if variant.kernel == "attend":
        assert figures.wide_loads >= 8, "keys and values are streamed"
    if variant.kernel in aot.DECODE_KERNELS:
        assert variant.weight_loads >= 1, variant.name
        assert figures.wide_loads >= variant.weight_loads, variant.name


@pytest.mark.timeout(900)
def test_kernels_compile_for_an_rtx_3090_without_spills_and_as_the_table_says(tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    } | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    document = json.loads(result.stdout)
    compiled = {name: Figures(**row) for name, row in document["variants"].items()}
    assert len(compiled) == 19
    by_name = {variant.name: variant for variant in aot.variants(architectures=[86])}
    for name, figures in compiled.items():
        _check(by_name[name], figures)
    version, table = read_table()
    if document["triton"] == version:
        assert compiled == {name: table[name] for name in compiled}, "run make aot"


def test_the_committed_table_holds_every_variant_within_its_bounds():
    _, table = read_table()
    chosen = aot.variants()
    assert sorted(table) == sorted(variant.name for variant in chosen)
    for variant in chosen:
        _check(variant, table[variant.name])


def test_the_longest_loop_is_counted_and_the_padding_behind_a_kernel_is_not():
    listing = """
.L_x_0:
        /*0010*/  IADD3 R1, R1, 1 ;
.L_x_1:
        /*0020*/  LDG.E R2 ;
        /*0030*/  FFMA R3 ;
        /*0040*/  @P0 BRA `(.L_x_1) ;
        /*0050*/  EXIT ;
.L_x_2:
        /*0060*/  BRA `(.L_x_2);
"""
    assert aot._longest_loop(listing) == 3


def test_a_table_with_a_spill_would_fail():
    variant = aot.variants(architectures=[86])[0]
    figures = read_table()[1][variant.name]
    spilled = Figures(
        registers=255,
        spill_bytes=8,
        shared_bytes=figures.shared_bytes,
        num_warps=4,
        loop_instructions=figures.loop_instructions,
        wide_loads=figures.wide_loads,
    )
    with pytest.raises(AssertionError, match=variant.name):
        _check(variant, spilled)
