"""The code and its pages, held to their own rules: layers, purity, sizes, names, documentation.

Nothing here runs the product; modules are read as syntax trees. A rule's exceptions stand beside
it, each with its reason.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kv_commands
import kv_config

ROOT = Path(__file__).resolve().parent.parent

# An import points to a lower layer. docs/adr/0001 says why the folder is flat all the same.
LAYERS = {
    1: ("kv_errors", "kv_types", "raft_types"),
    2: (
        "kv_protocol",
        "kv_commands",
        "kv_config",
        "kv_security",
        "kv_metrics",
        "raft_frames",
        "raft_log",
        "replication_log_format",
    ),
    3: (
        "kv_store",
        "kv_client_sessions",
        "kv_client",
        "raft_audit",
        "raft_core",
        "raft_members",
        "raft_progress",
        "raft_transport",
        "replication_log",
        "state_db",
    ),
    4: ("cluster_nodes", "raft_node", "raft_snapshots", "raft_status", "raft_watch"),
    5: ("kv_members", "kv_session", "kv_store_server", "cluster_manager", "example_client"),
    6: ("test_replication",),
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}

SAME_LAYER_ALLOWED = {
    ("kv_types", "kv_errors"),  # an error is a reply
    ("state_db", "kv_store"),  # what is on disk is believed only as a store with the right hash
    ("raft_node", "raft_snapshots"),  # the driver's parts, carved out of it for its size
    ("raft_node", "raft_status"),
    ("raft_node", "raft_watch"),
    ("raft_snapshots", "raft_status"),
    ("kv_store_server", "kv_members"),
    ("kv_session", "kv_members"),  # commands about the cluster, likewise
    ("kv_store", "kv_client_sessions"),  # a part of the state is carved out for its size
    ("raft_core", "raft_progress"),  # a follower's progress is carved out of the core for its size
    ("raft_core", "raft_members"),  # so is what a leader does about members
    ("raft_members", "raft_progress"),
    ("kv_store_server", "kv_session"),  # one connection is carved out of the server for its size
    ("example_client", "cluster_manager"),  # the failover demo starts and kills nodes
}

# What runs inside a node. The tools talk to nodes over sockets and signals, as users do.
SERVER_MODULES = {
    "kv_members",
    "kv_client_sessions",
    "kv_session",
    "kv_store",
    "kv_store_server",
    "raft_audit",
    "raft_core",
    "raft_frames",
    "raft_log",
    "raft_members",
    "raft_node",
    "raft_progress",
    "raft_snapshots",
    "raft_status",
    "raft_transport",
    "raft_watch",
    "replication_log",
    "replication_log_format",
    "state_db",
}
TOOLS = ("cluster_manager", "cluster_nodes", "example_client")
TOOLS_ALLOWED = {("cluster_manager", "state_db")}  # a backup is checked by what will restore it

# Modules whose result depends on their input alone.
PURE = (
    "kv_errors",
    "kv_types",
    "raft_types",
    "kv_protocol",
    "kv_commands",
    "raft_frames",
    "raft_log",
    "kv_client_sessions",
    "kv_store",
    "raft_audit",
    "raft_core",
    "raft_members",
    "raft_progress",
)
IMPURE_IMPORTS = {
    *("asyncio", "concurrent", "multiprocessing", "queue", "sched", "subprocess", "threading"),
    *("select", "selectors", "signal", "socket", "socketserver", "ssl"),
    *("io", "os", "pathlib", "shutil", "sqlite3", "sys", "tempfile"),
    *("datetime", "time", "random", "secrets", "uuid"),
}
IMPURE_ALLOWED = {
    ("raft_types", "secrets"),  # new_id(), which founders call; no pure module may (see below)
    ("raft_core", "random"),  # only as the type of the generator it is given (see below)
}
# ``hash`` of bytes is salted per process: two nodes would differ.
IMPURE_CALLS = {"open", "input", "print", "exec", "eval", "__import__", "hash", "id", "new_id"}

MODULE_LINES_MAX = 1000
FUNCTION_LINES_MAX = 70
ROOT_FILES_MAX = 30

SOURCES = sorted(ROOT.glob("*.py"))
ALL_SOURCES = sorted([*SOURCES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SETTINGS = [ROOT / name for name in ("pyproject.toml", "Makefile", ".ci/run", ".gitignore")]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _pages_text() -> str:
    return "\n".join(page.read_text() for page in PAGES if page.name != "CHANGELOG.md")


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def _imports(path: Path) -> set[str]:
    """The top-level modules that ``path`` imports, wherever in the file it does so."""
    names: set[str] = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{_name(path)}: relative import"
            names.add(node.module.split(".")[0])
    return names


def _pure_paths() -> list[Path]:
    return [path for path in SOURCES if path.stem in PURE]


each_source = pytest.mark.parametrize("path", SOURCES, ids=_name)
each_python_file = pytest.mark.parametrize("path", ALL_SOURCES, ids=_name)
each_pure_module = pytest.mark.parametrize("path", _pure_paths(), ids=_name)
each_text = pytest.mark.parametrize("path", [*ALL_SOURCES, *PAGES, *SETTINGS], ids=_name)


# ---- Layers ------------------------------------------------------------------------------------


@each_source
def test_imports_of_our_own_modules_point_to_a_lower_layer(path: Path) -> None:
    """Who reads a module need not know the layers above it."""
    assert path.stem in LAYER_OF, f"{path.name} has no layer: give it one in LAYERS"

    wrong = [
        other
        for other in _imports(path) & LAYER_OF.keys()
        if LAYER_OF[other] >= LAYER_OF[path.stem] and (path.stem, other) not in SAME_LAYER_ALLOWED
    ]
    assert not wrong, f"{path.name} (layer {LAYER_OF[path.stem]}) imports {wrong}"


def test_imports_make_no_circle() -> None:
    """The allowed exceptions within a layer must not close a circle."""
    graph = {path.stem: _imports(path) & LAYER_OF.keys() for path in SOURCES}

    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@each_source
def test_tools_import_no_server_module(path: Path) -> None:
    """The manager and the client reach nodes only as a user's program can."""
    if path.stem in TOOLS:
        allowed = {name for tool, name in TOOLS_ALLOWED if tool == path.stem}
        assert not (_imports(path) & SERVER_MODULES) - allowed


# ---- Purity ------------------------------------------------------------------------------------


@each_pure_module
def test_pure_module_imports_nothing_that_touches_the_world(path: Path) -> None:
    """The same input always gives the same output: on every node, and in every simulated run."""
    allowed = {name for module, name in IMPURE_ALLOWED if module == path.stem}

    assert not (_imports(path) & IMPURE_IMPORTS) - allowed


@each_pure_module
def test_pure_module_calls_nothing_that_touches_the_world(path: Path) -> None:
    """Builtins can do I/O, or answer differently in each process, without an import."""
    wrong = [
        f"line {node.lineno}: {node.func.id}()"
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in IMPURE_CALLS
    ]
    assert not wrong


@each_pure_module
def test_pure_module_uses_random_only_as_a_type(path: Path) -> None:
    """Chance is the generator a module is given; the global one belongs to nobody."""
    wrong = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module == "random":
            wrong += [f"line {node.lineno}: {a.name}" for a in node.names if a.name != "Random"]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "random":
            wrong += [f"line {node.lineno}: {node.attr}"] if node.attr != "Random" else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("random.Random", "Random"):
            wrong.append(f"line {node.lineno}: makes a generator of its own")

    assert not wrong


# ---- Sizes -------------------------------------------------------------------------------------


@each_python_file
def test_module_is_short_enough_to_read_at_one_sitting(path: Path) -> None:
    """A module has at most 1,000 lines."""
    assert len(path.read_text().splitlines()) <= MODULE_LINES_MAX


@each_python_file
def test_function_fits_on_a_screen(path: Path) -> None:
    """A function has at most 70 lines. Source: TIGER_STYLE."""
    too_long = {
        node.name: lines
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES_MAX
    }
    assert not too_long


def test_root_holds_few_enough_files_to_be_the_architecture() -> None:
    """``ls`` is the overview, so it has to fit on a screen too."""
    assert len(SOURCES) <= ROOT_FILES_MAX


# ---- What must not land ------------------------------------------------------------------------


@each_python_file
def test_no_module_imports_pickle(path: Path) -> None:
    """Bytes from a socket or a disk must never be able to run as code."""
    assert not _imports(path) & {"pickle", "marshal", "shelve", "dill"}


@each_text
def test_no_text_holds_a_marker_for_work_left_undone(path: Path) -> None:
    """What is not done is an issue, not a comment."""
    marker = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")

    found = [
        line
        for line in path.read_text().splitlines()
        if marker.search(line) and "FIX001" not in line
    ]
    assert not found


@each_text
def test_no_text_names_a_path_of_one_machine(path: Path) -> None:
    """What is written here holds on any machine."""
    if path.parent.name == "tests":
        return
    machine_path = re.compile(r"(?<![\w.~$})-])/(work|root|home|tmp|Users)\b")

    assert not [line for line in path.read_text().splitlines() if machine_path.search(line)]


# ---- Documentation -----------------------------------------------------------------------------


def test_every_command_is_documented() -> None:
    """A command that no page names does not exist for a user."""
    words = set(re.findall(r"[A-Z]+", _pages_text()))

    commands = [c.name for c in kv_commands.COMMANDS.values() if "internal" not in c.flags]
    missing = sorted(name for name in commands if name not in words)
    assert commands
    assert not missing


def test_every_setting_is_documented() -> None:
    """A flag that no page names does not exist for a user."""
    flags = {setting.flag for setting in kv_config.SETTINGS}
    documented = set(re.findall(r"--[a-z][a-z-]+", _pages_text()))

    assert flags
    assert not sorted(flags - documented)


def _thread_names(path: Path) -> set[str]:
    """The names that ``path`` gives to threads, with ``<>`` for what is filled in later."""
    names: set[str] = set()
    for statement in ast.walk(_tree(path)):
        if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.Expr | ast.Return):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Thread"):
                value = next((k.value for k in node.keywords if k.arg == "name"), None)
                assert value is not None, f"{path.name}:{node.lineno}: a thread without a name"
                # A variable stands for the literals of a table in the same statement.
                names |= _literals(statement if isinstance(value, ast.Name) else value)
        if isinstance(statement, ast.Assign) and "current_thread().name" in ast.unparse(statement):
            names |= _literals(statement.value)
    return names


def _literals(node: ast.AST) -> set[str]:
    """The texts in ``node`` that can be a thread's name."""
    if isinstance(node, ast.JoinedStr):
        parts = (p.value if isinstance(p, ast.Constant) else "<>" for p in node.values)
        return {"".join(map(str, parts))}
    if isinstance(node, ast.Constant):
        is_name = isinstance(node.value, str) and re.fullmatch(r"[a-z]+(-[a-z?]+)+", node.value)
        return {str(node.value).replace("?", "<>")} if is_name else set()
    return set().union(*(_literals(child) for child in ast.iter_child_nodes(node)))


def test_threads_in_the_guide_are_the_threads_in_the_code() -> None:
    """The guide's table of threads is complete, and each row is a thread that exists.

    A row's first cell holds the name in backticks: `raft-timer`, `client-<n>`.
    """
    in_code: set[str] = set()
    for path in SOURCES:
        if path.stem not in (*TOOLS, "test_replication"):
            in_code |= _thread_names(path)
    guide = (ROOT / "docs" / "ARCHITECTURE_VISUAL_GUIDE.md").read_text()
    table = re.search(
        r"^\| *thread\b.*\n\|[-:| ]+\n((?:\|.*\n)+)", guide, re.IGNORECASE | re.MULTILINE
    )
    assert table, "the guide has no table whose first column is 'thread'"
    cells = re.findall(r"^\| *`([^`]+)`", table[1], re.MULTILINE)
    in_guide = {re.sub(r"<[^>]*>|\b[A-Z]+$", "<>", cell) for cell in cells}

    assert in_code
    assert in_guide - {"main"} == in_code


def test_testing_guide_names_tests_and_code_that_exist() -> None:
    """A page that says what holds a rule is only believed as long as its names can be found."""
    guide = (ROOT / "docs" / "TESTING_GUIDE.md").read_text()
    files = [*SOURCES, *(ROOT / "tests").glob("*.py")]
    text = "\n".join(path.read_text() for path in files)
    modules = {path.stem for path in files}
    tests = set(re.findall(r"`(test_\w+)`", guide))
    code = re.findall(r"`([A-Za-z]\w*)\.(?!(?:py|txt|md|c|db|jsonl)`)(\w+)(?:\.(\w+))?`", guide)

    unknown = sorted(t for t in tests if t not in modules and f"def {t}(" not in text)
    for owner, *names in code:
        if owner not in modules and f"class {owner}" not in text:
            unknown.append(owner)
        unknown += [n for n in names if n and not re.search(rf"\b{n}\b(?:\(|:| =)", text)]

    assert len(tests) > 100
    assert len(code) > 20
    assert unknown == []


def test_changelog_has_a_place_for_the_next_change() -> None:
    """A commit that users notice adds its line under Unreleased."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    entries = re.search(r"^## Unreleased\n+((?:- .*\n)+)", changelog, re.MULTILINE)

    assert entries
    for line in entries[1].splitlines():
        assert re.match(r"- (ADDED|CHANGED|FIXED|REMOVED) ", line), line


@pytest.mark.parametrize("marker", ["run", "test"])
def test_readme_marks_the_command_that_ci_runs(marker: str) -> None:
    """CI runs the README's own commands, found by their markers, so they stay true."""
    readme = (ROOT / "README.md").read_text()

    assert re.search(rf"^<!-- command: {marker} -->\n+```bash\n(.+\n)+?```$", readme, re.MULTILINE)
