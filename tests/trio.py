"""Nodes in one process, each with its threads, sockets and disk, whose links a test may cut.

A node dies by ``stop`` (its ports refuse, which is evidence) and is cut off by a ``Network`` that
swallows its messages (its links stay up and silent, which is none).
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from cluster_nodes import free_ports
from kv_commands import encode_payload
from kv_config import PEER_PORT_OFFSET
from kv_errors import (
    KVError,
)
from kv_store import KeyValueStore
from kv_types import Reply
from raft_node import RaftNode
from raft_snapshots import snapshot_of
from raft_status import NodeConfig, NodeStatus
from raft_transport import PeerHandler, PeerListener
from raft_types import (
    Entry,
    EntryKind,
    HardState,
    Identity,
    Member,
    MemberId,
    Membership,
    Message,
    new_id,
)
from replication_log import ReplicationLog
from state_db import StateDb

T = TypeVar("T")

PATIENCE_S = 20.0
# Three missed heartbeats and more, so that a busy machine causes no election by itself.
QUICK = NodeConfig(0.2, 0.8, 1.2)
PORTS = 20  # more than the tests of one trio place


def eventually(condition: Callable[[], T | None], what: str, within_s: float = PATIENCE_S) -> T:
    """The first true value of ``condition``."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(0.005)
    return value


def in_thread(call: Callable[[], T]) -> Future[T]:
    """Call it on a thread of its own."""
    with_result: Future[T] = Future()

    def run() -> None:
        try:
            with_result.set_result(call())
        except KVError as error:
            with_result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return with_result


def command(*argv: str, now_ms: int = 1) -> bytes:
    """The payload of a command's log entry."""
    return encode_payload(now_ms, [word.encode() for word in argv])


class Network:
    """Which messages arrive. Connections stay up whatever is cut."""

    def __init__(self) -> None:
        self.cut_off: set[MemberId] = set()


class Valve:
    """Stands before a node and swallows what the network does not let through."""

    def __init__(self, handler: PeerHandler, network: Network) -> None:
        self._handler = handler
        self._network = network
        self.on_connected = handler.on_connected
        self.on_disconnected = handler.on_disconnected

    @property
    def identity(self) -> Identity:
        return self._handler.identity

    def on_messages(self, messages: Sequence[Message]) -> None:
        cut_off = self._network.cut_off
        passing = [m for m in messages if m.sender not in cut_off and m.to not in cut_off]
        if passing:
            self._handler.on_messages(passing)


class ValveListener(PeerListener):
    """A listener whose node hears only what the network lets through."""

    def __init__(self, network: Network, port: int, boot_id: str, *, lease_reads: bool) -> None:
        super().__init__(
            "127.0.0.1", port, boot_id=boot_id, lease_reads=lease_reads, on_fatal=_no_fatal
        )
        self._network = network

    def start(self, handler: PeerHandler) -> None:
        super().start(Valve(handler, self._network))


def _no_fatal(error: BaseException) -> None:
    raise AssertionError("a thread of the listener died") from error


class SuspectStore(KeyValueStore):
    """Once ``is_wrong``, it no longer does what the log says, as if its memory were broken."""

    def __init__(self) -> None:
        super().__init__()
        self.is_wrong = False
        self.failure: Exception | None = None

    def apply(self, index: int, data: bytes) -> Reply:
        if self.failure is not None:
            raise self.failure
        return super().apply(index, command("SET", "k", "wrong") if self.is_wrong else data)


class Server:
    """One node with its parts; what ``kv_store_server.Server`` wires, without the clients."""

    def __init__(self, trio: Trio, member: Member, config: NodeConfig) -> None:
        self.member = member
        self.trio = trio
        self.config = config
        self.fatal: list[BaseException] = []
        self.step_downs = 0
        self.upkeep: list[bytes] = []
        self.is_up = False

    def start(self) -> RaftNode:
        """Start it, from its disk if it ran before."""
        self.boot_id = new_id()
        directory = self.trio.directory / self.member.node_id
        self.disk = ReplicationLog(directory)
        self.state = StateDb(directory)
        header, loaded = self.state.load()
        self.store = SuspectStore()
        self.store.adopt(loaded)
        identity = Identity(self.trio.cluster_id, self.member.member_id, self.member.node_id)
        if self.disk.identity is None:
            self.disk.save_identity(identity)
        self.node = RaftNode(
            self.config,
            identity,
            self.disk,
            self.state,
            self.store,
            snapshot_of(header),
            ValveListener(
                self.trio.network,
                self.member.peer_port,
                self.boot_id,
                lease_reads=self.config.lease_reads,
            ),
            address=(self.member.host, self.member.peer_port),
            boot_id=self.boot_id,
            on_step_down=self._on_step_down,
            on_fatal=self.fatal.append,
            upkeep=self._upkeep,
        )
        self.node.start()
        self.is_up = True
        return self.node

    def stop(self) -> None:
        """End it; to its peers its process has died."""
        if self.is_up:
            self.is_up = False
            self.node.stop()
            self.state.close()
            self.disk.close()

    def _on_step_down(self) -> None:
        self.step_downs += 1

    def _upkeep(self) -> Sequence[bytes]:
        due, self.upkeep = self.upkeep, []
        return due

    @property
    def status(self) -> NodeStatus:
        return self.node.status()

    def set(self, key: str, value: str) -> int:
        """Write through this node; the index."""
        done = self.node.propose([command("SET", key, value)])
        assert done.replies == ["OK"]
        return done.first

    def get(self, key: str) -> Reply:
        """Read through this node."""
        self.node.read_barrier()
        return self.holds(key)

    def holds(self, key: str) -> Reply:
        """What its store holds, as it stands."""
        with self.node.store_lock:
            return self.store.read([b"GET", key.encode()], now_ms=1)


class Trio:
    """Voters in one process, with a cluster of their own."""

    def __init__(self, directory: Path, config: NodeConfig, count: int = 3) -> None:
        self.directory = directory
        self.network = Network()
        self.cluster_id = new_id()
        # Not of those that the system gives to outgoing connections: until a node listens, it is free.
        self._ports = iter(free_ports(PORTS))
        members = [self.place(f"n{number}", voter=True) for number in range(1, count + 1)]
        founding = Entry(1, 1, EntryKind.MEMBERSHIP, Membership(tuple(members)).encode())
        for member in members:
            disk = ReplicationLog(directory / member.node_id)
            disk.save_identity(Identity(self.cluster_id, member.member_id, member.node_id))
            disk.append(HardState(1, None), [founding])
            disk.close()
        self.servers = [Server(self, member, config) for member in members]

    def place(self, node_id: str, *, voter: bool = False) -> Member:
        """A member on ports of its own."""
        port = next(self._ports)
        return Member(new_id(), node_id, "127.0.0.1", port, port + PEER_PORT_OFFSET, voter)

    def move(self, server: Server) -> Server:
        """Stop it; it will start at another address."""
        server.stop()
        place = self.place("elsewhere")
        server.member = server.member._replace(port=place.port, peer_port=place.peer_port)
        return server

    def start(self) -> Trio:
        for server in self.servers:
            server.start()
        return self

    def stop(self) -> None:
        for server in self.servers:
            server.stop()

    def leader(self, among: Sequence[Server] = (), within_s: float = PATIENCE_S) -> Server:
        """The one that leads, has committed in its term, and is followed by all that run.

        Without the last a candidate of the start, in a later term already, could yet depose it.
        """

        def leads() -> Server | None:
            running = [server for server in among or self.servers if server.is_up]
            for server in running:
                if server.node.is_primary:
                    try:
                        server.node.read_barrier()
                    except KVError:
                        continue
                    followed = [other.node.status().primary for other in running]
                    if all(primary == server.node.status().primary for primary in followed):
                        return server
            return None

        return eventually(leads, "one leads", within_s)

    def others(self, server: Server) -> list[Server]:
        return [other for other in self.servers if other is not server]

    def isolate(self, server: Server) -> float:
        """Cut it off, silently; the time of that."""
        self.network.cut_off.add(server.member.member_id)
        return time.monotonic()

    def heal(self) -> None:
        self.network.cut_off.clear()

    def await_applied(self, index: int, servers: Sequence[Server] = ()) -> None:
        """Wait until these (default: all that run) have applied ``index``."""
        for server in servers or self.servers:
            if server.is_up:
                eventually(
                    functools.partial(_has_applied, server, index),
                    f"{server.member.node_id} has applied {index}",
                )


def _has_applied(server: Server, index: int) -> bool:
    return server.status.applied_index >= index
