"""A real cluster for the tests: server processes on free ports, in a directory of its own.

Rule 1: nothing outlives the ``with`` block: every node is killed, and its directory removed.
Rule 2: a wait is a condition with a deadline (``eventually``), and its failure shows what the nodes
said last; nothing sleeps in order to be right.

Nodes are started and killed through ``cluster_manager.py``, which is tested on its own. Used by
``test_replication.py`` and ``test_kv_store_server.py``.
"""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import psutil

from cluster_manager import SERVER_SCRIPT, ClusterManager
from cluster_nodes import Node
from kv_client import KVStoreClient
from kv_config import Address, format_address
from kv_protocol import ReplyParser, encode_request
from kv_types import Reply

T = TypeVar("T")
# An object of the line language, as a test reads it.
Answer = dict[str, Any]

# For tests that are not about time: several times what a loaded machine has been seen to need.
PATIENCE_S: Final = 30.0
ANSWER_S: Final = 10.0
# An election within a second, and still five heartbeats of a busy machine.
SHORT_TIMERS: Final = ("--heartbeat-interval", "0.2", "--election-timeout", "1.0-1.6")


def eventually(
    condition: Callable[[], T | None],
    what: str,
    within_s: float = PATIENCE_S,
    explain: Callable[[], str] = str,
) -> T:
    """The first true value of ``condition``; fails with ``what`` if there is none in time."""
    deadline = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s:g} s: {what}\n{explain()}")
        time.sleep(0.01)


# ---- Two languages, spoken by hand -------------------------------------------------------------


class LineConnection:
    """A person with ``nc``: lines out, one JSON object a line back."""

    def __init__(self, address: Address, timeout_s: float = ANSWER_S) -> None:
        self.sock = socket.create_connection(address, timeout=timeout_s)
        self._lines = self.sock.makefile("rb")

    def send(self, *lines: str) -> None:
        """Send without waiting for the answers."""
        self.sock.sendall("".join(f"{line}\n" for line in lines).encode())

    def answer(self) -> Answer | None:
        """The next answer; None if the connection ended instead."""
        try:
            line = self._lines.readline()
        except ConnectionError:
            return None
        if not line.endswith(b"\n"):
            return None
        answer: Answer = json.loads(line)
        return answer

    def ask(self, line: str) -> Answer:
        """The answer to one line. Raises ConnectionError if the node closed the connection."""
        self.send(line)
        answer = self.answer()
        if answer is None:
            raise ConnectionResetError("closed instead of an answer")
        return answer

    def close(self) -> None:
        self._lines.close()
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class RespConnection:
    """A Redis client that follows no redirect: requests out, whatever comes back as values."""

    def __init__(self, address: Address, timeout_s: float = ANSWER_S) -> None:
        self.sock = socket.create_connection(address, timeout=timeout_s)
        self._parser = ReplyParser()

    def send(self, *argv: str | bytes) -> None:
        """Send one request without waiting for its reply."""
        words = [word.encode() if isinstance(word, str) else word for word in argv]
        self.sock.sendall(encode_request(words))

    def replies(self) -> Iterator[Reply]:
        """The replies as they come, until the node closes the connection."""
        while data := self.sock.recv(65536):
            self._parser.feed(data)
            yield from self._parser.take()

    def ask(self, *argv: str | bytes) -> Reply:
        """The reply to one request; errors are returned."""
        self.send(*argv)
        for reply in self.replies():
            return reply
        raise ConnectionResetError("closed instead of a reply")

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def ask(address: Address, line: str, timeout_s: float = ANSWER_S) -> Answer:
    """One node's answer to one line, on a connection of its own."""
    with LineConnection(address, timeout_s) as connection:
        return connection.ask(line)


# ---- The cluster -------------------------------------------------------------------------------


class Cluster:
    """Nodes that are all voters when the ``with`` block begins."""

    def __init__(
        self, *server_args: str, nodes: int = 3, server_script: Path = SERVER_SCRIPT
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="kv-cluster-"))
        self.manager = ClusterManager(
            nodes, None, self.directory / "data", server_args, server_script=server_script
        )
        self._suspended: set[str] = set()

    def __enter__(self) -> Self:
        try:
            self.heal()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill what runs, at once, and forget the data."""
        for node_id in self.node_ids:
            if self.process(node_id) is not None:
                self.manager.kill_node(node_id)
        for node in self.manager.nodes:
            node.bury()
        shutil.rmtree(self.directory)

    # ---- Faults and repair ----

    def heal(self) -> None:
        """All nodes run, answer, vote and have caught up."""
        for node_id in tuple(self._suspended):
            self.resume(node_id)
        self.manager.start(report=lambda line: None)

    def kill(self, *node_ids: str) -> None:
        """SIGKILL, as ``kill -9``."""
        for node_id in node_ids:
            self._suspended.discard(node_id)
            self.manager.kill_node(node_id)

    def start(self, *node_ids: str) -> None:
        """Start nodes that do not run; without waiting for them."""
        for node_id in node_ids:
            self.manager.start_node(node_id)

    def suspend(self, *node_ids: str) -> None:
        """SIGSTOP: the process hangs, with its connections open."""
        for node_id in node_ids:
            self._suspended.add(node_id)
            self.manager.suspend(node_id)

    def resume(self, *node_ids: str) -> None:
        """SIGCONT."""
        for node_id in node_ids:
            self._suspended.discard(node_id)
            self.manager.resume(node_id)

    # ---- What there is ----

    @property
    def node_ids(self) -> tuple[str, ...]:
        return tuple(node.node_id for node in self.manager.nodes)

    def node(self, node_id: str) -> Node:
        return self.manager.node(node_id)

    def address(self, node_id: str) -> Address:
        return self.manager.node(node_id).address

    def process(self, node_id: str) -> psutil.Process | None:
        """The node's process, None if it does not run."""
        try:
            mark = json.loads(self.node(node_id).pid_file.read_bytes())
            process = psutil.Process(mark["pid"])
            runs = process.status() != psutil.STATUS_ZOMBIE
            # Raises as well if it has become a zombie since.
            return process if runs and f"--node-id={node_id}" in process.cmdline() else None
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None

    def client(self, timeout_s: float = PATIENCE_S) -> KVStoreClient:
        """A client that knows all nodes and rides out failovers."""
        return KVStoreClient(map(format_address, self.manager.addresses), timeout_s=timeout_s)

    def ask(self, node_id: str, line: str) -> Answer:
        """One node's answer to one line."""
        return ask(self.address(node_id), line)

    def resp(self, node_id: str) -> RespConnection:
        """A connection to one node."""
        return RespConnection(self.address(node_id))

    def status(self, node_id: str) -> Answer | None:
        """The node's STATUS; None if it does not answer (soon)."""
        try:
            return ask(self.address(node_id), "STATUS", timeout_s=0.5)
        except OSError:
            return None

    def others(self, *node_ids: str) -> list[str]:
        """All nodes but these."""
        return [node_id for node_id in self.node_ids if node_id not in node_ids]

    def primary(self, among: Sequence[str] = (), within_s: float = PATIENCE_S) -> str:
        """Who leads, once one of ``among`` (default: any) says so of itself and answers a read."""

        def leads() -> str | None:
            for node_id in among or self.node_ids:
                status = self.status(node_id)
                if status and status["role"] == "PRIMARY" and self._answers(node_id):
                    return node_id
            return None

        return self.eventually(leads, "one node is primary", within_s)

    def _answers(self, node_id: str) -> bool:
        # One that was cut off believes to lead until it asks the others, as a read does.
        try:
            return bool(self.ask(node_id, "GET is-there-a-primary")["status"] == "NOT_FOUND")
        except OSError:
            return False

    def secondaries(self) -> list[str]:
        """Who follows the primary."""
        return self.others(self.primary())

    def in_step(self, node_ids: Sequence[str] = (), within_s: float = PATIENCE_S) -> Answer:
        """Wait until the nodes have applied the same index; fails unless their states are equal."""

        def level() -> list[Answer] | None:
            seen = [self.status(node_id) for node_id in node_ids or self.node_ids]
            statuses = [status for status in seen if status is not None]
            level = len({status["applied_index"] for status in statuses}) == 1
            return statuses if level and len(statuses) == len(seen) else None

        statuses = self.eventually(level, "all nodes have applied the same index", within_s)
        hashes = {status["node_id"]: status["state_hash"] for status in statuses}
        assert len(set(hashes.values())) == 1, f"equal index, but different states: {hashes}"
        return statuses[0]

    def eventually(
        self, condition: Callable[[], T | None], what: str, within_s: float = PATIENCE_S
    ) -> T:
        """As the function of this name; a failure shows the ends of the nodes' logs."""
        return eventually(condition, what, within_s, self.describe)

    def describe(self) -> str:
        """The last lines of each node's log."""
        parts = []
        for node in self.manager.nodes:
            lines = node.log.read_text(errors="replace").splitlines() if node.log.exists() else []
            parts.append("\n    ".join([f"{node.node_id}:", *lines[-15:]]))
        return "\n".join(parts)


class TermWatch:
    """Asks every node for its STATUS, over and over, and notes who led in which term."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._stop = threading.Event()
        self.primaries: dict[int, set[str]] = {}
        self.terms: dict[str, list[int]] = {node_id: [] for node_id in cluster.node_ids}
        # One thread a node: one that hangs must not keep the others from being seen.
        self._threads = [
            threading.Thread(target=self._watch, args=(node_id,), name=f"watch-{node_id}")
            for node_id in cluster.node_ids
        ]

    def _watch(self, node_id: str) -> None:
        while not self._stop.wait(0.02):
            status = self._cluster.status(node_id)
            if status is None:
                continue
            self.terms[node_id].append(status["term"])
            if status["role"] == "PRIMARY":
                self.primaries.setdefault(status["term"], set()).add(node_id)

    def await_primary(self) -> str:
        """The primary, once it has been noted with its term."""
        node_id = self._cluster.primary()
        term = self._cluster.ask(node_id, "STATUS")["term"]
        self._cluster.eventually(lambda: term in self.primaries, f"term {term} is noted")
        return node_id

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
