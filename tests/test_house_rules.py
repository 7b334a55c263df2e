"""Rules that hold for every source file; each failure names the file and the line."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dlrm", "embedding", "pipeline", "service")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TEXTS = sorted(
    path
    for folder in (*PACKAGES, "docs", "examples", "benchmarks", "deploy", "tests", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.is_file()
    and path.suffix in {".py", ".md", ".yaml", ".yml", ".html", ".js", ".css", ".cu", ".sh", ""}
    and "__pycache__" not in path.parts
) + sorted(
    path
    for path in ROOT.iterdir()
    # In a worktree .git is a file that names a folder of the machine.
    if path.is_file() and path.suffix in {"", ".py", ".md", ".toml", ".yml", ".in"} and path.name != ".git"
)

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70


def where(path: Path, line: int = 0) -> str:
    return f"{path.relative_to(ROOT)}:{line}" if line else str(path.relative_to(ROOT))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    names = function.args
    return [argument.arg for argument in (*names.posonlyargs, *names.args, *names.kwonlyargs)]


def test_sources_are_found() -> None:
    assert {path.parts[len(ROOT.parts)] for path in SOURCES} == set(PACKAGES)
    assert ROOT / "README.md" in TEXTS


def test_nothing_is_a_link() -> None:
    """Some archives and copies turn links into small text files; a wheel built from those lacks what they meant."""
    folders = (*PACKAGES, "docs", "examples", "benchmarks", "deploy", "tests", ".ci")
    assert [where(path) for folder in folders for path in (ROOT / folder).rglob("*") if path.is_symlink()] == []


def test_files_stay_short_enough_to_read() -> None:
    lengths = {where(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, without its docstring: that one may take what its arguments need."""
    first = function.body[0]
    whole = (function.end_lineno or 0) - function.lineno + 1
    return whole - ((first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function) else 0)


def test_functions_fit_on_a_screen() -> None:
    too_long = [
        f"{where(path, function.lineno)} {function.name}: {code_lines(function)} lines"
        for path in SOURCES
        for function in functions(path)
        if code_lines(function) > MAX_FUNCTION_LINES
    ]
    assert too_long == []


def test_carriers_alone_import_mpi_and_nccl() -> None:
    """Import contracts see whole packages, and NCCL is a part of CuPy."""
    imports = re.compile(
        r"^\s*(from mpi4py|import mpi4py|from cupy\.cuda import .*\bnccl\b|.*\bcupy\.cuda\.nccl\b)", re.MULTILINE
    )
    found = {path.name for path in SOURCES if imports.search(path.read_text(encoding="utf-8"))}
    assert found == {"comm_mpi.py", "comm_nccl.py"}


def test_nothing_is_left_unfinished() -> None:
    # Spelled in halves so that this file does not find itself.
    marks = (r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b", "raise NotImplemented" + "Error", r"\bX" + r"XX\b")
    mark = re.compile("|".join(marks))
    found = [
        where(path, number)
        for path in TEXTS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if mark.search(line)
    ]
    assert found == []


def test_no_file_names_a_machine() -> None:
    # Folders of one machine, and addresses other than loopback and documentation's own.
    parts = ("/wo" + "rk/", "/ro" + "ot/", "/ho" + r"me/\w", "/tmp/" + r"\w+env", "/op" + "t/(?!app|crosslane)")
    machine = re.compile("|".join((*parts, r"\b(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2,3}\b")))
    found = [
        f"{where(path, number)} {line.strip()[:80]}"
        for path in TEXTS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if machine.search(line)
    ]
    assert found == []


def reference_of(compiled: Path) -> Path:
    return compiled.with_name(f"{compiled.stem.removesuffix('_numba')}.py")


def test_every_compiled_file_has_its_reference_beside_it() -> None:
    missing = []
    for compiled in (path for path in SOURCES if path.stem.endswith("_numba") and not reference_of(path).exists()):
        # Without one it may only be a part of other compiled files, whose references stand for it.
        module = ".".join(compiled.relative_to(ROOT).with_suffix("").parts)
        users = [path for path in SOURCES if f"from {module} import" in path.read_text(encoding="utf-8")]
        if not users or any(not path.stem.endswith("_numba") for path in users):
            missing.append(where(compiled))
    assert missing == []


def kernels_asked_for() -> list[tuple[Path, str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every ``device.kernel(__name__, "operation")``: its file, the operation, the function that asks."""
    return [
        (path, str(call.args[1].value), function)
        for path in SOURCES
        for function in functions(path)
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "kernel"
        and len(call.args) == 2
        and isinstance(call.args[1], ast.Constant)
    ]


def test_kernels_that_operations_ask_for_exist() -> None:
    asked = kernels_asked_for()
    assert len(asked) >= 5
    missing = []
    for path, operation, function in asked:
        compiled = [path.with_name(f"{path.stem}_{kind}.py") for kind in ("numba", "cuda")]
        names = {found.name for file in compiled if file.exists() for found in functions(file)}
        if operation not in names:
            missing.append(f"{where(path, function.lineno)} asks for {operation}, which no file beside it has")
    assert missing == []


def test_compiled_functions_have_the_signature_of_the_function_they_replace() -> None:
    differing = []
    for compiled in (path for path in SOURCES if path.stem.endswith("_numba")):
        reference = reference_of(compiled)
        if not reference.exists():
            continue
        module = ast.parse(reference.read_text(encoding="utf-8")).body
        replaced = {node.name: arguments(node) for node in module if isinstance(node, ast.FunctionDef)}
        differing += [
            f"{where(compiled, function.lineno)} {function.name}({', '.join(arguments(function))})"
            for function in functions(compiled)
            if (operation := replaced.get(function.name)) is not None
            and "device" not in operation  # that one is the operation which asks for the kernel
            and arguments(function) != operation
        ]
    assert differing == []


@pytest.mark.parametrize("package", PACKAGES)
def test_relative_imports_stay_out(package: str) -> None:
    relative = [
        where(path, node.lineno)
        for path in SOURCES
        if path.is_relative_to(ROOT / package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


HEAVY = {"numpy", "numba", "polars", "mpi4py", "cupy"}


@pytest.mark.parametrize("module", ["service.app", "service.cli", "pipeline.cli", "service.demo", "service.supervisor"])
def test_the_control_plane_loads_no_arrays(module: str) -> None:
    program = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_commands_in_the_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", text, re.MULTILINE))
    assert named
    assert named <= make_targets()


def test_links_between_documents_lead_somewhere() -> None:
    broken = [
        f"{where(document)} -> {target}"
        for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert broken == []
