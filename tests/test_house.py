"""The rules of the house, checked on the source: sizes, names, doors, banned calls, the map."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import house_map
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("collect", "predictors", "kernels", "runtime", "bench")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
OURS = sorted({*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")})
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAX_LINES = 400


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def trees(paths):
    return [(name_of(path), tree_of(path)) for path in paths]


def calls(paths):
    """(file:line, dotted name, call) of every call."""
    return [
        (f"{name}:{node.lineno}", ast.unparse(node.func), node)
        for name, tree in trees(paths)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def imports(paths):
    """(file:line, module) of every import that is not relative."""
    for name, tree in trees(paths):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from ((f"{name}:{node.lineno}", alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield f"{name}:{node.lineno}", node.module or ""


def test_there_is_something_to_check():
    assert len(MODULES) > 50


def test_no_module_is_longer_than_400_lines():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_every_module_says_what_it_is():
    silent = [
        name
        for name, tree in trees(MODULES)
        if not ast.get_docstring(tree) and ast.unparse(tree).strip()
    ]
    assert silent == []


def test_no_module_has_a_name_that_says_nothing():
    empty = {"utils", "util", "common", "helpers", "helper", "manager", "misc", "base_utils"}
    assert [name_of(path) for path in MODULES if path.stem in empty] == []


def test_nothing_is_left_to_be_done():
    # A word of the source, not of this test's own list.
    words = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX|HA" r"CK)\b|\bNotImplemented" r"Error\b")
    found = [
        f"{name_of(path)}:{number}"
        for path in MODULES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if words.search(line)
    ]
    assert found == []


def test_the_packages_of_the_wheel_are_the_folders_that_are_packages():
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    folders = {
        "outrider." + ".".join(path.parent.relative_to(ROOT).parts)
        for path in MODULES
        if path.name == "__init__.py"
    }
    assert listed == folders
    roots = PYPROJECT["tool"]["setuptools"]["package-dir"]
    assert roots == {f"outrider.{name}": name for name in PACKAGES}


def test_every_folder_of_modules_is_a_typed_package():
    folders = {path.parent for path in MODULES}
    assert [name_of(one) for one in folders if not (one / "__init__.py").is_file()] == []
    assert [name_of(one) for one in folders if not (one / "py.typed").is_file()] == []


def test_there_is_no_package_of_the_namespaces_own():
    assert not (ROOT / "__init__.py").exists()


def test_nothing_is_imported_by_its_bare_name():
    # It would load a second copy of each class, and `kernels` hides another package.
    bare = [
        f"{where} {module}"
        for where, module in imports(OURS)
        if module.partition(".")[0] in PACKAGES
    ]
    assert bare == []


def test_packages_import_each_other_relatively():
    absolute = [
        f"{where} {module}"
        for where, module in imports(MODULES)
        if module.partition(".")[0] == "outrider"
    ]
    assert absolute == []


def test_packages_print_by_the_command_layer_only():
    assert [where for where, name, _ in calls(MODULES) if name == "print"] == []


CODE_CARRYING = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def test_no_module_that_carries_code_is_imported():
    found = [
        f"{where} {module}"
        for where, module in imports(MODULES)
        if module.partition(".")[0] in CODE_CARRYING
    ]
    assert found == []


BANNED = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen"}


def test_no_call_that_runs_what_it_is_given():
    found = []
    for where, name, call in calls([*MODULES, *(ROOT / "recipes").rglob("*.py")]):
        last = name.rpartition(".")[2]
        if name in BANNED or last in ("recv_pyobj", "send_pyobj"):
            found.append(f"{where} {name}")
        for keyword in call.keywords:
            is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and is_true:
                found.append(f"{where} {keyword.arg}=True")
    assert found == []


def test_what_runs_a_models_code_is_always_told_not_to():
    # The default is not to; said each time, no default can change that.
    found = [
        where
        for where, name, call in calls(MODULES)
        if re.search(r"\bAuto(Config|Model\w*|Tokenizer)\.from_(pretrained|config)$", name)
        and not any(keyword.arg == "trust_remote_code" for keyword in call.keywords)
    ]
    assert found == []


def test_no_error_is_passed_over_without_a_word():
    found = []
    for path in MODULES:
        lines = path.read_text().splitlines()
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            is_silent = all(isinstance(one, ast.Pass) for one in node.body)
            said = "#" in "".join(lines[node.lineno - 1 : node.body[-1].end_lineno])
            if node.type is None or (is_silent and not said):
                found.append(f"{name_of(path)}:{node.lineno}")
    assert found == []


DOORS = [path for path in MODULES if path.name == "__init__.py" and "__all__" in path.read_text()]


@pytest.mark.parametrize("path", DOORS, ids=lambda path: name_of(path.parent))
def test_a_door_offers_what_it_names(path):
    module = importlib.import_module("outrider." + ".".join(path.parent.relative_to(ROOT).parts))
    assert list(module.__all__) == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError):
        _ = module.no_such_name


@pytest.mark.parametrize(
    ("depth", "heavy"),
    [
        pytest.param(1, {"torch", "transformers", "pyarrow", "scipy", "numpy"}, id="packages"),
        pytest.param(9, {"torch", "transformers"}, id="and-those-within"),
    ],
)
def test_doors_cost_nothing_to_pass(depth, heavy):
    folders = {path.parent.relative_to(ROOT) for path in MODULES}
    doors = sorted(
        "outrider." + ".".join(folder.parts) for folder in folders if len(folder.parts) <= depth
    )
    code = (
        f"import sys\nfor name in {doors!r}:\n    __import__(name)\n"
        f"print(sorted({heavy!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_map_in_the_readme_is_the_house():
    readme = (ROOT / "README.md").read_text()
    begin, end = readme.index(house_map.BEGIN), readme.index(house_map.END)
    written = readme[begin + len(house_map.BEGIN) : end].strip().splitlines()
    assert written == "\n".join(house_map.lines()).strip().splitlines(), (
        "run python tests/support/house_map.py"
    )


def test_the_map_names_every_module():
    text = "\n".join(house_map.lines())
    stems = {path.stem for path in MODULES if path.stem != "__init__"}
    assert [stem for stem in sorted(stems) if f"`{stem}`: " not in text] == []


def test_no_file_names_this_machine():
    # What is committed runs elsewhere: no absolute path of a workplace, no other's registry.
    places = re.compile(r"/wo" r"rk/|/ho" r"me/[a-z]|/ro" r"ot/|pypi\.[a-z]+\.(?!org)")
    found = [
        f"{name_of(path)}:{number}"
        for path in [*OURS, ROOT / "pyproject.toml", ROOT / "Makefile", ROOT / "README.md"]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if places.search(line)
    ]
    assert found == []
