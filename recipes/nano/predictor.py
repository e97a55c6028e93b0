"""The predictor shipped with outrider-nano: traces, training, the table it is judged by.

Each step is one command that a user has too; a step whose folder is there is not done again, and an
interrupted one goes on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import corpus

TRACES = 8000
EPOCHS = 2
SEED = 1
WINDOWS = 120
TABLE = (
    "random", "frequent", "cluster", "pattern", "statistics", "lookahead", "lookahead-corrected",
    "pre-attention",
)  # fmt: skip
SHIPPED_FILES = ("config.json", "model.safetensors")


def make(corpora: Path, build: Path, out: Path) -> None:
    """Collect, train, evaluate; then replace the shipped files. Blocks for an hour or more.

    CalledProcessError where a command fails; what it had done is kept.
    """
    os.environ["OUTRIDER_CORPORA"] = str(corpus.fetch(corpora))
    traces, ensemble = build / "traces", build / "ensemble"
    # One thread: products on the CPU change bits with their number, and so would the routing.
    _run(
        "collect", "--datasets", "offline", "--traces", str(TRACES), "--seed", str(SEED),
        "--hidden-states", "all", "--num-threads", "1", "--out", str(traces), *_resume(traces),
    )  # fmt: skip
    _run(
        "train", str(traces), "--predictor", "ensemble", "--epochs", str(EPOCHS),
        "--out", str(ensemble), *_resume(ensemble),
    )  # fmt: skip
    _run(
        "evaluate", str(traces), "--predictor", ",".join((*TABLE, str(ensemble))),
        "--windows", str(WINDOWS), "--out", str(build / "evaluation"),
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED_FILES:
        shutil.copyfile(ensemble / name, out / name)


def _resume(folder: Path) -> list[str]:
    return ["--resume"] if folder.exists() else []


def _run(*arguments: str) -> None:
    outrider = Path(sys.executable).with_name("outrider")
    subprocess.run([str(outrider), *arguments], check=True)
