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
    ("errors", "_io"),
    ("config", "quantization"),
    ("decomposition", "ops", "report"),
    ("modules",),
    ("files", "fitting"),
    ("planning",),
    ("cli",),
)
HEIGHT = {room: height for height, floor in enumerate(FLOORS) for room in floor}

MOST_LINES = 16_489  # of the package
MOST_LINES_OF_A_FILE = 350
MOST_LINES_OF_A_FUNCTION = 60  # with its docstring

# what may be imported where, always inside a function: these cost seconds, or are not always there
LAZY = {
    "bitsandbytes": {"quantization/_decode_bnb.py"},
    "tensorly": {"decomposition/_factors.py"},
    "sklearn": {"cli/_demo.py"},
    "matplotlib": {"report/_plots.py"},
    "jinja2": {"report/_html.py"},
    "pydantic": {"_io.py", "config/_recipe.py"},
}


def room_of(path: Path) -> str:
    """The first folder of a file inside the package, or its own name at the top."""
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


def files_imported(path: Path) -> set[Path]:
    """The files of the package that a file imports; a room's public names count as its `__init__`."""
    found = set()
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] == "compress_bilinear" and len(parts) > 1:
            at = PACKAGE.joinpath(*parts[1:])
            found |= {file for file in (at.with_suffix(".py"), at / "__init__.py") if file.exists()}
    return found - {path}


def rooms_imported(path: Path) -> set[str]:
    return {room_of(file) for file in files_imported(path)}


def test_the_top_level_holds_ten_rooms_and_two_files():
    entries = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("__")} - {"py.typed"}
    assert entries == {room for room in HEIGHT if (PACKAGE / room).is_dir()} | {"errors.py", "_io.py"}
    assert len(entries) <= 12
    assert len(FLOORS) <= 7


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward_only(path):
    room = room_of(path)
    if not room.startswith("__"):
        upward = {other for other in rooms_imported(path) - {room, "errors"} if HEIGHT.get(other, 99) >= HEIGHT[room]}
        assert not upward


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_other_rooms_are_used_by_their_public_names(path):
    room = room_of(path)
    private = {
        str(file.relative_to(PACKAGE))
        for file in files_imported(path)
        if room_of(file) not in (room, "errors", "_io") and file.name.startswith("_") and file.name != "__init__.py"
    }
    assert not private


def test_no_files_import_each_other_in_a_circle():
    graph = {path: files_imported(path) for path in FILES}
    done, open_ = set(), []

    def visit(path):
        assert path not in open_, " -> ".join(str(p.relative_to(PACKAGE)) for p in [*open_[open_.index(path) :], path])
        if path in done:
            return
        open_.append(path)
        for other in sorted(graph[path]):
            # a folder's `__init__` only re-exports: inside the folder, files import each other
            visit(other)
        done.add(open_.pop())

    for path in FILES:
        visit(path)


def test_the_import_reader_sees_every_form():
    # a reader that finds nothing would make the floors hold vacuously
    assert rooms_imported(PACKAGE / "planning" / "_api.py") >= {"config", "modules", "fitting", "report"}
    assert rooms_imported(PACKAGE / "ops" / "_stored.py") - {"ops"} == {"quantization"}
    assert rooms_imported(PACKAGE / "ops" / "_api.py") - {"ops"} == {"errors"}
    assert {("sklearn.datasets", True), ("torch", False)} <= set(imports(PACKAGE / "cli" / "_demo.py"))


def test_the_report_knows_nothing_but_errors_and_files():
    found = set().union(*(rooms_imported(path) for path in (PACKAGE / "report").glob("*.py")))
    assert found - {"report"} == {"errors", "_io"}


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


def test_triton_stays_in_its_folder_and_is_loaded_lazily():
    folder = PACKAGE / "ops" / "triton"
    kernels = {
        path for path in folder.glob("_*.py") if any(name.split(".")[0] == "triton" for name, _ in imports(path))
    }
    assert kernels
    for path in set(FILES) - kernels:
        assert not any(name.split(".")[0] == "triton" for name, _ in imports(path)), path
        eager = {name for name, lazily in imports(path) if not lazily}
        assert not eager & {f"compress_bilinear.ops.triton.{kernel.stem}" for kernel in kernels}, path


def test_importing_the_package_is_light():
    script = (
        "import sys, compress_bilinear\n"
        "print('torch' in sys.modules)\n"
        "from compress_bilinear import *\n"
        "import torch\n"
        "costly = 'bitsandbytes', 'triton', 'tensorly', 'sklearn', 'matplotlib', 'pydantic'\n"
        "print([name for name in costly if name in sys.modules])\n"
        "print(torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["False", "[]", "False"]


def test_names_that_are_not_there_are_no_attributes():
    assert not hasattr(cb, "compresss")
    assert not hasattr(cb, "_nothing")
    assert set(cb.__all__) <= set(dir(cb))
    assert cb.planning.__name__ == "compress_bilinear.planning"


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


@pytest.mark.parametrize("room", [room for room in HEIGHT if (PACKAGE / room).is_dir()])
def test_what_a_room_offers_is_documented(room):
    offered = {name: value for name, value in vars(getattr(cb, room)).items() if not name.startswith("_")}
    own = {
        name: value
        for name, value in offered.items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("compress_bilinear.")
    }
    assert own
    assert not [name for name, value in own.items() if not inspect.getdoc(value)]


MAKERS = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "randperm", "zeros"}


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "_demo.py"], ids=str)
def test_tensors_are_made_on_a_device_that_is_named(path):  # a program may have set another as its default
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("torch.") in MAKERS:
            named = {keyword.arg for keyword in node.keywords}
            assert named & {"device", None}, f"{path}:{node.lineno}"


def test_the_package_stays_small():
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES) <= MOST_LINES


def test_files_stay_short():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {path: length for path, length in lengths.items() if length > MOST_LINES_OF_A_FILE}


def test_functions_stay_short():
    lengths = {
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES_OF_A_FUNCTION}
