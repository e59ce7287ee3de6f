"""The nodes of one host: their places, their processes, and what is seen of them.

Rule 1: a process is known by pid *and* creation time, never by its name.
Rule 2: nodes outlive who started them: a new session, output to a file, a pid file beside it.
Rule 3: nodes are reached as any client reaches them, in the line language.

Used by ``cluster_manager.py`` alone, which decides what is to be done.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import DEVNULL
from typing import Final

import psutil

from kv_config import PEER_PORT_OFFSET, Address

Report = Callable[[str], object]
Spawn = Callable[..., psutil.Popen]

ANSWER_TIMEOUT_S: Final = 1.0
ANSWER_BYTES_MAX: Final = 1024**2
POLL_S: Final = 0.1
LOG_LINES_SHOWN: Final = 15
LOG_BYTES_READ: Final = 64 * 1024
# btime in /proc/stat, from which creation times are computed, moves when the clock is set.
CREATE_TIME_TOLERANCE_S: Final = 1.0


class ManagerError(Exception):
    """The cluster is not as it should be; ``str(error)`` says what is wrong and what to do."""


# ---- What is managed, and what is seen of it -----------------------------------------------------


@dataclass(frozen=True, slots=True)
class Node:
    """Where a node stands: its name, its addresses and its files."""

    node_id: str
    listen_host: str
    address: Address  # that clients and peers are given
    peer_port: int
    directory: Path
    flags: tuple[str, ...]  # that make it this node and no other

    @property
    def port(self) -> int:
        return self.address[1]

    @property
    def reached_at(self) -> Address:
        """Where the manager asks it: on this host, whatever address others use."""
        loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        return loopback.get(self.listen_host, self.listen_host), self.port

    @property
    def log(self) -> Path:
        return self.directory.with_name(f"{self.node_id}.log")

    @property
    def pid_file(self) -> Path:
        return self.directory.with_name(f"{self.node_id}.pid")

    def holds_data(self) -> bool:
        """True if the node belongs to a cluster; False if it may still found or join any."""
        try:
            identity = json.loads((self.directory / "identity.json").read_bytes())
            return bool(identity["cluster_id"])
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError):
            return True  # what cannot be read is not taken for nothing: the node itself will tell


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One row of the status; None is what is not known, because the node does not tell."""

    node_id: str
    port: int
    pid: int | None = None
    alive: bool = False  # its process runs, or something answers for it
    role: str | None = None
    term: int | None = None
    commit_index: int | None = None
    applied_index: int | None = None
    lag: int | None = None  # entries that the primary has committed and this node has not applied
    keys: int | None = None
    memory_bytes: int | None = None
    cpu_percent: float | None = None
    uptime_seconds: float | None = None
    voter: bool = False
    member_id: str | None = None
    cluster_id: str | None = None
    problem: str | None = None  # why the node does not count

    def told(self, status: Mapping[str, object]) -> NodeStatus:
        """This row with what the node's STATUS says. Raises ValueError if it is not a node's."""

        def number(name: str) -> float:
            value = status.get(name)
            if not isinstance(value, int | float):
                raise ValueError(f"its STATUS has no number {name!r}")
            return value

        if status.get("node_id") != self.node_id:
            raise ValueError(f"it is {status.get('node_id')}")
        return replace(
            self,
            alive=True,
            role=str(status.get("role")),
            term=int(number("term")),
            commit_index=int(number("commit_index")),
            applied_index=int(number("applied_index")),
            keys=int(number("keys")),
            uptime_seconds=number("uptime_seconds"),
            member_id=str(status.get("member_id")),
            # Empty until the node has founded or joined a cluster.
            cluster_id=str(status.get("cluster_id") or "") or None,
            problem=None,
        )


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The cluster as it is seen from here at one moment."""

    healthy: bool  # a majority of the voters follows a primary
    primary: str | None  # its node id
    failures_tolerated: int  # so many more voters may fail now
    cluster_id: str | None
    nodes: tuple[NodeStatus, ...]


def summarize(
    nodes: Sequence[NodeStatus], primary: NodeStatus | None, voters: frozenset[str]
) -> ClusterStatus:
    """What was seen of the nodes, completed by what ``primary`` says of them."""
    rows, following = [], 0
    for node in nodes:
        if primary and node.cluster_id and node.cluster_id != primary.cluster_id:
            node = replace(node, problem=f"belongs to another cluster, {node.cluster_id}")
        if primary and node.applied_index is not None and not node.problem:
            behind = (primary.commit_index or 0) - node.applied_index
            node = replace(node, lag=max(0, behind), voter=node.member_id in voters)
            following += node.voter and node.term == primary.term
        rows.append(node)
    majority = len(voters) // 2 + 1
    return ClusterStatus(
        healthy=following >= majority,
        primary=primary.node_id if primary else None,
        failures_tolerated=max(0, following - majority),
        cluster_id=primary.cluster_id if primary else None,
        nodes=tuple(rows),
    )


# ---- Sockets, ports and files --------------------------------------------------------------------


def ask(address: Address, command: str) -> Mapping[str, object]:
    """The JSON object with which the node at ``address`` answers a line.

    Raises OSError if nobody answers in time, ValueError if the answer is not a node's.
    """
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    line = b""
    with socket.create_connection(address, timeout=ANSWER_TIMEOUT_S) as connection:
        connection.sendall(command.encode() + b"\n")
        while not line.endswith(b"\n"):
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            received = connection.recv(65536)
            if not received:
                raise ConnectionResetError("it closed the connection")
            line += received
            if len(line) > ANSWER_BYTES_MAX:
                raise ValueError("its answer has no end")
    answer: object = json.loads(line)
    if not isinstance(answer, dict) or answer.get("status") != "OK":
        raise ValueError(f"it answers {line[:80]!r}")
    return answer


def voters_of(address: Address) -> frozenset[str]:
    """The member ids of the voters, as the primary at ``address`` names them (none if it fails)."""
    with suppress(OSError, ValueError):
        members = ask(address, "CLUSTER").get("members")
        if isinstance(members, list):
            return frozenset(str(m["member_id"]) for m in members if m["voter"])
    return frozenset()


def free_ports(count: int) -> list[int]:
    """``count`` ports in a row that are free now, as are the peer ports belonging to them."""
    for _ in range(1000):
        # Both kinds lie below the ports that outgoing connections are given (from 32768 on Linux).
        first = 10_000 + secrets.randbelow(10_000)
        ports = list(range(first, first + count))
        peer_ports = [port + PEER_PORT_OFFSET for port in ports]
        if all(is_free("127.0.0.1", port) for port in (*ports, *peer_ports)):
            return ports
    raise ManagerError(f"no {count} free ports in a row were found")


def is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        raise ManagerError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return True


def port_user(port: int) -> str:
    """Who listens on ``port``, as far as this user may see."""
    with suppress(psutil.Error):  # macOS shows connections to root only
        for connection in psutil.net_connections(kind="tcp"):
            listens = connection.status == psutil.CONN_LISTEN
            if listens and connection.pid and connection.laddr and connection.laddr[1] == port:
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f"pid {connection.pid} ({command[:160]})"
    return "a process that this user may not see"


def write_durably(path: Path, fields: Mapping[str, object]) -> None:
    """Replace ``path`` so that a crash leaves the old or the new file (raft-traps T7)."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(fields, file)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def counted(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def ending(status: int | None) -> str:
    """How a process ended, for people; it is not known (None) of another process' child."""
    if status is None:
        return "ended"
    return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"


# ---- Processes -----------------------------------------------------------------------------------


class Processes:
    """The processes of the nodes. For one thread, except ``look``."""

    def __init__(self, spawn: Spawn, clock: Callable[[], float], stop_timeout_s: float) -> None:
        self._spawn_process = spawn
        self._clock = clock
        self._stop_timeout_s = stop_timeout_s
        # By node id. Only what was started here: their exit status can be known.
        self._children: dict[str, psutil.Popen] = {}
        self._log_offsets: dict[str, int] = {}  # where this start's lines begin
        # By node id. Kept, because CPU is measured from one look to the next.
        self._watched: dict[str, psutil.Process] = {}

    def start(self, node: Node, command: Sequence[str]) -> int:
        """Start the node's process, which outlives this one; its pid."""
        node.log.parent.mkdir(parents=True, exist_ok=True)
        with node.log.open("ab") as log:
            self._log_offsets[node.node_id] = log.seek(0, os.SEEK_END)
            child = self._spawn_process(
                command,
                stdin=DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # no Ctrl-C, no hang-up of this terminal reaches it
            )
        self._children[node.node_id] = child
        mark = {"pid": child.pid, "create_time": child.create_time(), "port": node.port}
        write_durably(node.pid_file, mark)
        return child.pid

    def find(self, node: Node) -> psutil.Process | None:
        """The node's process, if it runs."""
        child = self._children.get(node.node_id)
        if child is not None and child.poll() is None:
            return child
        try:
            mark = json.loads(node.pid_file.read_bytes())
            process = psutil.Process(mark["pid"])
            age_s = abs(process.create_time() - mark["create_time"])
            # Empty for a process that has ended and is not reaped yet.
            is_node = f"--node-id={node.node_id}" in process.cmdline()
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            return None
        if not is_node or age_s >= CREATE_TIME_TOLERANCE_S:
            return None
        self._children.pop(node.node_id, None)  # that one has ended; another manager started this
        return process

    def exit_status(self, node: Node) -> int | None:
        """How the node's process ended; None if it was started by another manager."""
        child = self._children.get(node.node_id)
        status: int | None = child.poll() if child else None
        return status

    def log_end(self, node: Node) -> str:
        """The last lines that this start of the node has left in its log, as a sentence's end."""
        offset = self._log_offsets.get(node.node_id, 0)
        with node.log.open("rb") as file:
            file.seek(max(offset, file.seek(0, os.SEEK_END) - LOG_BYTES_READ))
            lines = file.read().decode(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        return "\n    ".join([f"The end of {node.log}:", *(lines or ["(it said nothing)"])])

    def end(self, nodes: Sequence[Node], report: Report) -> None:
        """End the processes of ``nodes``; an interruption ends the patience with them."""
        try:
            for node in nodes:
                if process := self.find(node):
                    report(f"Stopping {node.node_id} (pid {process.pid})...")
                    with suppress(psutil.NoSuchProcess):
                        process.terminate()
                        process.resume()  # one that is suspended would not notice
            self._await_end(nodes)
        finally:
            for node in nodes:
                if process := self.find(node):
                    seconds = f"{self._stop_timeout_s:g} s"
                    report(f"{node.node_id} did not stop within {seconds}: killed with SIGKILL.")
                    self.kill(node, process)
                node.pid_file.unlink(missing_ok=True)

    def kill(self, node: Node, process: psutil.Process) -> None:
        """SIGKILL: the node ends at once, as in a crash. Its pid file stays."""
        with suppress(psutil.NoSuchProcess):
            process.kill()
        self._await_end((node,))

    def _await_end(self, nodes: Iterable[Node]) -> None:
        # Not psutil's wait(), which waits for a zombie too: who adopted it may reap it late.
        deadline = self._clock() + self._stop_timeout_s
        while any(self.find(node) for node in nodes) and self._clock() < deadline:
            time.sleep(POLL_S / 2)

    def look(self, node: Node) -> NodeStatus:
        """What is seen of one node. On a pool thread: touches only what belongs to ``node``."""
        seen = NodeStatus(node.node_id, node.port, problem="does not run")
        if process := self.find(node):
            with suppress(psutil.Error):
                if self._watched.get(node.node_id) != process:
                    self._watched[node.node_id] = process
                known = self._watched[node.node_id]
                seen = replace(
                    seen,
                    pid=process.pid,
                    alive=True,
                    memory_bytes=process.memory_info().rss,
                    # Since the last look; 0 at the first one, which is why there is a second.
                    cpu_percent=known.cpu_percent() or known.cpu_percent(interval=POLL_S),
                    problem="does not answer",
                )
        try:
            return seen.told(ask(node.reached_at, "STATUS"))
        except OSError as error:
            why = f": {error.strerror or error}" if seen.alive else ""
            return replace(seen, problem=f"{seen.problem}{why}")
        except ValueError as error:
            return replace(seen, problem=f"does not answer on port {node.port}: {error}")
