"""llama.cpp as an arm: run by a Python that has llama-cpp-python, which outrider's need not have.

Imports the standard library, numpy and llama_cpp only, and nothing of outrider. Speaks the lines of
`worker`: one JSON object a call on stdin, one a reply on stdout.
"""

import ctypes
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

SCRIPT_FOLDER = Path(__file__).parent


def _advise_away(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _status(name: str, source: str) -> int:
    lines = Path("/proc/self", source).read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


class LlamaArm:
    """One GGUF file, through mmap as llama.cpp has it by default."""

    def __init__(self, options: dict) -> None:
        self._options = options
        self._model: Any = None

    def load(self) -> dict:
        """Open the model: when it was loaded, and from what."""
        import llama_cpp  # pyright: ignore[reportMissingImports]

        began = time.perf_counter()
        self._model = llama_cpp.Llama(
            self._options["file"],
            n_ctx=self._options["context"],
            n_batch=64,
            n_threads=self._options["threads"],
            n_threads_batch=self._options["threads"],
            use_mmap=True,
            logits_all=False,
            verbose=False,
        )
        metadata = self._model.metadata
        return {
            "version": llama_cpp.__version__,
            "architecture": metadata.get("general.architecture", ""),
            "load_s": time.perf_counter() - began,
            "files": [self._options["file"]],
        }

    def record(self, passages: list) -> dict:
        """The tokens chosen, which is a run whose time nobody looks at."""
        chosen = [self._decode(passage)[0] for passage in passages]
        return {"token_ids": chosen, "logits_checksum": "", "passes": []}

    def prepare(self, is_cold: bool) -> float:
        """Cold: the file's pages are given back and the model is opened anew."""
        if is_cold:
            self._model.close()
            _advise_away(self._options["file"])
            self.load()
        return 0.0

    def run(self, passages: list) -> dict:
        """Decode every passage once, one after the other, and time it."""
        read_bytes = _status("read_bytes", "io")
        runs = [self._decode(passage) for passage in passages]
        return {
            "token_ids": [ids for ids, _, _ in runs],
            "decode_tokens": sum(len(ids) - 1 for ids, _, _ in runs),
            "decode_s": sum(seconds for _, seconds, _ in runs),
            "ttft_s": statistics.median(first for _, _, first in runs),
            "stall_s": 0.0,
            "traffic": {},
            "rss_peak_bytes": _status("VmHWM", "status") * 1024,
            "read_bytes": _status("read_bytes", "io") - read_bytes,
        }

    def _decode(self, passage: dict) -> tuple:
        model = self._model
        began = time.perf_counter()
        model.reset()
        model.eval(passage["prompt_ids"])
        chosen = [self._largest()]
        first_s = time.perf_counter() - began
        began = time.perf_counter()
        while len(chosen) < passage["num_tokens"]:
            place = len(chosen) - 1
            text = passage["text_ids"]
            model.eval([text[place] if text else chosen[place]])
            chosen.append(self._largest())
        return chosen, time.perf_counter() - began, first_s

    def _largest(self) -> int:
        import llama_cpp  # pyright: ignore[reportMissingImports]
        import numpy as np

        logits = llama_cpp.llama_get_logits_ith(self._model.ctx, -1)
        count = self._model.n_vocab()
        pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(pointer, shape=(count,)).argmax())


def main() -> None:
    """Serve calls until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    arm = LlamaArm(json.loads(sys.argv[1]))
    for line in sys.stdin.buffer:
        call = json.loads(line)
        try:
            reply = {"result": getattr(arm, call["method"])(*call["arguments"])}
        except Exception as error:  # whatever llama.cpp raises is for the parent to tell
            reply = {"error": "OutriderError", "message": f"llama.cpp: {error}"}
        answers.write(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
