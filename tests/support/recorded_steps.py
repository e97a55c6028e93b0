"""Decode steps as they were measured, (whole step, stall) in ms, with look-ahead and without.

Two threads of a 2-core Zen 4, other work on the machine, 2026-11-26, one process that decoded the
same text with look-ahead in every step and then in none. GEOMETRY_*: `nano` widened to 4.3 MB an
expert, half of them resident, the oracle for a predictor: two rounds of four, in which it
was 1.68 and 1.24 times as fast (1.56 and 0.97 in the others). NANO_*: a round of `nano` at 25 %,
its ensemble.
"""

import json
from pathlib import Path

_STEPS: dict[str, list[list[float]]] = json.loads(Path(__file__).with_suffix(".json").read_text())
GEOMETRY_OFF = [(whole, stall) for whole, stall in _STEPS["GEOMETRY_OFF"]]
GEOMETRY_ON = [(whole, stall) for whole, stall in _STEPS["GEOMETRY_ON"]]
NANO_OFF = [(whole, stall) for whole, stall in _STEPS["NANO_OFF"]]
NANO_ON = [(whole, stall) for whole, stall in _STEPS["NANO_ON"]]
