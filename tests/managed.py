"""Managers of fake nodes (fake_node.py), as objects and as the program."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cluster_manager import ClusterManager, ManagerError

ROOT = Path(__file__).resolve().parent.parent
FAKE_NODE = ROOT / "tests" / "fake_node.py"


def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


class Cluster(ClusterManager):
    """A manager of fake nodes that keeps what it reported."""

    def __init__(self, data_dir: Path, nodes: int | None = 3, base_port: int | None = None, **more):
        more = {"server_script": FAKE_NODE, "start_timeout_s": 20.0, **more}
        super().__init__(nodes, base_port, data_dir, more.pop("server_args", None), **more)
        self.said: list[str] = []

    @property
    def base_port(self) -> int:
        return self.nodes[0].port

    @property
    def shape(self) -> tuple[object, ...]:
        """What the program needs to know of a cluster that is not founded yet."""
        return (
            *("--nodes", len(self.nodes), "--base-port", self.base_port),
            *("--data-dir", self.data_dir),
        )

    def begin(self) -> list[str]:
        """Start, and give what this start said."""
        self.said.clear()
        self.start(self.said.append)
        return self.said

    def end(self) -> list[str]:
        self.said.clear()
        self.stop(self.said.append)
        return self.said

    def running(self) -> list[str]:
        return [node.node_id for node in self.nodes if self._processes.find(node)]

    def argv(self, node_id: str) -> list[list[str]]:
        """The arguments of each start of the node, as it logged them itself."""
        log = self.node(node_id).log
        lines = log.read_text().splitlines() if log.exists() else []
        return [line.split()[1:] for line in lines if line.startswith("started:")]

    def recorded(self) -> dict[str, object]:
        record: dict[str, object] = json.loads((self.data_dir / "cluster.json").read_text())
        return record

    def cluster_id(self) -> str:
        return str(self.recorded()["cluster_id"])


@contextmanager
def managers(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cluster]]:
    """Makes managers of ``directory/data``; what runs is stopped in the end."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made: list[Cluster] = []

    def make(**more) -> Cluster:
        made.append(Cluster(directory / "data", **more))
        return made[-1]

    yield make
    for cluster in made:
        with suppress(ManagerError):  # of a record that a test has spoilt
            cluster.status()  # with the nodes that are recorded by now
        for node_id in cluster.running():
            cluster.kill_node(node_id)


def command(*argv: object) -> list[str]:
    """The program's command line, with fake nodes."""
    code = (
        "import signal, sys; from pathlib import Path; import cluster_manager;"
        # A test run in the background of a shell would pass on an ignored SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"sys.exit(cluster_manager.main(sys.argv[1:], Path({str(FAKE_NODE)!r})))"
    )
    return [sys.executable, "-c", code, *map(str, argv)]


def run(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*argv), capture_output=True, text=True, timeout=60, check=False)
