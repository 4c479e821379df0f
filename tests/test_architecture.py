"""The shape of the package: who may import whom, what is loaded lazily, and how long a file gets."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import compress_bilinear as cb

PACKAGE = Path(cb.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# each floor imports only from the floors above it in this table; neighbours on one floor do not import each other
FLOORS = (
    ("errors",),
    ("config", "files", "progress", "quantization"),
    ("config_text", "decomposition", "ops"),
    ("modules",),
    ("adapters",),
    ("calibration", "discovery", "report", "tensor_file"),
    ("measure", "state_file"),
    ("computing", "fitting", "refinement", "rows_file"),
    ("weight_fitting", "allocation"),
    ("automatic", "baselines"),
    ("solving",),
    ("selection",),
    ("planning",),
    ("surgery", "conversion", "checkpoint"),
    ("state_dicts", "demo"),
    ("cli",),
    ("__main__",),
)
HEIGHT = {unit: height for height, floor in enumerate(FLOORS) for unit in floor}

# what may be imported where, always inside a function: these cost seconds, or are not always there
LAZY = {
    "bitsandbytes": {"quantization/_bitsandbytes.py"},
    "tensorly": {"decomposition/_types.py"},
    "sklearn": {"demo.py"},
    "matplotlib": {"report/_plots.py"},
    "jinja2": {"report/_page.py"},
}


def unit_of(path: Path) -> str:
    """The floor's name of a file: its module, or its subpackage."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Each module that a file imports, in full, and whether it does so inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    package = ["compress_bilinear", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            yield ".".join(base), node in inside
            yield from ((".".join([*base, alias.name]), node in inside) for alias in node.names)


def units_imported(path: Path) -> set[str]:
    names = (name.split(".") for name, _ in imports(path))
    return {parts[1] for parts in names if parts[0] == "compress_bilinear" and len(parts) > 1 and parts[1] in HEIGHT}


def test_every_file_has_a_floor():
    assert {unit_of(path) for path in FILES} - {"__init__"} == set(HEIGHT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward_only(path):
    unit = unit_of(path)
    if unit != "__init__":
        upward = {other for other in units_imported(path) - {unit} if HEIGHT[other] >= HEIGHT[unit]}
        assert not upward


def test_the_import_reader_sees_every_form():
    # a reader that finds nothing would make the floors hold vacuously
    assert units_imported(PACKAGE / "surgery.py") >= {"discovery", "calibration", "modules", "selection"}
    assert units_imported(PACKAGE / "ops" / "_dense.py") - {"ops"} == {"errors", "quantization"}
    assert {("sklearn.datasets", True), ("torch", False)} <= set(imports(PACKAGE / "demo.py"))


def test_the_report_knows_nothing_but_errors_and_files():
    found = set().union(*(units_imported(path) for path in (PACKAGE / "report").glob("*.py")))
    assert found - {"report"} == {"errors", "files"}


@pytest.mark.parametrize("library", LAZY)
def test_costly_libraries_are_imported_in_one_place_and_lazily(library):
    found = [
        (str(path.relative_to(PACKAGE)), lazily)
        for path in FILES
        for name, lazily in imports(path)
        if name.split(".")[0] == library
    ]
    assert {path for path, _ in found} == LAZY[library]
    assert all(lazily for _, lazily in found)


def test_triton_stays_in_its_files_which_dispatch_alone_loads_lazily():
    kernels = {path for path in FILES if path.parent.name == "ops" and path.name.startswith("_triton_")}
    assert kernels
    for path in set(FILES) - kernels:
        found = [(name, lazily) for name, lazily in imports(path) if "triton" in name.replace("._triton", ".triton")]
        found = [part for part in found if part[0].startswith("triton") or "._triton_" in part[0]]
        dispatch = path.name in ("_dispatch.py", "_dispatch_pairs.py")
        assert not found or (dispatch and all(lazily for _, lazily in found)), path


def test_importing_the_package_is_light():
    script = (
        "import sys, compress_bilinear\n"
        "print('torch' in sys.modules)\n"
        "from compress_bilinear import *\n"
        "import torch\n"
        "costly = 'bitsandbytes', 'triton', 'tensorly', 'sklearn', 'matplotlib'\n"
        "print([name for name in costly if name in sys.modules])\n"
        "print(torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["False", "[]", "False"]


def test_names_that_are_not_there_are_no_attributes():
    assert not hasattr(cb, "compresss")
    assert not hasattr(cb, "_nothing")
    assert set(cb.__all__) <= set(dir(cb))
    assert cb.state_dicts.__name__ == "compress_bilinear.state_dicts"


@pytest.mark.parametrize("name", cb.__all__)
def test_public_names_exist_and_are_documented(name):
    value = getattr(cb, name)
    text = inspect.getdoc(value) or ""
    assert text
    assert not text.startswith(f"{name}(")  # which is what a dataclass without a docstring has


def test_public_methods_are_documented():
    own = [
        (owner, name, member)
        for owner in (getattr(cb, name) for name in cb.__all__)
        if inspect.isclass(owner) and owner.__module__.startswith("compress_bilinear")
        for name, member in vars(owner).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, classmethod))
    ]
    assert len(own) > 10
    for owner, name, _ in own:
        assert inspect.getdoc(getattr(owner, name)), f"{owner.__name__}.{name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
