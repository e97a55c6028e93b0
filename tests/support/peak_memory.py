"""Runs an `outrider` command in this process and says by how much its memory grew at its peak.

`python peak_memory.py OUT.json COMMAND ...`. The growth is counted from the resident set after the
imports, file pages that are mapped included. Then runs it once more with a deliberate leak, a copy
kept of all that is read into slots: a check of memory has to find that.
"""

import importlib
import json
import sys
from pathlib import Path

IMPORTS = (
    "outrider.runtime.commands.generate",
    "outrider.runtime.engine",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.auto.tokenization_auto",
)


def status(name: str) -> int:
    """A size in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(name)


def grown_by(arguments: list[str], *, since: int) -> int:
    """Peak of the resident set while the command runs, above `since`. Raises if it fails."""
    from outrider.runtime.cli import app as outrider  # `main` would end the process

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    try:
        outrider(arguments)
    except SystemExit as end:
        if end.code:
            raise
    return status("VmHWM") - since


def leak() -> None:
    from outrider.runtime.experts.reader import FileReader

    kept, read = [], FileReader.read_run

    def leaking(self, plan, run, *, slot, **options):
        count = read(self, plan, run, slot=slot, **options)
        kept.append(bytes(slot))
        return count

    FileReader.read_run = leaking


def main() -> None:
    out, *arguments = sys.argv[1:]
    for name in IMPORTS:
        importlib.import_module(name)
    before = status("VmRSS")
    plain = grown_by(arguments, since=before)
    leak()
    leaking = grown_by(arguments, since=before)
    Path(out).write_text(json.dumps({"before": before, "plain": plain, "leaking": leaking}))


if __name__ == "__main__":
    main()
