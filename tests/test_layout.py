"""The house: a file imports only from floors below, and keeps to the habits that a reader of files can check."""

import ast
import graphlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "oneb").rglob("*.py"))

# The first pattern that matches a path gives its floor and its place on it (docs/ARCHITECTURE.md).
PLACES = (
    (r"oneb/__init__", 0, "oneb"),
    (r"oneb/(units|errors|files|gpus|host_memory)", 0, "ground"),
    (r"oneb/(config|presets|schedules|accounting|changes|memory|roofline|fit|planner|advice|sketch)", 1, "plan"),
    (r"oneb/(data|kernels|model|optim)/", 2, None),  # None: the folder's name
    (r"oneb/distributed", 2, "distributed"),
    (r"oneb/train/(trainer|rehearse|run\.py)", 4, "trainer"),
    (r"oneb/bench/", 4, "bench"),
    (r"oneb/cli/|oneb/(\w+/)?__main__", 5, "cli"),
    (r"oneb/(checkpoints|show|train|inspect|use)/", 3, None),
)
# On one floor, a place uses only itself and these.
NEIGHBOURS = {
    "model": {"kernels", "distributed"}, "optim": {"kernels", "distributed"}, "data": {"distributed"},
    "show": {"checkpoints", "inspect"}, "train": {"checkpoints", "inspect", "show"}, "use": {"checkpoints", "train"},
    "bench": {"trainer"},
}
THIRD_PARTY_FROM_FLOOR = 2
MAX_LINES = 400


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def place(path: Path) -> tuple[int, str]:
    for pattern, floor, name in PLACES:
        if re.match(pattern, path.as_posix()):
            return floor, name or path.parts[1]
    raise AssertionError(f"{path} has no place in the house: give it one in PLACES and in docs/ARCHITECTURE.md")


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(path: Path, types_too: bool = False, in_functions_too: bool = True) -> set[str]:
    """Every module that a file imports; ``from oneb import x`` names ``oneb.x``."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if is_for_types_only(node) and not types_too:
            return
        if isinstance(node, ast.FunctionDef) and not in_functions_too:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno} is a relative import; this project writes them out"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found.update(inner)
            # `from oneb import planner` uses oneb.planner, not what oneb/__init__.py holds.
            if len(inner) < len(node.names):
                found.add(node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse((ROOT / path).read_text()))
    return found


def test_a_file_imports_only_from_floors_below():
    wrong = []
    for path in FILES:
        floor, home = place(path)
        for name in imports(path, types_too=True):
            if name.split(".")[0] != "oneb":
                continue
            if name not in MODULES:
                wrong.append(f"{path} imports {name}, which does not exist")
                continue
            other_floor, other = place(MODULES[name])
            beside = other_floor == floor and (other == home or other in NEIGHBOURS.get(home, ()))
            if other_floor >= floor and not beside:
                wrong.append(f"{path} (floor {floor}, {home}) imports {name} (floor {other_floor}, {other})")
    assert not wrong


def test_loading_a_module_never_comes_back_to_it():
    graph = {name: imports(path, in_functions_too=False) & set(MODULES) - {name} for name, path in MODULES.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_lower_floors_need_the_standard_library_only():
    known = {"oneb"} | set(sys.stdlib_module_names)
    for path in FILES:
        if place(path)[0] < THIRD_PARTY_FROM_FLOOR:
            assert {name.split(".")[0] for name in imports(path, types_too=True)} <= known, path


def test_files_are_short():
    lines = {str(path): len((ROOT / path).read_text().splitlines()) for path in FILES}
    assert not {path: count for path, count in lines.items() if count > MAX_LINES}


def test_the_environment_is_read_only_at_the_edges():
    reads = [
        f"{path}:{node.lineno}"
        for path in FILES if place(path)[1] not in ("cli", "distributed")
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv")
    ]
    assert not reads


# Hands the error to the thread that waits for the batch, which raises it.
CATCHES_ALL_AND_HANDS_ON = {"oneb/data/loader.py"}


def test_nothing_is_caught_and_forgotten():
    """A bare ``except``, or one of Exception, raises in turn, or its line says why it is a fallback (and reported)."""
    forgotten = []
    for path in FILES:
        source = (ROOT / path).read_text()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.ExceptHandler) or path.as_posix() in CATCHES_ALL_AND_HANDS_ON:
                continue
            caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"Exception"}
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            reported = "# fallback: " in source.splitlines()[node.lineno - 1]
            if caught & {"Exception", "BaseException"} and not raises and not reported:
                forgotten.append(f"{path}:{node.lineno}")
    assert not forgotten


# Each of these can run what a file, a checkpoint or an option says.
RUNS_TEXT = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads", "torch.jit.load",
             "subprocess.getoutput", "subprocess.getstatusoutput"}


def test_no_text_is_ever_run():
    """No shell and no unpickling: torch.load for tensors only, numpy without pickles, processes from lists of words."""
    runs = []
    for path in FILES:
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if (called in RUNS_TEXT or "shell" in given or given.get("allow_pickle", "False") != "False"
                    or called == "torch.load" and given.get("weights_only") != "True"):
                runs.append(f"{path}:{node.lineno}")
    assert not runs


def test_the_house_is_not_empty():
    """The tests above look at what there is; this is what there must be."""
    assert {place(path) for path in FILES} >= {
        (0, "ground"), (1, "plan"), (2, "data"), (2, "kernels"), (2, "model"), (2, "optim"),
        (3, "train"), (3, "inspect"), (3, "use"), (4, "trainer"), (5, "cli"),
    }
