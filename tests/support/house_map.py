"""The README's map of the house, from the first sentence of each module's docstring.

`python tests/support/house_map.py` writes it between the markers; a house test compares.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("collect", "predictors", "kernels", "runtime", "bench")
BEGIN, END = "<!-- map: made by tests/support/house_map.py -->", "<!-- end of map -->"


def lines() -> list[str]:
    """One line a module, grouped by folder; doors (`__init__`) are left out."""
    found: list[str] = []
    for package in PACKAGES:
        folders = sorted({path.parent for path in (ROOT / package).rglob("*.py")})
        for folder in folders:
            modules = [path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
            if not modules:
                continue
            found += ["", f"**{folder.relative_to(ROOT)}/**", ""]
            found += [f"- `{path.stem}`: {sentence(path)}" for path in modules]
    return found


def sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    return re.split(r"(?<=[.;])\s", text, maxsplit=1)[0].rstrip(".;")


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    readme.write_text(text[:begin] + "\n" + "\n".join(lines()) + "\n\n" + text[end:])


if __name__ == "__main__":
    sys.exit(main())
