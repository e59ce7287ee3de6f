"""The daemon: one process of the cluster, one thread for each client connection.

    python kv_store_server.py --primary                     # found a cluster, work at once, alone
    python kv_store_server.py --node-id node2 --port 6380   # join it

Rule 1: nothing is served before this node belongs to a cluster: founded here (once, and only with
``--primary`` on an empty data directory), joined through ``--join``, or found on its own disk.
Rule 2: clients and peers have their own ports and threads, so that no crowd of clients can starve
the heartbeats (raft-traps T67).
Rule 3: a bug ends the process loudly; a client's mistake ends at most its own connection.

Exit status: 0 stopped by a signal, 1 a fault (it may be started again), 2 wrong settings, 78 its
data or its name are not right here (starting it again can't help), 79 it was removed from the
cluster.

Threads: ``main`` waits for signals, ``accept-clients`` accepts, ``read-clients`` reads what is
answered at once, ``client-N`` serves one connection where that takes longer, ``log-writer`` writes
what all others log. The rest are of ``raft_node.py``. Read on in ``kv_session.py``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import json
import logging
import os
import resource
import select
import shutil
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import kv_commands
import kv_members
from kv_config import (
    EXIT_CONFIG,
    EXIT_REMOVED,
    Address,
    ConfigError,
    Settings,
    parse_settings,
)
from kv_errors import KVError
from kv_session import Batch, Service, Session
from kv_store import KeyValueStore, purge_request
from raft_node import RaftNode
from raft_snapshots import fit_log, found_cluster, restore_backup, snapshot_of
from raft_status import NodeConfig, NodeRole
from raft_transport import (
    PeerListener,
    PeerPortError,
    Receiver,
    send_without_waiting,
)
from raft_types import Identity, Member, new_id
from raft_types import Member as NodeInfo
from replication_log import ReplicationLog
from replication_log_format import DISK_FAULTS, DataDirError
from state_db import StateDb, StateDbError

__all__ = ["KeyValueStore", "NodeInfo", "NodeRole", "ReplicationLog", "TCPServer", "main"]

log = logging.getLogger(__name__)

EXIT_FAULT = 1
RECEIVE_BYTES = 64 * 1024
READY_MAX = 256  # connections that become one batch
STUCK_S = 1.0
# A request that has begun must go on within this, and a reply be read: else the thread is free.
STALL_S = 60
ACCEPT_PAUSE_S = 0.1
LINGER_S = 10.0
# Open files that are kept for the log, the state and the peers.
FILES_RESERVED = 128
JOIN_INTERVAL_S = 0.5
WATCH_INTERVAL_S = 0.5
JOIN_TIMEOUT_S = 5.0
PURGE_KEYS_MAX = 500
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOG_RECORDS_MAX = 1000  # that wait for log-writer, behind as many that it has taken
LOG_FLUSH_S = 1.0


class StartError(Exception):
    """The node can't start, and trying again would not help; the text says what to do."""


CANT_START = (StartError, DataDirError, StateDbError, PeerPortError)


# ---- Clients -----------------------------------------------------------------------------------


class ClientHandler(socketserver.BaseRequestHandler):
    """One connection, on its thread ``client-N``, which sleeps while ``read-clients`` can serve it.

    The thread is there for all that may take long: a request that arrives in pieces, a reader that
    is slow, a command that is not short, a time without a primary.
    """

    server: TCPServer  # type: ignore[mutable-override]  # that is who makes it
    request: socket.socket

    def handle(self) -> None:
        """Answer until the client leaves or is cut off."""
        sock = self.request
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _set_stall(sock, socket.SO_SNDTIMEO, STALL_S)
        host, port = self.client_address[:2]
        self.session = session = Session(
            self.server.service,
            f"{host}:{port}",
            deliver=self._deliver,
            stop_reading=lambda: _stop_reading(sock),
            is_gone=lambda: _is_gone(sock),
        )
        self.fd = sock.fileno()
        # Released by ``read-clients`` when this thread is to go on.
        self._turn = threading.Lock()
        self._turn.acquire()
        self._at_end = False
        self._failure: Exception | None = None
        try:
            self._serve(sock, session)
            if session.parser.broken:
                _close_gently(sock)
        except (ConnectionError, BlockingIOError):
            pass  # it went away, or stood still for STALL_S
        finally:
            session.wait()
            self.server.service.sessions.pop(session.id, None)
            del self.session  # the two refer to each other: its memory is to go with the connection

    def _serve(self, sock: socket.socket, session: Session) -> None:
        while not (session.closing or self._at_end):
            self.server.reader.watch(self)
            self._turn.acquire()
            if self._failure is not None:
                raise self._failure
            self._answer(sock, session)
            if session.parser.has_partial and not (session.closing or self._at_end):
                _set_stall(sock, socket.SO_RCVTIMEO, STALL_S)
                while session.parser.has_partial and not (session.closing or self._at_end):
                    data = sock.recv(RECEIVE_BYTES)
                    self._at_end = not data
                    session.receive(data)
                    self._answer(sock, session)

    def _answer(self, sock: socket.socket, session: Session) -> None:
        for replies in session.answer():
            sock.sendall(replies)

    def take_in(self, receiver: Receiver, batch: Batch) -> bool:
        """Called by ``read-clients``: read what is there, and let ``batch`` see to it if it can."""
        try:
            data = receiver.receive(self.request)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if not data:
            self._at_end = True
            return False
        self.session.receive(data)
        return self.session.hand_over(batch)

    def resume(self, failure: Exception | None = None) -> None:
        """Called by ``read-clients``: let the connection's own thread go on."""
        self._failure = failure
        self._turn.release()

    def _deliver(
        self, replies: bytes, more: Iterable[bytes] | None, sent: Callable[[], None]
    ) -> None:
        """Send from a thread that others depend on: a client that does not read can't hold it."""
        try:
            count = send_without_waiting(self.request, replies)
        except BlockingIOError:
            count = 0
        except OSError:
            count, more = len(replies), None  # it is gone, which its own thread will see
        if count == len(replies) and more is None:
            sent()
            return
        slow = threading.Thread(
            target=self._deliver_slowly,
            args=(replies[count:], more or (), sent),
            name="client-slow",
            daemon=True,
        )
        try:
            slow.start()
        except RuntimeError:  # no more threads
            self._cut_off()
            sent()

    def _deliver_slowly(
        self, replies: bytes, more: Iterable[bytes], sent: Callable[[], None]
    ) -> None:
        try:
            self.request.sendall(replies)
            for replies in more:
                self.request.sendall(replies)
        except OSError:
            self._cut_off()  # it stood still for STALL_S
        finally:
            sent()

    def _cut_off(self) -> None:
        """A reply was left out, which would garble all that follow."""
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_RDWR)


def _set_stall(sock: socket.socket, option: int, seconds: int) -> None:
    """Bound one send or receive by the kernel, which costs nothing while it isn't reached."""
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, 0))


def _stop_reading(sock: socket.socket) -> None:
    # What has arrived is still read and answered; then the client's thread sees the end.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RD)


def _is_gone(sock: socket.socket) -> bool:
    """Whether the other side will send no more, though what it sent may be unread."""
    watch = select.poll()
    watch.register(sock, select.POLLRDHUP)
    return bool(watch.poll(0))


def _close_gently(sock: socket.socket) -> None:
    """Let the client read the error before the reset that closing on unread bytes would send."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        return  # it went away by a reset of its own: ENOTCONN, which is no ConnectionError
    _set_stall(sock, socket.SO_RCVTIMEO, 1)
    # A client that still sends what is too large reads the answer only when it is done.
    until_s = time.monotonic() + LINGER_S
    while time.monotonic() < until_s and sock.recv(RECEIVE_BYTES):
        pass


class ClientReader:
    """The thread ``read-clients``: reads for all connections whose own thread need not.

    With many clients, each waking up for its own request would cost more than the requests. And
    what all of them ask at once becomes one batch (docs/adr/0007).
    """

    def __init__(self, service: Service, on_fatal: Callable[[BaseException], None]) -> None:
        self._service = service
        self._on_fatal = on_fatal
        self._epoll = select.epoll()
        # Held by who reads; not while what was read is proposed, which may take as long as a disk.
        self._reading = threading.Lock()
        self._watched: dict[int, ClientHandler] = {}
        # The thread in charge is the newest; an older one ends as soon as its disk lets it.
        self._newest = 0
        self._busy_since_s: float | None = None

    def start(self) -> None:
        """Begin to read."""
        self._newest += 1
        self._busy_since_s = None
        threading.Thread(
            target=self._run, args=(self._newest,), name="read-clients", daemon=True
        ).start()

    def watch(self, handler: ClientHandler) -> None:
        """Read for this connection until its ``resume`` is called. From its own thread."""
        with self._reading:
            self._watched[handler.fd] = handler
            self._epoll.register(handler.fd, select.EPOLLIN)

    def replace_if_stuck(self) -> None:
        """Who writes to the log may be held up by a disk; the clients must not be."""
        since_s = self._busy_since_s
        if since_s is not None and time.monotonic() - since_s > STUCK_S:
            log.warning("read-clients has been busy for %g s: another one takes over", STUCK_S)
            try:
                self.start()
            except RuntimeError as error:
                # No thread is left: the stuck one stays in charge. Should it have gone just now, for
                # a newer one seemed to be there, the next try after STUCK_S makes up for it.
                self._newest -= 1
                self._busy_since_s = time.monotonic()
                log.warning("no other read-clients: %s", error)

    def _run(self, number: int) -> None:
        receiver = Receiver(RECEIVE_BYTES)
        try:
            while number == self._newest:
                events = self._epoll.poll(maxevents=READY_MAX)
                self._busy_since_s = time.monotonic()
                self._read(events, receiver)
                if number == self._newest:
                    self._busy_since_s = None
        except BaseException as error:
            self._on_fatal(error)
            raise

    def _read(self, events: Sequence[tuple[int, int]], receiver: Receiver) -> None:
        batch = Batch(self._service.node)
        handlers: dict[Session, ClientHandler] = {}
        with self._reading:
            for fd, _ in events:
                handler = self._watched.get(fd)
                if handler is None:
                    continue  # a thread that was stuck has let it go meanwhile
                failure = None
                try:
                    if handler.take_in(receiver, batch):
                        handlers[handler.session] = handler
                        continue
                except Exception as error:  # noqa: BLE001  # a bug, which ends this connection only
                    failure = error
                self._let_go(handler, failure)
        for session in batch.start():
            with self._reading:
                if self._watched.get(handlers[session].fd) is handlers[session]:
                    self._let_go(handlers[session])

    def _let_go(self, handler: ClientHandler, failure: Exception | None = None) -> None:
        self._epoll.unregister(handler.fd)
        del self._watched[handler.fd]
        handler.resume(failure)


class TCPServer(socketserver.ThreadingTCPServer):
    """Accepts clients, a thread each, up to ``--max-clients``."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(self, host: str, port: int) -> None:
        """Bind, so that a port in use is known at once; ``serve`` begins to listen."""
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), ClientHandler, bind_and_activate=False)
        self.service: Service  # these two are set by ``serve``
        self.reader: ClientReader
        try:
            self.server_bind()
        except OSError as error:
            self.server_close()
            what = "give --host an address of this host"
            if error.errno == errno.EADDRINUSE:
                what = "stop what uses the port, or choose another with --port"
            raise StartError(f"can't listen on {host}:{port}: {error.strerror}; {what}") from error

    def serve(self, service: Service, on_fatal: Callable[[BaseException], None]) -> None:
        """Listen, and accept on the thread ``accept-clients``."""
        self.service = service
        self.reader = ClientReader(service, on_fatal)
        self.reader.start()
        self.server_activate()
        threading.Thread(
            target=self._accept, args=(on_fatal,), name="accept-clients", daemon=True
        ).start()

    def _accept(self, on_fatal: Callable[[BaseException], None]) -> None:
        try:
            self.serve_forever(0.05)
        except BaseException as error:
            on_fatal(error)
            raise

    def get_request(self) -> tuple[socket.socket, object]:
        """Accept. Where the system has no more files, let it rest: the client waits meanwhile."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                log.warning("can't accept a client: %s", error.strerror)
                time.sleep(ACCEPT_PAUSE_S)
            raise  # which socketserver takes for no client

    def process_request(self, request: object, client_address: object) -> None:
        """A new connection: its own thread, or a refusal."""
        assert isinstance(request, socket.socket)
        if len(self.service.sessions) >= self.service.settings.max_clients:
            self._refuse(request, b"-ERR max number of clients reached\r\n")
            return
        thread = threading.Thread(
            target=self.process_request_thread,
            args=(request, client_address),
            name=f"client-{self.service.connections_count + 1}",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError as error:
            log.warning("client refused client=%s: %s", client_address, error)
            self._refuse(request, b"-ERR the server has no thread left for another client\r\n")

    def _refuse(self, request: socket.socket, reply: bytes) -> None:
        with contextlib.suppress(OSError):
            request.sendall(reply)
        self.shutdown_request(request)

    def service_actions(self) -> None:
        """Called by ``accept-clients`` between two looks for new connections."""
        self.reader.replace_if_stuck()

    def handle_error(self, request: object, client_address: object) -> None:
        """A bug in a session ends that connection; say so, with the traceback."""
        log.error("client connection failed client=%s", client_address, exc_info=sys.exception())

    def close_clients(self) -> None:
        """Let every client find the new primary: answer what has arrived, then close."""
        for session in list(self.service.sessions.values()):
            session.stop_reading()


# ---- Belonging to a cluster --------------------------------------------------------------------


def open_identity(disk: ReplicationLog, node_id: str) -> Identity:
    """Who this data directory is; an empty one becomes a new member (raft-traps T12)."""
    if disk.identity is None:
        disk.save_identity(Identity("", new_id(), node_id))
    identity = disk.identity
    assert identity is not None
    if identity.node_id != node_id:
        raise StartError(
            f"the data directory belongs to {identity.node_id}, not to {node_id}: give "
            f"--node-id {identity.node_id}, or another --data-dir"
        )
    return identity


def enter_cluster(
    disk: ReplicationLog, state: StateDb, me: Member, settings: Settings, boot_id: str
) -> Identity:
    """Found a cluster or join one, on the first start; returns the identity, now complete.

    The cluster id is saved last. So a log with entries but no cluster id is a founding that was
    interrupted, which nobody else has heard of yet: it is finished.
    """
    if settings.restore_from is not None:
        header = restore_backup(settings.restore_from, disk, state)
        log.info("restored path=%s keys=%d", settings.restore_from, header.keys)
        found_cluster(disk, me._replace(voter=True))
        cluster_id = new_id()
    elif disk.first_index > 1 or state.saved_index() > 0:
        raise StartError("restoring a backup was interrupted here: give --restore-from once more")
    elif disk.last_index == 0:
        cluster_id = join_cluster(me, settings, boot_id)
        if not cluster_id:
            found_cluster(disk, me._replace(voter=True))
            cluster_id = new_id()
            log.info("founded cluster=%s", cluster_id)
    else:
        cluster_id = new_id()
    identity = Identity(cluster_id, me.member_id, me.node_id)
    disk.save_identity(identity)
    return identity


def forget(directory: Path) -> None:
    """Remove what an earlier process has left in memory, unless that still lives."""
    with contextlib.suppress(FileNotFoundError), (directory / "lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # opening the log will say so
        shutil.rmtree(directory)


def join_cluster(me: Member, settings: Settings, boot_id: str) -> str:
    """The id of the cluster that has taken us as a member; "": there is none, found one.

    Waits until one is reached, unless ``--primary`` says to found one where there is none.
    Raises StartError if it does not want us.
    """
    said = ""
    while True:
        reached = False
        for address in settings.join:
            answer = _ask_to_join(address, me, boot_id)
            if answer is None:
                continue
            reached = True
            if answer.get("status") == "OK":
                log.info("joined cluster=%s through=%s:%d", answer["cluster_id"], *address)
                return str(answer["cluster_id"])
            if answer.get("code") == "BAD_REQUEST":
                raise StartError(
                    f"{address[0]}:{address[1]} refuses this node: {answer['message']}"
                )
            said = _say_once(said, f"waiting to join: {answer.get('message')}")
        if not reached and settings.primary:
            return ""
        if not reached:
            places = ", ".join(f"{host}:{port}" for host, port in settings.join)
            text = f"waiting for a cluster at {places} (one founds it with --primary)"
            said = _say_once(said, text)
        # Not sigtimedwait: one that a SIGSTOP outlasts returns as if a signal had come.
        time.sleep(JOIN_INTERVAL_S)
        if signal.sigpending() & set(STOP_SIGNALS):
            raise SystemExit(0)  # there is nothing to stop yet


def _say_once(said: str, text: str) -> str:
    if text != said:
        log.info("%s", text)
    return text


def _ask_to_join(
    address: Address, me: Member, boot_id: str, *, redirects: int = 3
) -> dict[str, object] | None:
    """What a node answers to MEMBER JOIN, following it to the primary; None: no node is there."""
    learner = " LEARNER" if me.stays_learner else ""
    who = f"{me.node_id} {me.member_id} {me.host} {me.port} {me.peer_port} {boot_id}"
    answer = _ask(address, f"MEMBER JOIN {who}{learner}")
    if answer is None:
        return None
    primary = answer.get("primary")
    if answer.get("code") == "NOT_PRIMARY" and isinstance(primary, dict) and redirects:
        next_address = (str(primary["host"]), int(primary["port"]))
        return _ask_to_join(next_address, me, boot_id, redirects=redirects - 1) or answer
    return answer


def _ask(address: Address, line: str) -> dict[str, object] | None:
    """What a node answers to a line; None: no node is there."""
    try:
        with socket.create_connection(address, timeout=JOIN_TIMEOUT_S) as sock:
            sock.sendall(line.encode() + b"\n")
            with sock.makefile("rb") as lines:
                answer = json.loads(lines.readline(64 * 1024))
    except (OSError, ValueError) as error:
        log.debug("no answer from=%s:%d error=%s", *address, error)
        return None
    return answer if isinstance(answer, dict) else None


# ---- The process -------------------------------------------------------------------------------


class Server:
    """Everything of one node, wired together."""

    def __init__(self, settings: Settings) -> None:
        """Open the disk and the ports. Raises one of CANT_START, or OSError."""
        self.settings = settings
        self._boot_id = new_id()
        self._exit_status = 0
        if settings.in_memory:
            forget(settings.data_dir)
        self._disk = self._open_disk()
        self._state = StateDb(settings.data_dir, fsync=settings.fsync == "always")
        identity = open_identity(self._disk, settings.node_id)
        self._clients = TCPServer(settings.host, settings.port)
        self._listener = PeerListener(
            settings.host,
            settings.peer_port,
            boot_id=self._boot_id,
            lease_reads=settings.read_mode == "lease",
            on_fatal=self._die,
        )
        if not identity.cluster_id:
            me = Member(
                member_id=identity.member_id,
                node_id=settings.node_id,
                host=settings.advertise_host,
                port=settings.port,
                peer_port=settings.peer_port,
                voter=False,
                stays_learner=settings.learner,
            )
            identity = enter_cluster(self._disk, self._state, me, settings, self._boot_id)
            self._reopen_disk()
        header, self.store = self._state.load()
        snapshot = snapshot_of(header)
        if fit_log(self._disk, snapshot):
            self._reopen_disk()
        self.node = RaftNode(
            _node_config(settings),
            identity,
            self._disk,
            self._state,
            self.store,
            snapshot,
            self._listener,
            address=(settings.advertise_host, settings.peer_port),
            boot_id=self._boot_id,
            on_step_down=self._clients.close_clients,
            on_fatal=self._die,
            upkeep=self._purge_expired,
        )
        self.service = Service(settings, self.node, self.store)

    def _open_disk(self) -> ReplicationLog:
        return ReplicationLog(
            self.settings.data_dir,
            fsync=self.settings.fsync == "always",
            segment_bytes_max=self.settings.log_bytes_max // 8,
            tail_bytes_max=self.settings.log_bytes_max // 4,
        )

    def _reopen_disk(self) -> None:
        self._disk.close()
        self._disk = self._open_disk()

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit status."""
        self._clients.service = self.service
        self.node.start()
        self._clients.serve(self.service, self._die)
        # What was loaded stays: the collector need not look at it again and again.
        gc.freeze()
        log.info(
            "serving clients=%s:%d peers=%d node=%s member=%s",
            self.settings.host,
            self.settings.port,
            self.settings.peer_port,
            self.node.identity.node_id,
            self.node.identity.member_id,
        )
        threading.Thread(target=self._watch, name="node-watch", daemon=True).start()
        signal.sigwait(STOP_SIGNALS)
        log.info("stopping")
        with contextlib.suppress(KVError):
            # Its clients then wait for a moment instead of for an election.
            self.node.hand_over(None)
        self._clients.shutdown()
        self._clients.server_close()
        self.node.stop()
        self._clients.close_clients()
        self._state.close()
        self._disk.close()
        return self._exit_status

    def _watch(self) -> None:
        """Thread node-watch: what nobody is told of, and so has to be looked for."""
        try:
            heard_s = time.monotonic()
            unremoved_s = heard_s
            said = ""
            while not self._exit_status:
                time.sleep(WATCH_INTERVAL_S)
                said = self._watch_memory(said)
                me = self.node.membership.get(self.node.identity.member_id)
                if me is not None and not self._is_at(me):
                    self._tell_new_address(me)
                # Who was removed, and starts from a state of later, hears a primary now and then.
                if self.node.has_primary and me is not None:
                    heard_s = unremoved_s = time.monotonic()
                timeout_s = self.settings.election_timeout_max_s
                if time.monotonic() - heard_s > timeout_s:
                    self._look_for_others()
                if time.monotonic() - heard_s < 2 * timeout_s or not self._is_said_to_be_removed():
                    unremoved_s = time.monotonic()
                # Who says so may be about to lose the leadership, and with it what it says.
                if self.node.is_removed or time.monotonic() - unremoved_s > timeout_s:
                    log.error("this node was removed from the cluster: it ends")
                    self._end(EXIT_REMOVED)
        except BaseException as error:
            self._die(error)
            raise

    def _watch_memory(self, said: str) -> str:
        trouble = kv_members.memory_trouble(self.store, self.settings.memory_bytes_max)
        if bool(trouble) != bool(said):
            log.warning("%s", trouble or "the data takes less than 80 % of --max-memory again")
        return trouble

    def _is_at(self, me: Member) -> bool:
        """Whether the cluster knows where this node is now."""
        here = self.settings
        return (me.host, me.port, me.peer_port) == (
            here.advertise_host,
            here.port,
            here.peer_port,
        )

    def _tell_new_address(self, me: Member) -> None:
        """Have the cluster know where this node is now; tried again until it does."""
        here = self.settings
        moved = me._replace(host=here.advertise_host, port=here.port, peer_port=here.peer_port)
        if self.node.is_primary:  # whom the others would only send back to itself, as it was
            with contextlib.suppress(KVError):
                kv_members.move(self.node, moved)
            return
        for member in self.node.membership.members:
            if member.member_id != me.member_id:
                answer = _ask_to_join((member.host, member.port), moved, self._boot_id) or {}
                if answer.get("status") == "OK":
                    log.info("the cluster knows the new address of this node")
                    return
                if answer.get("code") == "BAD_REQUEST":
                    log.error("this node ends: %s", answer.get("message"))
                    self._end(EXIT_CONFIG)
                    return

    def _look_for_others(self) -> None:
        """All may have moved: then no address that the log knows is right, but --join may be."""
        identity = self.node.identity
        for address in self.settings.join:
            answer = _ask(address, "STATUS") or {}
            known = self.node.membership.get(str(answer.get("member_id")))
            if known is None or known.member_id == identity.member_id:
                continue
            if answer.get("cluster_id") == identity.cluster_id:
                port, peer_port = int(str(answer["port"])), int(str(answer["peer_port"]))
                host = str(answer["host"])
                self.node.meet(known._replace(host=host, port=port, peer_port=peer_port))

    def _is_said_to_be_removed(self) -> bool:
        """Whether a primary says so: who was down when it was removed never hears of it by Raft."""
        identity = self.node.identity
        for member in self.node.membership.members:
            answer = _ask((member.host, member.port), "CLUSTER")
            if answer is not None and isinstance(primary := answer.get("primary"), dict):
                # Which may have joined since: then this node does not know it by itself.
                answer = _ask((primary["host"], primary["port"]), "CLUSTER")
            if (
                answer is not None
                and answer.get("cluster_id") == identity.cluster_id
                and answer.get("role") == NodeRole.PRIMARY
                and isinstance(members := answer.get("members"), list)
            ):
                return all(m["member_id"] != identity.member_id for m in members)
        return False

    def _end(self, exit_status: int) -> None:
        self._exit_status = exit_status
        os.kill(os.getpid(), signal.SIGTERM)  # which main waits for

    def _die(self, error: BaseException) -> None:
        """A thread has died. Nothing that this process says can be trusted now: end it at once."""
        if isinstance(error, OSError) and error.errno in (*DISK_FAULTS, errno.EIO):
            log.critical("the process ends: %s", _explained(error, self.settings.data_dir))
        else:
            log.critical("the process ends: a thread died of %r", error, exc_info=error)
        logging.shutdown()
        os._exit(EXIT_FAULT)

    def _purge_expired(self) -> Sequence[bytes]:
        now_ms = self.service.now_ms()
        pairs = self.store.due(now_ms, PURGE_KEYS_MAX)
        if not pairs:
            return ()
        return [kv_commands.encode_payload(now_ms, purge_request(pairs))]


def _explained(error: OSError, data_dir: Path) -> str:
    """An error with what to do, if the disk can take nothing, or is broken."""
    if error.errno == errno.EIO:
        return (
            f"the disk has failed ({data_dir}): start the node again, and if it fails once more, "
            f"replace the disk; by the same command it comes back as a new member ({error})"
        )
    why = DISK_FAULTS.get(error.errno or 0)
    if why is None:
        return str(error)
    return f"{why} ({data_dir}): make room, or mend it, and start the node again ({error})"


def _node_config(settings: Settings) -> NodeConfig:
    return NodeConfig(
        heartbeat_interval_s=settings.heartbeat_interval_s,
        election_timeout_min_s=settings.election_timeout_min_s,
        election_timeout_max_s=settings.election_timeout_max_s,
        async_replication=settings.replication == "async",
        lease_reads=settings.read_mode == "lease",
        log_bytes_max=settings.log_bytes_max,
    )


class LogQueue(logging.Handler):
    """Has a thread, ``log-writer``, write what all others log: stderr may be a pipe that nobody reads.

    No other may wait for that, nor for the disk of a log (raft-traps T24). What finds no room is
    lost, and how much that was is logged later.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        # Not sys.stderr: at its end the interpreter would wait for the lock of who is writing to it.
        self._fd = fd
        # Guards the following, for memory work only; notified at any change of it.
        self._changed = threading.Condition()
        self._records: list[logging.LogRecord] = []
        self._lost_count = 0  # since ``_records`` was full
        self._is_writing = False
        threading.Thread(target=self._run, name="log-writer", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Leave it to ``log-writer``; never waits."""
        # Its arguments may change. What is wrong with them is reported when it is written.
        with contextlib.suppress(Exception):
            record.msg, record.args = record.getMessage(), None
        with self._changed:
            if len(self._records) < LOG_RECORDS_MAX:
                self._records.append(record)
                self._changed.notify_all()
            else:
                self._lost_count += 1

    def flush(self) -> None:
        """Wait until all is written, for LOG_FLUSH_S at most. ``logging.shutdown`` calls this."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._records or self._is_writing), LOG_FLUSH_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._records)
                self._is_writing = True
                records, self._records = self._records, []
                lost_count, self._lost_count = self._lost_count, 0
            if lost_count:
                text = f"{lost_count} lines of the log are lost: nobody took them in time"
                records.append(log.makeRecord(log.name, logging.WARNING, "", 0, text, (), None))
            for record in records:
                self._write(record)

    def _write(self, record: logging.LogRecord) -> None:
        try:
            data = f"{self.format(record)}\n".encode(errors="backslashreplace")
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            pass  # nobody can be told
        except Exception:  # noqa: BLE001  # a bug in what was logged
            self.handleError(record)


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, for those who collect logs."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "thread": record.threadName,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def _configure_logging(settings: Settings) -> None:
    handler: logging.Handler = logging.NullHandler()
    if sys.stderr is not None:  # else it was closed, and its number may become that of a data file
        handler = LogQueue(sys.stderr.fileno())
    formatter: logging.Formatter = logging.Formatter(
        "%(asctime)s %(levelname)s %(threadName)s %(message)s"
    )
    if settings.log_format == "json":
        formatter = _JsonFormatter()
    handler.setFormatter(formatter)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)


def _fit_clients(settings: Settings) -> Settings:
    """Raise this process's limit of open files for --max-clients, or lower that to the limit.

    Otherwise a crowd of clients would leave no file for the log, whose failure ends the node.
    """
    wanted = settings.max_clients + FILES_RESERVED
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted:
        return settings
    limit = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit >= wanted:
        return settings
    fitting = max(1, limit - FILES_RESERVED)
    log.warning(
        "--max-clients is %d instead of %d: the system allows %d open files (ulimit -n)",
        fitting,
        settings.max_clients,
        limit,
    )
    return replace(settings, max_clients=fitting)


def _warn_of_choices(settings: Settings) -> None:
    if settings.fsync == "no":
        log.warning("--fsync no: a power failure can lose writes that were answered OK")
    if settings.replication == "async":
        log.warning("--replication async: the primary's death can lose writes answered OK")
    if settings.read_mode == "lease":
        log.warning(
            "--read-mode lease: reads rely on clocks that run at (nearly) the same rate; give it "
            "to every node"
        )


def main(argv: Sequence[str] | None = None, environ: dict[str, str] | None = None) -> int:
    """Run a node until it is told to stop; returns the exit status."""
    try:
        settings = parse_settings(
            sys.argv[1:] if argv is None else argv, os.environ if environ is None else environ
        )
    except ConfigError as error:
        sys.stderr.write(f"kv_store_server.py: {error}\n")
        return 2
    threading.current_thread().name = "main"
    os.umask(0o077)  # whoever may read the data is a matter of who may read this user's files
    threading.stack_size(1024 * 1024)
    # Blocked in every thread, for main to take by itself: a handler would run only when main wakes,
    # and a signal that the kernel gives to another thread does not wake it.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    _configure_logging(settings)
    log.info("starting version=%s python=%s", kv_members.VERSION, sys.version.split()[0])
    _warn_of_choices(settings)
    settings = _fit_clients(settings)
    exit_status = _run(settings)
    if exit_status in (EXIT_CONFIG, EXIT_REMOVED):
        # For who watches this process and has not started it: only a parent is told.
        with contextlib.suppress(OSError):
            (settings.data_dir / "exit-status").write_text(f"{os.getpid()} {exit_status}\n")
    return exit_status


def _run(settings: Settings) -> int:
    try:
        server = Server(settings)
    except CANT_START as error:
        log.error("%s", error)
        return EXIT_CONFIG
    except OSError as error:
        log.error("can't start: %s", _explained(error, settings.data_dir))
        return EXIT_FAULT
    return server.run()


if __name__ == "__main__":
    sys.exit(main())
