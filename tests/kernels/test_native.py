"""Which library is loaded: the one these sources make, or none."""

import logging
import shutil
import subprocess

import pytest

from outrider.kernels import decoder, native

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
