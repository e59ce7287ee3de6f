"""The README's own commands, run in a copy of the tree; and what the pages say of the files.

What is changed in a command: a port that is free, and which Python ``python3`` is (this one). The
run command installs its requirements from the package index, like a user's. The test command is
run whole by ``.ci/run``; here, where it would run itself, only its last step is, and only collects.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from cluster_manager import BASE_PORT_DEFAULT
from cluster_nodes import NODES_DEFAULT, free_ports
from kv_client import KVStoreClient

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

COMMAND_TIMEOUT_S = 240
FAILOVER_TIMEOUT_S = 30


def tracked_files() -> list[str]:
    """What a clone of this tree holds, as paths from its root."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: what belongs to the tree is not known")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def block(marker: str, language: str = "bash") -> str:
    """The fenced block after ``<!-- command: MARKER -->`` in the README."""
    found = re.search(
        rf"^<!-- command: {marker} -->\n+```{language}\n(.+?)\n```$",
        README,
        re.MULTILINE | re.DOTALL,
    )
    assert found, f"README.md has no {language} block marked {marker}"
    return found[1]


class Reader:
    """Someone who has cloned the repository and types what the README says."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.ports = free_ports(NODES_DEFAULT)
        own = {name for name in os.environ if name.startswith(("KV_", "PYTHON"))}
        self._environ = {k: v for k, v in os.environ.items() if k not in own | {"VIRTUAL_ENV"}}
        # So that python3 is a Python that the tests run with, whatever else the machine has.
        self._environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        for name in tracked_files():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, home / name)

    def types(self, command: str) -> str:
        """The command's output on both streams. AssertionError if it fails."""
        return self.runs(["bash", "-euo", "pipefail", "-c", self._on_our_ports(command)])

    def runs_python(self, program: str, python: str) -> str:
        """The output of a program from the page."""
        return self.runs([python, "-c", self._on_our_ports(program)])

    def runs(self, argv: list[str]) -> str:
        """As ``types``, without a shell."""
        done = subprocess.run(
            argv,
            cwd=self.home,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
        assert done.returncode == 0, f"{argv}\n{done.stdout}"
        return done.stdout

    def _on_our_ports(self, text: str) -> str:
        for number, port in enumerate(self.ports):
            text = text.replace(str(BASE_PORT_DEFAULT + number), str(port))
        return text


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """A reader with a fresh copy of the tree; what they started is stopped."""
    reader = Reader(tmp_path / "clone")

    yield reader

    if (reader.home / "data").exists():
        reader.runs([sys.executable, "cluster_manager.py", "--action", "stop"])


def output_once_it_succeeds(reader: Reader, command: str) -> str:
    """What the command prints when it first exits with 0; AssertionError if it never does."""
    deadline_s = time.monotonic() + FAILOVER_TIMEOUT_S
    while True:
        try:
            return reader.types(command)
        except AssertionError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)


# ---- The commands ------------------------------------------------------------------------------


@pytest.mark.parametrize("marker", ["run", "test"])
def test_command_of_the_readme_is_one_line(marker: str) -> None:
    """One command runs a cluster, one command passes all the tests."""
    assert len(block(marker).splitlines()) == 1


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_readme_read_from_top_to_bottom_does_what_it_says(reader: Reader) -> None:
    """A fresh clone runs, answers, survives ``kill -9`` of its primary, heals and stops."""
    started = reader.types(f"{block('run')} --base-port {reader.ports[0]}")
    assert "Cluster started successfully!" in started

    with KVStoreClient([f"127.0.0.1:{port}" for port in reader.ports], timeout_s=30) as client:
        client.set("written", "before the kill")
        client.set("city", {"name": "Berlin"})
        if shutil.which("nc"):
            assert '"value": {"name": "Berlin"}' in reader.types(block("nc"))
        if shutil.which("redis-cli"):
            assert "Berlin" in reader.types(block("redis-cli"))
        assert "Ada" in reader.runs_python(block("client", "python"), ".venv/bin/python")
        assert "hello 60" in reader.runs_python(block("redis-py", "python"), sys.executable)

        reader.types(block("kill"))
        status, *more = block("watch").splitlines()
        seen = output_once_it_succeeds(reader, status)
        assert "node1 does not run" in seen
        assert re.search(r"Healthy: node[23] is primary", seen)
        if shutil.which("redis-cli"):
            assert "Berlin" in reader.types("\n".join(more))
        assert client.get("written") == "before the kill"

        assert "Starting node1" in reader.types(block("back"))
        healed = reader.types(status)
        assert re.search(r"node1 .* SECONDARY", healed)
        assert "3 nodes tolerate 1 failure" in healed

    assert "Cluster stopped." in reader.types(block("stop"))
    with pytest.raises(AssertionError, match="Not healthy"):
        reader.types(status)


@pytest.mark.slow
def test_test_command_of_the_readme_finds_every_test_file(reader: Reader) -> None:
    """The command that passes all the tests leaves none out."""
    last_step = block("test").rpartition("&&")[2].strip()
    assert last_step.startswith(".venv/bin/python ")
    (reader.home / ".venv").symlink_to(sys.prefix)

    collected = reader.types(f"{last_step} --collect-only -q")

    for name in tracked_files():
        if Path(name).name.startswith("test_"):
            assert f"{name}::" in collected


# ---- The pages ---------------------------------------------------------------------------------


def test_manifest_names_exactly_the_files_of_the_tree() -> None:
    """Each file has one row, and each row a file; a row may be a pattern for files of one kind."""
    manifest = (ROOT / "docs" / "FILE_MANIFEST.md").read_text()
    patterns = re.findall(r"^\| `([^`]+)` \|", manifest, re.MULTILINE)
    files = tracked_files()

    rows = {name: [p for p in patterns if fnmatchcase(name, p)] for name in files}
    assert not [name for name, matching in rows.items() if len(matching) != 1]
    assert not [p for p in patterns if not any(fnmatchcase(name, p) for name in files)]
    assert not [p for p, count in Counter(patterns).items() if count > 1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    """A link to a file leads to one of this tree; a link into a page leads to a heading there."""
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            anchors = {
                re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings
            }
            assert anchor in anchors, f"{page.name} links to {target}#{anchor}"


def test_readme_walks_through_every_module() -> None:
    """The guided walk leaves no module of the root out."""
    walk = README.partition("## A walk through the files")[2].partition("\n## ")[0]

    assert not [p.name for p in ROOT.glob("*.py") if f"`{p.name}`" not in walk]
