"""The nodes of one host: the record of them, their processes, and what is seen of them.

Rule 1: a process is known by pid *and* start (``start_of``), never by its name.
Rule 2: nodes outlive who started them: a new session, output to a file, a pid file beside it.
Rule 3: nodes are reached as any client reaches them, in the line language.
Rule 4: which nodes there are stands in ``cluster.json`` before the first of their processes runs.

``cluster_manager.py`` decides what is to be done with them.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from subprocess import DEVNULL
from typing import BinaryIO, Final, NamedTuple

import psutil
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kv_config import (
    PEER_PORT_OFFSET,
    PORT_MAX,
    Address,
    ConfigError,
    format_address,
    parse_settings,
)
from raft_types import VOTERS_MAX

Report = Callable[[str], object]
Spawn = Callable[..., psutil.Popen]

ANSWER_TIMEOUT_S: Final = 1.0
ANSWER_BYTES_MAX: Final = 1024**2
# A node copies its state before it sends the first byte: a second for a million keys.
BACKUP_SILENCE_S: Final = 60.0
BACKUP_PIECE_BYTES: Final = 1024**2
POLL_S: Final = 0.1
RELEASE_S: Final = 1.0
LOCK_TIMEOUT_S: Final = 5.0
NODES_DEFAULT: Final = 3
RECORD_NAME: Final = "cluster.json"
BACKOFF_S_MAX: Final = 30.0
STABLE_S: Final = 60.0  # a node that ran so long starts with a fresh back-off
RECORD_FORMAT: Final = 2  # 1 had a number of nodes instead of the nodes
LOG_LINES_SHOWN: Final = 15
LOG_BYTES_READ: Final = 64 * 1024
PROC: Final = Path("/proc")  # Linux has it
# Creation times move with each small correction of the clock.
CREATE_TIME_TOLERANCE_S: Final = 1.0
# Given to nodes by the manager, so not to be given after ``--``.
OWN_FLAGS: Final = (
    *("--node-id", "--port", "--peer-port", "--data-dir", "--join"),
    *("--primary", "--learner", "--restore-from"),
)


class ManagerError(Exception):
    """The cluster is not as it should be; ``str(error)`` says what is wrong and what to do."""


class ClusterBusyError(ManagerError):
    """Another manager starts or stops nodes of the same data directory."""


class RefusedError(ManagerError, ValueError):
    """A node answered with an error instead of what was asked for."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"it answers {code}: {message}")
        self.code = code
        self.message = message


# ---- What is managed, and what is seen of it -----------------------------------------------------


@dataclass(frozen=True, slots=True)
class Node:
    """Where a node stands: its name, its addresses and its files."""

    node_id: str
    listen_host: str
    address: Address  # that clients and peers are given
    peer_port: int
    home: Path  # for what is kept of it outside of its own directory
    directory: Path
    in_memory: bool  # the directory is lost with the process
    flags: tuple[str, ...]  # that make it this node and no other
    learner: bool  # a read copy, which never votes

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
        return self.home / f"{self.node_id}.log"

    @property
    def pid_file(self) -> Path:
        return self.home / f"{self.node_id}.pid"

    def identity(self) -> Mapping[str, str]:
        """What the directory says of who it is; empty if there is nothing in it that counts.

        Raises OSError, ValueError, KeyError or TypeError if it cannot be read.
        """
        if self.in_memory:
            return {}  # what a process has left there is void
        try:
            identity = json.loads((self.directory / "identity.json").read_bytes())
        except FileNotFoundError:
            return {}
        return {name: str(identity[name]) for name in ("cluster_id", "member_id")}

    def holds_data(self) -> bool:
        """True if the node belongs to a cluster; False if it may still found or join any."""
        try:
            return bool(self.identity().get("cluster_id"))
        except (OSError, ValueError, KeyError, TypeError):
            return True  # what cannot be read is not taken for nothing: the node itself will tell

    def bury(self) -> None:
        """Remove what nobody needs when the process has ended: not its data on disk."""
        self.pid_file.unlink(missing_ok=True)
        if self.in_memory:
            shutil.rmtree(self.directory, ignore_errors=True)
            with suppress(OSError):
                self.directory.parent.rmdir()

    def set_aside(self, why: str) -> Path | None:
        """Rename the directory, so that the node starts with an empty one; where it is now."""
        if not self.directory.is_dir():
            return None
        return self.directory.rename(_unused(self.directory.with_name(f"{self.node_id}.{why}")))


def _unused(path: Path) -> Path:
    """``path`` with the time behind it, and a number if that is not enough."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = (f"{path.name}-{stamp}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    return next(candidate for name in names if not (candidate := path.with_name(name)).exists())


class Place(NamedTuple):
    """What the record says of one node."""

    port: int
    learner: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """That a cluster was founded here, and which nodes it has on this host."""

    cluster_id: str
    base_port: int
    places: Mapping[str, Place]  # by node id
    server_args: tuple[str, ...] = ()  # that every node was last started with

    @staticmethod
    def load(path: Path) -> Record | None:
        try:
            record = json.loads(path.read_bytes())
            if (version := record.get("format", 1)) != RECORD_FORMAT:
                raise ManagerError(
                    f"{path} has format {version}, but this program knows format "
                    f"{RECORD_FORMAT} alone: use the version that wrote it, or another --data-dir"
                )
            places = {
                str(node_id): Place(int(place["port"]), bool(place["learner"]))
                for node_id, place in record["nodes"].items()
            }
            server_args = tuple(map(str, record.get("server_args", ())))
            return Record(str(record["cluster_id"]), int(record["base_port"]), places, server_args)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManagerError(
                f"{path} cannot be read ({error}). It says which cluster was founded here: "
                "restore it, or remove it; the nodes that have data keep it."
            ) from error

    def save(self, path: Path) -> None:
        nodes = {node_id: place._asdict() for node_id, place in self.places.items()}
        record = {"format": RECORD_FORMAT, "cluster_id": self.cluster_id}
        record |= {"base_port": self.base_port, "server_args": self.server_args, "nodes": nodes}
        write_durably(path, record)


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
    voter: bool | None = None  # None: there is no primary that would tell
    follows: bool = False  # it is a voter, and of the primary's term
    learner: bool = False  # it is to stay one
    removed: bool = False  # it was a member, and is none any more
    tolerates: int | None = None  # how many more voters may fail, as this node knows
    installing: float | None = None  # the share of a snapshot that it has received
    member_id: str | None = None
    cluster_id: str | None = None
    problem: str | None = None  # why the node does not count
    trouble: str | None = None  # what the node itself complains of

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
            tolerates=int(number("failures_tolerated")),
            problem=None,
            trouble=str(status.get("trouble") or "") or None,
        )


@dataclass(frozen=True, slots=True)
class Member:
    """A member as the primary names it, on whichever host."""

    node_id: str
    member_id: str
    host: str
    port: int
    voter: bool
    snapshot: float | None = None  # the share of the state that it has, while it is sent to it


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The cluster as it is seen from here at one moment."""

    healthy: bool  # a majority of the voters follows a primary
    primary: str | None  # its node id
    failures_tolerated: int  # so many more voters may fail now
    cluster_id: str | None
    nodes: tuple[NodeStatus, ...]
    members: tuple[Member, ...]  # none if there is no primary to name them

    @property
    def voters(self) -> int:
        return sum(member.voter for member in self.members)

    @property
    def following(self) -> frozenset[str]:
        """The names of the voters that follow the primary, itself included."""
        return frozenset(node.node_id for node in self.nodes if node.follows)

    @property
    def tolerance(self) -> str:
        """How many failures the cluster tolerates now, in words."""
        well = len(self.following)
        nodes = counted(self.voters, "node")
        if well < self.voters:
            nodes = f"{well} of {nodes}"
        verb = "tolerates" if well == 1 else "tolerate"
        return f"{nodes} {verb} {counted(self.failures_tolerated, 'failure')}"

    def row(self, node_id: str) -> NodeStatus:
        return next(node for node in self.nodes if node.node_id == node_id)

    def member(self, node_id: str) -> Member | None:
        return next((member for member in self.members if member.node_id == node_id), None)


def summarize(
    nodes: Sequence[NodeStatus], primary: NodeStatus | None, members: Sequence[Member]
) -> ClusterStatus:
    """What was seen of the nodes, completed by what ``primary`` says of them."""
    rows, following = [], 0
    voters = sum(member.voter for member in members)
    shares = {member.member_id: member.snapshot for member in members}
    for node in nodes:
        node = replace(node, installing=shares.get(node.member_id or ""))
        if primary and node.cluster_id in (None, primary.cluster_id):
            node = replace(node, voter=_is_voter(node, members))
        if primary and node.cluster_id:
            node = _judge(node, primary, members)
        if primary and node.applied_index is not None and not node.problem:
            behind = (primary.commit_index or 0) - node.applied_index
            follows = bool(node.voter) and node.term == primary.term
            node = replace(node, lag=max(0, behind), follows=follows)
            following += follows
        rows.append(node)
    majority = voters // 2 + 1
    tolerated = following - majority
    if primary and primary.tolerates is not None:
        tolerated = min(tolerated, primary.tolerates)  # it knows who has lost what it had
    return ClusterStatus(
        healthy=following >= majority,
        primary=primary.node_id if primary else None,
        failures_tolerated=max(0, tolerated),
        cluster_id=primary.cluster_id if primary else None,
        nodes=tuple(rows),
        members=tuple(members),
    )


def _is_voter(node: NodeStatus, members: Sequence[Member]) -> bool:
    """Whether it has a vote; one that is down keeps it."""
    return any(
        member.voter
        for member in members
        if (
            member.member_id == node.member_id if node.member_id else member.node_id == node.node_id
        )
    )


def _judge(node: NodeStatus, primary: NodeStatus, members: Sequence[Member]) -> NodeStatus:
    """``node`` with the reason why it does not belong to the primary's cluster, if so."""
    if node.cluster_id != primary.cluster_id:
        return replace(node, problem=f"belongs to another cluster, {node.cluster_id}")
    if members and all(member.member_id != node.member_id for member in members):
        return replace(node, removed=True, problem="was removed from the cluster")
    return node


def _primary(nodes: Iterable[NodeStatus], cluster_id: str | None) -> NodeStatus | None:
    """The primary of the highest term: one that was cut off may not know yet that it was."""
    claims = [node for node in nodes if node.role == "PRIMARY"]
    if cluster_id:
        claims = [node for node in claims if node.cluster_id == cluster_id]
    return max(claims, key=lambda node: node.term or 0, default=None)


def picture(status: ClusterStatus) -> Group:
    """The status as a table, with a sentence below it for whatever is not as it should be."""
    table = Table("node", "role", "voter")
    for name in ("term", "commit", "applied", "lag", "keys", "port", "pid", "memory", "CPU"):
        table.add_column(name, justify="right")
    table.add_column("uptime", justify="right")
    for node in status.nodes:
        style = "bold green" if node.node_id == status.primary else "red" if node.problem else ""
        numbers = (node.term, node.commit_index, node.applied_index, node.lag, node.keys)
        up = None if node.uptime_seconds is None else timedelta(seconds=int(node.uptime_seconds))
        table.add_row(
            node.node_id,
            _state(node),
            "-" if node.voter is None else "yes" if node.voter else "no",
            *("-" if number is None else str(number) for number in (*numbers, node.port, node.pid)),
            "-" if node.memory_bytes is None else f"{node.memory_bytes / 1024**2:.1f} MiB",
            "-" if node.cpu_percent is None else f"{node.cpu_percent:.1f} %",
            "-" if up is None else str(up),
            style=style,
        )
    lines = [f"{node.node_id} {node.problem}." for node in status.nodes if node.problem]
    lines += [f"{node.node_id} reports: {node.trouble}." for node in status.nodes if node.trouble]
    strangers = [node.node_id for node in status.nodes if node.role and node.pid is None]
    if strangers:
        lines.append(f"{', '.join(strangers)}: not started from this --data-dir by the manager.")
    if status.healthy:
        lines.append(f"Healthy: {status.primary} is primary; {status.tolerance}.")
    else:
        lines.append("Not healthy: no majority of the voters follows a primary.")
    return Group(table, *(Text(line) for line in lines))


def _state(node: NodeStatus) -> str:
    """The node's role, or what is the matter with it, in a word or two."""
    if node.removed:
        return "removed"
    if node.installing is not None:
        return f"installing {node.installing:.0%}"
    return node.role or ("no answer" if node.alive else "down")


# ---- Sockets, ports and files --------------------------------------------------------------------


def ask(
    address: Address, command: str, timeout_s: float = ANSWER_TIMEOUT_S
) -> Mapping[str, object]:
    """The JSON object with which the node at ``address`` answers a line.

    Raises OSError if nobody answers in time, RefusedError if the answer is an error, any other
    ValueError if it is not a node's.
    """
    deadline = time.monotonic() + timeout_s
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
    return _answered(line)


def _answered(line: bytes) -> Mapping[str, object]:
    """The answer in ``line``. Raises RefusedError if it is an error, ValueError if it is none."""
    answer: object = json.loads(line)
    if isinstance(answer, dict) and answer.get("status") == "OK":
        return answer
    if isinstance(answer, dict) and "code" in answer:
        raise RefusedError(str(answer["code"]), str(answer.get("message")))
    raise ValueError(f"it answers {line[:80]!r}")


def receive_backup(address: Address, path: Path, progress: Report) -> None:
    """Write to ``path`` what the node at ``address`` sends as its backup, and sync it.

    Raises OSError if the stream breaks off, RefusedError if there is none.
    """
    request = b"BACKUP\n"
    with (
        path.open("wb") as file,
        socket.create_connection(address, BACKUP_SILENCE_S) as connection,
        connection.makefile("rb") as stream,
    ):
        connection.sendall(request)
        answer = _answered(stream.readline(ANSWER_BYTES_MAX))
        size = answer.get("bytes")
        while length := int.from_bytes(_exactly(stream, 4), "big"):
            while length:
                length -= file.write(_exactly(stream, min(length, BACKUP_PIECE_BYTES)))
            progress(f"{_mib(file.tell())} of {_mib(size)} are here")
        file.flush()
        os.fsync(file.fileno())


def _exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise ConnectionResetError("the stream broke off")
    return data


def _mib(count: object) -> str:
    return f"{count / 1024**2:.1f} MiB" if isinstance(count, int) else "an unknown size"


def _members_of(address: Address) -> tuple[Member, ...]:
    """The members, as the primary at ``address`` names them (none if it fails)."""
    with suppress(OSError, ValueError):
        members = ask(address, "CLUSTER").get("members")
        if isinstance(members, list):
            return tuple(
                Member(
                    *(m["node_id"], m["member_id"], m["host"], m["port"], m["voter"]),
                    snapshot=m.get("snapshot"),
                )
                for m in members
            )
    return ()


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
    """Whether one can listen there. Raises ManagerError if not for another reason."""
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


def replace_durably(temporary: Path, path: Path) -> None:
    """Give a synced file its name so that a crash leaves the old or the new one (raft-traps T7)."""
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_durably(path: Path, fields: Mapping[str, object]) -> None:
    """Replace ``path`` with a file of these fields, as JSON."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(fields, file)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    replace_durably(temporary, path)


def counted(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def ending(status: int | None) -> str:
    """How a process ended, for people; it is not known (None) of another process' child."""
    if status is None:
        return "ended"
    return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"


def _has_released(node: Node) -> bool:
    """Whether the node's ports are free, or can't be tried."""
    with suppress(ManagerError):
        return all(is_free(node.listen_host, port) for port in (node.port, node.peer_port))
    return True


# ---- Processes -----------------------------------------------------------------------------------


def start_of(process: psutil.Process) -> dict[str, object]:
    """When the process was started, for its pid file: with the pid it says which process that is.

    In clock ticks since a certain boot: the creation time, which is computed from the wall clock,
    moves when that is set. Raises psutil.NoSuchProcess. Source: proc(5), field 22 of stat.
    """
    try:
        boot_id = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        # From field 3 on: field 2, the name, may hold blanks and parentheses itself.
        fields = (PROC / str(process.pid) / "stat").read_bytes().rpartition(b")")[2].split()
        return {"boot_id": boot_id, "start_ticks": int(fields[22 - 3])}
    except OSError:
        return {"create_time": process.create_time()}  # without /proc, as on macOS


def is_of(process: psutil.Process, mark: Mapping[str, object]) -> bool:
    """Whether a pid file with these fields is of this process. Raises psutil.NoSuchProcess."""
    if isinstance(created := mark.get("create_time"), float):
        # There was no /proc; or an earlier version wrote it, which knew nothing better.
        return abs(process.create_time() - created) < CREATE_TIME_TOLERANCE_S
    return start_of(process).items() <= mark.items()


class Processes:
    """The processes of the nodes. For one thread, except ``look``."""

    def __init__(self, spawn: Spawn, clock: Callable[[], float], stop_timeout_s: float) -> None:
        self._spawn_process = spawn
        self.clock = clock
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
        write_durably(node.pid_file, {"pid": child.pid, **start_of(child), "port": node.port})
        return child.pid

    def find(self, node: Node) -> psutil.Process | None:
        """The node's process, if it runs."""
        child = self._children.get(node.node_id)
        if child is not None and child.poll() is None:
            return child
        try:
            mark = json.loads(node.pid_file.read_bytes())
            process = psutil.Process(mark["pid"])
            # The command line is empty for a process that has ended and is not reaped yet.
            is_node = is_of(process, mark) and f"--node-id={node.node_id}" in process.cmdline()
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            return None
        if not is_node:
            return None
        self._children.pop(node.node_id, None)  # that one has ended; another manager started this
        return process

    def exit_status(self, node: Node) -> int | None:
        """How the node's process ended; None if nobody knows.

        Of one that another manager has started it is known only if it left word, as it does when to
        start it again is of no use.
        """
        if child := self._children.get(node.node_id):
            status: int | None = child.poll()
            return status
        with suppress(OSError, ValueError, KeyError, TypeError):
            pid, word = (node.directory / "exit-status").read_text().split()
            if int(pid) == json.loads(node.pid_file.read_bytes())["pid"]:
                return int(word)
        return None

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
                node.bury()

    def kill(self, node: Node, process: psutil.Process) -> None:
        """SIGKILL: the node ends at once, as in a crash. Its pid file stays."""
        with suppress(psutil.NoSuchProcess):
            process.kill()
        self._await_end((node,))

    def _await_end(self, nodes: Sequence[Node]) -> None:
        # Not psutil's wait(), which waits for a zombie too: who adopted it may reap it late.
        deadline = self.clock() + self._stop_timeout_s
        while any(self.find(node) for node in nodes) and self.clock() < deadline:
            time.sleep(POLL_S / 2)
        # The kernel takes the command line of a process, by which we find it, before its sockets.
        released = self.clock() + RELEASE_S
        while not all(map(_has_released, nodes)) and self.clock() < released:
            time.sleep(POLL_S / 10)

    def look(self, node: Node) -> NodeStatus:
        """What is seen of one node. On a pool thread: touches only what belongs to ``node``."""
        seen = NodeStatus(node.node_id, node.port, learner=node.learner, problem="does not run")
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
            with suppress(OSError, ValueError, KeyError, TypeError):
                identity = node.identity()
                seen = replace(
                    seen,
                    member_id=identity.get("member_id"),
                    cluster_id=identity.get("cluster_id") or None,
                )
            why = f": {error.strerror or error}" if seen.alive else ""
            return replace(seen, problem=f"{seen.problem}{why}")
        except ValueError as error:
            return replace(seen, problem=f"does not answer on port {node.port}: {error}")


@dataclass(slots=True)
class Restarts:
    """When a node that dies is started again: at once, then after 1, 2, 4 ... 30 s.

    The pause grows while the node dies soon after it was started, so that a node that cannot run
    does not fill the disk with its log.
    """

    pause_s: float = 0.0  # before the next restart
    due: float | None = None  # clock time; None while the node runs
    started: float = 0.0
    given_up: bool = False

    def died(self, now: float) -> float:
        """The pause before the restart that is now due."""
        if now - self.started >= STABLE_S:
            self.pause_s = 0.0
        pause_s, self.pause_s = self.pause_s, min(BACKOFF_S_MAX, max(1.0, 2 * self.pause_s))
        self.due = now + pause_s
        return pause_s


# ---- The nodes of a data directory ---------------------------------------------------------------


class LocalNodes:
    """The nodes of one data directory: which there are, how they are started, how they are.

    ``base_port=None`` takes what is recorded, or free ports. Raises ConfigError if the nodes would
    refuse their settings, ManagerError if the record says something else.
    """

    def __init__(
        self,
        count: int | None,
        base_port: int | None,
        data_dir: Path,
        server_args: Sequence[str] | None,
        program: Sequence[str],
        processes: Processes,
    ) -> None:
        if count is not None and not 1 <= count <= VOTERS_MAX:
            raise ConfigError(
                f"--nodes: a cluster has 1 to {VOTERS_MAX} voters, not {count}; copies that only "
                "read can be added (--action add --learner)"
            )
        for word in server_args or ():
            if (flag := word.partition("=")[0]) in OWN_FLAGS:
                raise ConfigError(f"{flag} is given to each node by the manager: leave it out")
        self.data_dir = data_dir
        self.record_path = data_dir / RECORD_NAME
        self.processes = processes
        self._count = count
        self._base_port = base_port
        self._given_args = None if server_args is None else tuple(server_args)
        self._server_args: tuple[str, ...] = ()
        self._program = tuple(program)
        self.record: Record | None = None
        self.nodes: tuple[Node, ...] = ()
        self.load()

    def load(self) -> None:
        """Read the record (again: another manager may have changed it)."""
        self.record = Record.load(self.record_path)
        remembered = self.record.server_args if self.record else ()
        self._server_args = remembered if self._given_args is None else self._given_args
        if self.record is None:
            count = self._count or NODES_DEFAULT
            if self._base_port is None:
                self._base_port = free_ports(count)[0]
            numbers = range(1, count + 1)
            places = {f"node{n}": Place(self._base_port + n - 1) for n in numbers}
        else:
            if self._base_port is None:
                self._base_port = self.record.base_port
            self._check_record(self.record.base_port != self._base_port)
            places = dict(self.record.places)
        self.nodes = tuple(self.place(node_id, place) for node_id, place in places.items())

    def grow(self) -> None:
        """Add nodes to the record until there are as many as were asked for."""
        self._check_record(self._count is not None and self._count < len(self.nodes))
        count = self._count or 0
        while self.record is not None and len(self.nodes) < count:
            taken = {node.node_id for node in self.nodes}
            free = (f"node{number}" for number in itertools.count(1))
            self.remember(self.new_place(next(name for name in free if name not in taken)))

    def _check_record(self, differs: bool) -> None:
        if differs and self.record is not None:
            count, base_port = len(self.record.places), self.record.base_port
            raise ManagerError(
                f"{self.record_path} says that this cluster has {counted(count, 'node')} from port "
                f"{base_port} on: give --nodes {count} (or more) and --base-port {base_port}, or "
                "leave them out; --action remove makes it smaller, another --data-dir is another "
                "cluster"
            )

    def node(self, node_id: str) -> Node:
        """Raises ManagerError if there is none of that name."""
        for node in self.nodes:
            if node.node_id == node_id:
                return node
        names = ", ".join(node.node_id for node in self.nodes)
        raise ManagerError(f"there is no {node_id} here, only {names}")

    def place(self, node_id: str, place: Place) -> Node:
        """The node of that place. Raises ConfigError if a server would refuse its settings."""
        port, peer_port = place.port, place.port + PEER_PORT_OFFSET
        if peer_port > PORT_MAX:
            raise ConfigError(f"--base-port: {node_id}'s port for peers would be {peer_port}")
        given = {"node-id": node_id, "port": port, "peer-port": peer_port}
        flags = [f"--{name}={value}" for name, value in given.items()]
        settings = parse_settings([*flags, *self._server_args], os.environ)
        directory = settings.data_dir
        if not settings.in_memory:
            directory = self.data_dir / node_id
            flags.append(f"--data-dir={directory}")
        if settings.primary:
            raise ConfigError(
                "the manager says which node founds the cluster: take `primary` out of KV_PRIMARY "
                "and of the configuration file"
            )
        return Node(
            node_id=node_id,
            listen_host=settings.host,
            address=(settings.advertise_host, port),
            peer_port=peer_port,
            home=self.data_dir,
            directory=directory,
            in_memory=settings.in_memory,
            flags=tuple(flags),
            learner=place.learner,
        )

    def new_place(self, node_id: str, *, learner: bool = False) -> Node:
        """A node on the next free port after the base port."""
        assert self._base_port is not None
        taken = {node.port for node in self.nodes}
        for port in itertools.count(self._base_port):
            if port not in taken:
                node = self.place(node_id, Place(port, learner))
                if all(is_free(node.listen_host, each) for each in (port, node.peer_port)):
                    return node
        raise AssertionError("place() refuses ports that are too high")

    def remember(self, node: Node) -> None:
        """Add the node to the record, or put it in place of the one of that name."""
        self._save({**self._places(), node.node_id: Place(node.port, node.learner)})

    def forget(self, node: Node, why: str) -> Path | None:
        """Take the node off the record; where its directory, which is kept, is now."""
        node.bury()
        aside = node.set_aside(why)
        self._save({name: at for name, at in self._places().items() if name != node.node_id})
        return aside

    def set_all_aside(self) -> Path | None:
        """Move the record and all directories away; where they are now, if there were any.

        The record goes last: until then ``start`` says that directories are missing.
        """
        for node in self.nodes:
            node.bury()
        paths = (*(node.directory for node in self.nodes), self.record_path)
        there = [path for path in paths if path.exists()]
        self.record = None
        if not there:
            return None
        aside = _unused(self.data_dir / "before-restore")
        aside.mkdir()
        for path in there:
            path.rename(aside / path.name)
        return aside

    def founded(self, cluster_id: str) -> None:
        """Record that these nodes belong to that cluster."""
        assert self._base_port is not None
        record = Record(cluster_id, self._base_port, self._places(), self._server_args)
        if record != self.record:
            record.save(self.record_path)
            self.record = record

    def _places(self) -> dict[str, Place]:
        return {node.node_id: Place(node.port, node.learner) for node in self.nodes}

    def _save(self, places: Mapping[str, Place]) -> None:
        assert self.record is not None
        self._count = None  # what was asked for at the beginning no longer counts
        in_order = dict(sorted(places.items(), key=lambda item: item[1].port))
        self.record = replace(self.record, places=in_order, server_args=self._server_args)
        self.record.save(self.record_path)
        self.nodes = tuple(self.place(node_id, place) for node_id, place in in_order.items())

    def spawn(self, node: Node, *, founds: bool = False, restore_from: Path | None = None) -> int:
        """Start the node's process; its pid. Who founds the cluster may begin with a backup."""
        # A single node is told of itself: without --join it would look for a cluster on 6379.
        others = [other for other in self.nodes if other != node] or [node]
        join = ",".join(format_address(other.address) for other in others)
        command = [*self._program, *node.flags, f"--join={join}", *self._server_args]
        command += ["--learner"] if node.learner else []
        command += ["--primary"] if founds else []
        command += [f"--restore-from={restore_from.resolve()}"] if restore_from else []
        if self.record is not None and self.record.server_args != self._server_args:
            self._save(self._places())  # the next start, by whomever, is to be like this one
        return self.processes.start(node, command)

    def status(self) -> ClusterStatus:
        """The cluster as it is now; it takes no longer than one slow answer."""
        with ThreadPoolExecutor(len(self.nodes), thread_name_prefix="ask") as pool:
            seen = list(pool.map(self.processes.look, self.nodes))
        primary = _primary(seen, self.record.cluster_id if self.record else None)
        members = _members_of(self.node(primary.node_id).reached_at) if primary else ()
        return summarize(seen, primary, members)

    @contextmanager
    def exclusively(self, wait_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
        """Hold the lock of the data directory, with the record as it is now.

        Raises ClusterBusyError if another holds it for ``wait_s``.
        """
        deadline = self.processes.clock() + wait_s
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with (self.data_dir / "cluster.lock").open("a") as file:
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if self.processes.clock() >= deadline:
                    raise ClusterBusyError(
                        f"another cluster_manager starts or stops nodes in {self.data_dir}; "
                        "wait until it is done"
                    )
                time.sleep(POLL_S / 2)
            self.load()
            yield
