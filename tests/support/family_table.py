"""The README's table of families, every cell from the tests that were run for it just now.

`python tests/support/family_table.py` runs them, prints the table and writes it between the markers
of the README where they are; it fails if a test does. A cell is a tick only if all of its tests
passed, and a dash if none was run.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "tests" / "runtime" / "models"
BEGIN, END = "<!-- families: made by tests/support/family_table.py -->", "<!-- end of families -->"

# column -> the tests that a tick stands for
COLUMNS = {
    "loads true layout": (
        "test_loads_true_layout",
        "test_all_weights_are_those_that_transformers_loads",
        "test_an_experts_extents_hold_its_rows_of_the_fused_weights",
    ),
    "equals transformers in fp32": (
        "test_tokens_equal_transformers_in_fp32",
        "test_logits_equal_transformers_in_fp32",
    ),
    "near transformers in bf16": ("test_logits_are_near_transformers_in_bf16",),
    "offloaded equals resident": (
        "test_logits_are_bit_identical_in_fp32",
        "test_logits_are_bit_identical_in_bf16",
    ),
}
ENCODED = (
    "test_decoded_weights_equal_transformers",
    "test_encoded_experts_are_packed_and_generate",
)
NAMES = {"fp8": "FP8 blocks", "mxfp4": "MXFP4"}


class Outcomes:
    """A pytest plugin: (test, family or case) -> outcomes, set-up included."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[bool]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        match = re.search(r"::(\w+)\[(.+)\]$", report.nodeid)
        if match and (report.when == "call" or report.failed):
            self.found[match[1], match[2]].append(report.passed)

    def cell(self, tests: tuple[str, ...], family: str) -> str:
        """A tick if every test has run on the family and none has failed."""
        cells = [
            [
                passed
                for (name, case), outcomes in self.found.items()
                if name == test and family in re.split(r"-(?=[a-z])", case)
                for passed in outcomes
            ]
            for test in tests
        ]
        if not all(cells):
            return "-"
        return "✓" if all(map(all, cells)) else "✗"


def lines(outcomes: Outcomes, families: list[str]) -> list[str]:
    """The table in Markdown."""
    heads = ["family", *COLUMNS, "encodings"]
    rows = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for family in families:
        cells = [outcomes.cell(tests, family) for tests in COLUMNS.values()]
        encodings = ["fp32, bf16"] if cells[0] == "✓" else []
        for short, name in NAMES.items():
            cases = [f"{family}-{short}"]
            passed = [outcomes.found.get((test, case), []) for test in ENCODED for case in cases]
            if all(passed) and all(map(all, passed)):
                encodings.append(name)
        rows.append(f"| {' | '.join([family, *cells, ', '.join(encodings)])} |")
    return rows


def main() -> int:
    from families import FAMILIES

    outcomes = Outcomes()
    files = ("test_families.py", "test_loading.py", "test_encoding.py")
    tests = [name for names in COLUMNS.values() for name in names] + list(ENCODED)
    code = pytest.main(
        ["-q", "--no-header", "-k", " or ".join(tests), *(str(MODELS / name) for name in files)],
        plugins=[outcomes],
    )
    table = "\n".join(lines(outcomes, list(FAMILIES)))
    sys.stdout.write(f"\n{table}\n")
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.is_file() else ""
    if BEGIN in text and END in text and not code:
        begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        readme.write_text(f"{text[:begin]}\n{table}\n{text[end:]}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
