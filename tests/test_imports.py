"""Imports go one way, heavy libraries load late, and nothing is unpickled."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import ebm_guard

ROOT = Path(ebm_guard.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# DESIGN section 2. A room may import from lower floors and from itself; `data` also from `model`.
FLOORS = {
    **dict.fromkeys(
        (
            "errors",
            "registry",
            "energy",
            "composition",
            "distributed",
            "inference",
            "intervals",
            "files",
            "progress",
            "precision",
        ),
        0,
    ),
    "model": 1,
    "data": 2,
    "predictions": 3,
    "calibration": 4,
    "ood": 4,
    "attacks": 4,
    "sampling": 4,
    "gate": 5,
    # Robustness is measured with the gate in the loop.
    "robustness": 6,
    "training": 6,
    "report": 7,
    "deploy": 8,
    "faces": 8,
    "cli": 9,
}
HEAVY = ("torch", "timm", "sklearn", "scipy", "matplotlib")
BASE = {name for name, floor in FLOORS.items() if floor == 0}
# The public page and `python -m` are above all rooms.
TOP = {"ebm_guard", "ebm_guard.__main__"}


def module_name(path):
    parts = ["ebm_guard", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def type_checking_nodes(tree):
    """Nodes below `if TYPE_CHECKING:`, which never run."""
    guarded = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.body:
                guarded.update(ast.walk(statement))
    return guarded


def imported(name, path, source=None):
    """All (module, line, at top level) that a file imports, also inside functions."""
    tree = ast.parse(source if source is not None else path.read_text())
    inside = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(node)
        if inner is not node
    }
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Import):
            found = [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for item in node.names:
                inner = f"{base}.{item.name}"
                found.append(inner if inner in MODULES else base)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found = [node.args[0].value]
        for target in found:
            yield target, node.lineno, node not in inside


def room(name):
    return name.split(".")[1] if "." in name else ""


def upward(name, path, source=None):
    problems = []
    for target, line, _ in imported(name, path, source):
        if target == "ebm_guard" or target.startswith("ebm_guard."):
            mine, theirs = room(name), room(target)
            if target in TOP:
                problems.append(f"{name}:{line} imports the public page {target}")
            elif theirs not in FLOORS:
                problems.append(f"{name}:{line} imports {target}, a room without a floor")
            elif FLOORS[theirs] > FLOORS[mine] or (
                FLOORS[theirs] == FLOORS[mine] and theirs != mine and mine not in BASE
            ):
                problems.append(f"{name}:{line} ({mine}) imports {target}, which is not below it")
    return problems


def test_every_room_has_a_floor():
    assert {room(name) for name in MODULES if name not in TOP} == set(FLOORS)


@pytest.mark.parametrize("name", sorted(set(MODULES) - TOP))
def test_imports_go_downwards(name):
    assert upward(name, MODULES[name]) == []


@pytest.mark.parametrize(
    "source",
    [
        "from ebm_guard.gate import Guard",
        "def f():\n    from ebm_guard.gate.guard import Guard",
        "import ebm_guard.report.build",
        "from ebm_guard import wrap",
        "from importlib import import_module\nimport_module('ebm_guard.cli')",
        "from .gate import guard",
        "from ebm_guard import gate",
        "from ebm_guard.ood import Score",
    ],
)
def test_the_walk_finds_an_upward_import(source):
    assert upward("ebm_guard.calibration.fake", ROOT / "calibration" / "fake.py", source) or (
        # A relative import is relative to its own folder.
        upward("ebm_guard.energy", ROOT / "energy.py", source)
    )


def test_no_two_modules_import_each_other():
    # Imports under TYPE_CHECKING count too: a cycle in types is a cycle in the design.
    edges = {
        name: {
            target
            for target, _, _ in imported(name, path)
            if target in MODULES and target != name and target not in TOP
        }
        for name, path in MODULES.items()
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        path.append(name)
        for target in sorted(edges[name]):
            visit(target)
        path.pop()
        done.add(name)

    for name in sorted(edges):
        visit(name)
    assert len(done) == len(MODULES)


def test_long_files_are_listed(capsys):
    long = {
        str(path.relative_to(ROOT)): count
        for path in FILES
        if (count := len(path.read_text().splitlines())) > 400
    }
    with capsys.disabled():
        for name, count in long.items():
            print(f"\n[over 400 lines] {name}: {count}", end="")


@pytest.mark.parametrize(
    ("library", "rooms"), [("timm", {"model", "data"}), ("matplotlib", {"report.figures"})]
)
def test_library_stays_in_its_room(library, rooms):
    for name, path in MODULES.items():
        homes = {".".join(name.split(".")[1:3]), room(name)}
        for target, line, _ in imported(name, path):
            if target.split(".")[0] == library:
                assert homes & rooms, f"{name}:{line} imports {target}"


def test_slow_libraries_are_imported_inside_functions():
    for name, path in MODULES.items():
        guarded = {
            node.lineno
            for node in type_checking_nodes(ast.parse(path.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
        }
        for target, line, top in imported(name, path):
            if target.split(".")[0] in ("sklearn", "scipy", "timm", "matplotlib"):
                free = name.startswith("ebm_guard.report.figures") and "matplotlib" in target
                assert not top or line in guarded or free, f"{name}:{line}: {target} at the top"


def test_no_pickle_no_assert():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{name}:{getattr(node, 'lineno', 0)}"
            assert not isinstance(node, ast.Assert), f"{where}: an assert vanishes under python -O"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                last = called.rpartition(".")[2]
                assert not (last in ("load", "loads") and "pickle" in called), where
                assert last != "Unpickler", where
                settings = {item.arg: ast.unparse(item.value) for item in node.keywords}
                assert settings.get("weights_only", "True") == "True", where
                assert settings.get("allow_pickle", "False") == "False", where
                if called == "torch.load":
                    assert settings.get("weights_only") == "True", where
                if called == "np.load":
                    assert settings.get("allow_pickle") == "False", where


def run(code, *, args=()):
    return subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_import_loads_nothing_heavy():
    done = run(f"import sys, ebm_guard; print([n for n in {HEAVY} if n in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_name_loads_no_timm_sklearn_scipy_or_matplotlib():
    code = f"""
    import sys, ebm_guard
    for name in ebm_guard.__all__:
        getattr(ebm_guard, name)
    print([n for n in {HEAVY[1:]} if n in sys.modules])
    """
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_help_of_every_command_loads_no_torch():
    code = f"""
    import sys
    from ebm_guard.cli import COMMANDS, run
    assert run(["--help"]) == 0
    for command in COMMANDS:
        assert run([command, "--help"]) == 0, command
    assert run(["list"]) == 0 and run(["list", "--json"]) == 0
    print([n for n in {HEAVY} if n in sys.modules], len(COMMANDS))
    """
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[] 13"


def test_a_saved_guard_runs_without_timm_and_torchvision(tmp_path):
    code = """
    import sys
    for name in ("timm", "torchvision", "sklearn", "matplotlib"):
        sys.modules[name] = None
    import torch, ebm_guard
    model = torch.nn.Linear(4, 3).eval()
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 3
    guard = ebm_guard.wrap(model).fit([(x, labels)])
    path = guard.save(sys.argv[1])
    again = ebm_guard.Guard.load(path, model)
    assert torch.equal(again(x).status, guard(x).status)
    print(int(again(x).accept.sum()))
    """
    done = run(code, args=[str(tmp_path / "guard.safetensors")])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 180


def test_the_command_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "ebm_guard", "list", "--family", "score", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"energy"' in done.stdout
