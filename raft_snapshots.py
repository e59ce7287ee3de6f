"""The state on disk and on its way to followers: thread ``state-flusher``, snapshots out and in.

Rule 1: the log lets go of an entry only when the state that holds its effect is durable (paper 7).
Rule 2: a follower answers each chunk, and only then gets the next; it is sent from a copy of the
state, so the primary goes on serving and saving.
Rule 3: a received state is complete, checked and durable under its final name before the core
hears of it and the log is emptied; a crash between any two steps leaves a state and a log that fit
(``recover``).
Rule 4: a transfer may be interrupted at any point: a chunk that is repeated is answered by what is
there, one that does not follow on makes both sides begin anew.

``raft_node.py`` calls this and is called back through ``Host``. The files are ``state_db.py``'s.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from kv_store import KeyValueStore, Slice
from raft_core import RaftCore
from raft_log import RaftLog
from raft_status import NodeConfig
from raft_types import (
    Entry,
    EntryKind,
    HardState,
    Member,
    MemberId,
    Membership,
    Message,
    Snapshot,
    SnapshotChunk,
    SnapshotOutcome,
    SnapshotReply,
)
from replication_log import Recovered, ReplicationLog
from replication_log_format import DataDirError
from state_db import SnapshotReader, SnapshotWriter, StateDb, StateDbError, StateHeader

log = logging.getLogger(__name__)

CHUNK_BYTES: Final = 256 * 1024
# A state this old is saved even if the log is short: so the next start has little to replay.
SAVE_INTERVAL_S: Final = 60.0
# Of that, and of the log that makes a save due: drawn anew for each. Nodes whose logs grow alike would
# all save at the same moments, and no majority would be free to answer clients meanwhile.
SAVE_SHARE_MIN: Final = 0.5
POLL_S: Final = 0.5
RESEND_S: Final = 3.0
RETRY_S: Final = 5.0
# To install a large state takes seconds. Who is silent for longer is gone; the copy that it was to
# get is not kept, nor the log behind it. Should it come back, it begins anew.
SILENCE_S: Final = 120.0
# While a snapshot is under way, and a little longer, until its follower has begun to take what came
# after it, the log is kept up to this many times its usual size.
PINNED_FACTOR: Final = 4
PINNED_AFTER_S: Final = 10.0
# Each is a copy of the state on this node's disk (raft-traps T42).
TRANSFERS_MAX: Final = 2
# What is kept of the log for slow followers, whatever it weighs: to take so many in takes seconds,
# and a state is no more trouble then.
TAIL_ENTRIES_MAX: Final = 200_000
# So long a node that could not keep up is named.
BEHIND_S: Final = 60.0


class Host(Protocol):
    """What ``StateKeeper`` needs of the node. Each takes the locks that it needs."""

    @property
    def is_suspect(self) -> bool:
        """This node's state differs from the others': it must not get onto the disk."""

    def begin_flush(self) -> tuple[StateHeader, Iterator[Slice]]:
        """The state as it is now, and what has changed in it since the last flush."""

    def end_flush(self, *, saved: bool) -> None:
        """That flush is over."""

    def drop_log(self, index: int) -> None:
        """Let go of entries before ``index``, on disk and in the core."""

    def snapshot_ended(self, member_id: MemberId, index: int | None) -> None:
        """This follower has the state at ``index``, or (None) has to begin anew."""

    def post(self, message: Message) -> None:
        """Send this, or lose it."""

    def answer_chunk(
        self, chunk: SnapshotChunk, received_bytes: int, outcome: SnapshotOutcome
    ) -> None:
        """Answer the leader."""

    def install(
        self, snapshot: Snapshot, received: KeyValueStore, make_durable: Callable[[], None]
    ) -> bool:
        """Make a state that was received this node's; False: it has got as far by itself."""


def snapshot_of(header: StateHeader) -> Snapshot:
    """What the core must know of a state on disk."""
    membership = Membership.decode(header.membership) if header.membership else Membership()
    return Snapshot(header.applied_index, header.applied_term, membership, header.membership_index)


def fit_log(disk: ReplicationLog, snapshot: Snapshot) -> bool:
    """Make the log one that goes on from the state on disk; True if it was emptied for that.

    A crash while a snapshot was installed leaves the log of before, which ends too early or has
    another entry there. Raises DataDirError if it begins too late: what is between is lost.
    """
    index = snapshot.index
    if index + 1 < disk.first_index:
        raise DataDirError(
            f"the state ends at entry {index}, and the log begins only at entry "
            f"{disk.first_index}: what was between is lost. While the others are a majority, move this "
            "data directory away and start the node again: it copies the data from them."
        )
    if index <= disk.last_index and disk.term_at(index) == snapshot.term:
        return False
    log.warning("the log does not hold what the state has: it begins anew index=%d", index)
    _begin_log_after(disk, index, snapshot.term)
    return True


def _begin_log_after(disk: ReplicationLog, index: int, term: int) -> None:
    """Empty the log, to go on after ``index``, which a state has reached."""
    # A term that the state has seen is one that this server has reached, even if its own disk has
    # not: what others hold on a majority may be applied from memory. No vote was given in it.
    if term > disk.hard_state.term:
        disk.append(HardState(term, None), [])
    disk.reset(index, term)


def restore_backup(path: Path, disk: ReplicationLog, state: StateDb) -> StateHeader:
    """Make a backup the state of a directory that belongs to no cluster yet.

    Raises StateDbError or OSError.
    """
    writer = state.receive_snapshot()
    try:
        with path.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                writer.write(data)
        header, _ = writer.finish()
        writer.install()
    finally:
        writer.abort()
    _begin_log_after(disk, header.applied_index, header.applied_term)
    return header


def found_cluster(disk: ReplicationLog, founder: Member) -> None:
    """Make ``founder`` the only member of a new cluster, whatever its state says of members."""
    # A restore that was interrupted may have been of a later term.
    term = max(1, disk.hard_state.term)
    membership = Membership((founder,)).encode()
    entry = Entry(disk.last_index + 1, term, EntryKind.MEMBERSHIP, membership)
    disk.append(HardState(term, None), [entry])


def recovered_core(
    member_id: MemberId, config: NodeConfig, recovered: Recovered, snapshot: Snapshot
) -> RaftCore:
    """Raft's part as the disk has it: the log, behind the state at ``snapshot.index``."""
    return RaftCore(
        member_id,
        config.in_ticks(),
        RaftLog(
            recovered.last_index,
            recovered.term_runs,
            recovered.tail,
            first_index=recovered.first_index,
            base_term=recovered.base_term,
        ),
        recovered.hard_state,
        [(snapshot.membership_index, snapshot.membership), *recovered.memberships],
        random.Random(),
        commit_index=snapshot.index,
    )


@dataclass
class _Outgoing:
    """The transfer of a state to one follower."""

    member_id: MemberId
    reader: SnapshotReader
    snapshot_id: int
    began_s: float
    sent_s: float
    heard_s: float  # when the follower last answered
    offset: int = 0  # the follower has what comes before


@dataclass
class _Incoming:
    """The transfer of a state to this node."""

    last_chunk: SnapshotChunk
    writer: SnapshotWriter
    is_whole: bool = False


class StateKeeper:
    """Keeps the state file near the state in memory, and moves it between nodes.

    Threads: ``state-flusher`` saves, opens and installs; ``raft-recv-NAME`` sends and writes the
    chunks of its peer.
    """

    def __init__(
        self,
        member_id: MemberId,
        disk: ReplicationLog,
        state: StateDb,
        host: Host,
        saved_index: int,
        log_bytes_max: int,
    ) -> None:
        self._member_id = member_id
        self._disk = disk
        self._state = state
        self._host = host
        self._log_bytes_max = log_bytes_max
        # Guards the fields below, for memory work only. May be taken with the node's locks held.
        self._lock = threading.Lock()
        self._due = threading.Condition(self._lock)
        self._term = 0  # of this node's leadership; 0: it does not lead
        self._wanted: set[MemberId] = set()  # followers that need a snapshot
        self._begun_s: dict[MemberId, float] = {}  # when they were last sent one
        self._outgoing: dict[MemberId, _Outgoing] = {}
        self._over: list[_Outgoing] = []  # whose files are to be closed
        # Who has installed a state: its index, and when.
        self._installed: dict[MemberId, tuple[int, float]] = {}
        self._behind_s: dict[MemberId, float] = {}  # when it was last seen that they can't keep up
        self._incoming: _Incoming | None = None
        self._stopping = False
        # Held by who writes a chunk: a peer that dials anew may have two threads here for a moment.
        self._receiving = threading.Lock()
        # Held while the state is saved; guards what follows. Outside of any other lock.
        self._saving = threading.Lock()
        self._saved_index = saved_index
        self._saved_s = time.monotonic()
        self._saved_log_bytes = 0  # what of the log was left after the last save
        self._save_share = random.uniform(SAVE_SHARE_MIN, 1)
        self.trouble = ""  # why the state can't be saved, for a person; "" if it can

    # ---- Any thread, any lock held -------------------------------------------------------------

    def lead(self, term: int) -> None:
        """This node leads in ``term``, or (0) no longer: its transfers are over."""
        with self._lock:
            if term != self._term:
                self._term = term
                self._wanted.clear()
                self._installed.clear()
                self._behind_s.clear()
                self._over += self._outgoing.values()
                self._outgoing.clear()
                self._due.notify()

    def want(self, member_id: MemberId, match_index: int) -> None:
        """This follower, whose log agrees up to ``match_index``, needs what the log has dropped."""
        with self._lock:
            installed_index, _ = self._installed.get(member_id, (0, 0.0))
            if self._is_pinned_locked(member_id) and match_index <= installed_index:
                self._behind_s[member_id] = time.monotonic()
                log.warning(
                    "member=%s can't keep up: the log went beyond what it needs after the state that "
                    "it has just installed; it begins anew. Give more --max-log.",
                    member_id,
                )
            self._wanted.add(member_id)
            self._due.notify()

    def _is_pinned_locked(self, member_id: MemberId) -> bool:
        _, installed_s = self._installed.get(member_id, (0, 0.0))
        return time.monotonic() - installed_s < PINNED_AFTER_S

    def progress(self) -> dict[MemberId, float]:
        """The followers that are getting a snapshot, and which share of it they have."""
        with self._lock:
            waiting = dict.fromkeys(self._wanted, 0.0)
            sent = {m: out.offset / out.reader.size_bytes for m, out in self._outgoing.items()}
            return waiting | sent

    # ---- Threads raft-recv-NAME and raft-peer-NAME ---------------------------------------------

    def resend(self, member_id: MemberId) -> None:
        """What was on its way to this follower may be lost."""
        with self._lock:
            outgoing = self._outgoing.get(member_id)
            term = self._term
        if outgoing is not None:
            self._send(outgoing, term)

    def _send(self, outgoing: _Outgoing, term: int) -> None:
        outgoing.sent_s = time.monotonic()
        try:
            data = outgoing.reader.read(outgoing.offset, CHUNK_BYTES)
        except OSError as error:  # closed: the transfer is over
            log.debug("snapshot not sent: %s", error)
            return
        self._host.post(
            SnapshotChunk(
                sender=self._member_id,
                to=outgoing.member_id,
                term=term,
                snapshot_id=outgoing.snapshot_id,
                offset=outgoing.offset,
                data=data,
                is_last=outgoing.offset + len(data) == outgoing.reader.size_bytes,
            )
        )

    def on_reply(self, reply: SnapshotReply) -> None:
        """A follower's answer to a chunk, of this leadership."""
        with self._lock:
            outgoing = self._outgoing.get(reply.sender)
            if outgoing is None or outgoing.snapshot_id != reply.snapshot_id:
                return
            outgoing.heard_s = time.monotonic()
            index = None
            if reply.outcome is SnapshotOutcome.INSTALLED:
                # At once, for what comes next is to be kept without a gap (see _drop_log).
                index = outgoing.reader.header.applied_index
                self._installed[reply.sender] = (index, time.monotonic())
            if reply.outcome is not SnapshotOutcome.MORE:
                self._over.append(self._outgoing.pop(reply.sender))
                self._due.notify()
        if reply.outcome is SnapshotOutcome.MORE:
            # An answer that is repeated asks for nothing new.
            if outgoing.offset < reply.received_bytes <= outgoing.reader.size_bytes:
                outgoing.offset = reply.received_bytes
                self._send(outgoing, reply.term)
            return
        if index is not None:
            took_s = time.monotonic() - outgoing.began_s
            log.info("snapshot installed by member=%s seconds=%.1f", reply.sender, took_s)
        self._host.snapshot_ended(reply.sender, index)

    def troubles(self, membership: Membership) -> list[str]:
        """What is wrong, for a person. Any lock may be held."""
        troubles = [self.trouble] if self.trouble else []
        latest_s = time.monotonic() - BEHIND_S
        with self._lock:
            behind = [m for m, seen_s in self._behind_s.items() if seen_s > latest_s]
        names = [m.node_id for m in membership.members if m.member_id in behind]
        return troubles + [f"{n} can't keep up with the log: give more --max-log" for n in names]

    def on_chunk(self, chunk: SnapshotChunk) -> None:
        """A chunk from the leader of the present term."""
        with self._receiving:
            self._take_chunk(chunk)

    def _take_chunk(self, chunk: SnapshotChunk) -> None:
        with self._lock:
            incoming = self._incoming
            if incoming is not None and incoming.is_whole:
                # Answered when that one is installed. Of another transfer nothing is known yet: it
                # gets no answer, and is sent again.
                if incoming.last_chunk.snapshot_id == chunk.snapshot_id:
                    incoming.last_chunk = chunk
                return
        if incoming is None or incoming.last_chunk.snapshot_id != chunk.snapshot_id:
            if chunk.offset:
                self._host.answer_chunk(chunk, 0, SnapshotOutcome.REFUSED)
                return
            if incoming is not None:
                incoming.writer.abort()
            log.info("receiving a snapshot from=%s", chunk.sender)
            try:
                incoming = _Incoming(chunk, self._state.receive_snapshot())
            except OSError as error:
                log.error("a snapshot can't be received: %s", error)
                with self._lock:
                    self._incoming = None
                self._host.answer_chunk(chunk, 0, SnapshotOutcome.REFUSED)
                return
        incoming.last_chunk = chunk
        is_whole = False
        if chunk.offset == incoming.writer.received_bytes:
            try:
                incoming.writer.write(chunk.data)
            except OSError as error:
                self._refuse(incoming, error)
                return
            is_whole = chunk.is_last
        with self._lock:
            self._incoming = incoming
            # Not before: it could be installed meanwhile, and would then be here again.
            incoming.is_whole = is_whole
            if is_whole:
                self._due.notify()
                return
        received_bytes = incoming.writer.received_bytes
        self._host.answer_chunk(chunk, received_bytes, SnapshotOutcome.MORE)

    def _refuse(self, incoming: _Incoming, error: Exception) -> None:
        log.error("a snapshot can't be installed: %s", error)
        incoming.writer.abort()
        with self._lock:
            self._incoming = None
        self._host.answer_chunk(incoming.last_chunk, 0, SnapshotOutcome.REFUSED)

    # ---- Thread state-flusher ------------------------------------------------------------------

    def run(self) -> None:
        """Until ``stop``, then save once more."""
        while not self._stopping:
            with self._lock:
                whole = self._incoming is not None and self._incoming.is_whole
                if not (self._may_begin_locked() or self._over or whole):
                    self._due.wait(POLL_S)
                over, self._over = self._over, []
                wanted = self._may_begin_locked()
                self._wanted.difference_update(wanted)
            for outgoing in over:
                outgoing.reader.close()
            self._install_received()
            if self._is_save_due():
                self.save()
            for member_id in wanted:
                self._begin_sending(member_id)
            self._resend_late()
        self.save()

    def _may_begin_locked(self) -> list[MemberId]:
        # A follower that refuses what it gets, its disk full perhaps, is not to keep ours busy.
        latest_s = time.monotonic() - RETRY_S
        ready = [m for m in self._wanted if self._begun_s.get(m, latest_s) <= latest_s]
        return ready[: TRANSFERS_MAX - len(self._outgoing)]

    def stop(self) -> None:
        """Let ``run`` end."""
        with self._lock:
            self._stopping = True
            self._due.notify()

    def open_backup(self) -> SnapshotReader:
        """The state as it is now, as bytes. Any thread. Raises OSError, StateDbError."""
        self.save()
        if self.trouble:
            raise OSError(self.trouble)
        return self._state.open_snapshot()

    def _is_save_due(self) -> bool:
        log_bytes = self._save_share * self._log_bytes_max / 2
        if self._disk.size_bytes - self._saved_log_bytes > log_bytes:
            return True
        return time.monotonic() - self._saved_s > self._save_share * SAVE_INTERVAL_S

    def save(self) -> None:
        """Bring the state file up to date, and let go of the log behind it."""
        with self._saving:
            if not self._host.is_suspect:
                self._save()

    def _save(self) -> None:
        header, slices = self._host.begin_flush()
        saved = header.applied_index == self._saved_index
        try:
            if not saved:
                self._state.save(header, slices)
                saved = True
            self.trouble = ""
        except (OSError, StateDbError) as error:
            if not self.trouble:
                log.error("the state can't be saved, so the log grows: %s", error)
            self.trouble = f"the state can't be saved: {error}"
        finally:
            self._host.end_flush(saved=saved)
        self._saved_s = time.monotonic()
        if saved:
            self._saved_index = header.applied_index
            self._drop_log()
        self._saved_log_bytes = self._disk.size_bytes
        self._save_share = random.uniform(SAVE_SHARE_MIN, 1)

    def _drop_log(self) -> None:
        tail = self._disk.tail_start(self._log_bytes_max // 2)
        tail = max(tail, self._disk.last_index - TAIL_ENTRIES_MAX + 1)
        keep = min(self._saved_index + 1, tail)
        with self._lock:
            pins = [o.reader.header.applied_index + 1 for o in self._outgoing.values()]
            pins += [i + 1 for m, (i, _) in self._installed.items() if self._is_pinned_locked(m)]
        if self._disk.size_bytes < PINNED_FACTOR * self._log_bytes_max:
            keep = min([keep, *pins])
        if keep > self._disk.first_index:
            self._host.drop_log(keep)

    def _begin_sending(self, member_id: MemberId) -> None:
        with self._lock:
            term = self._term
        if not term:
            return
        now_s = time.monotonic()
        try:
            reader = self._state.open_snapshot()
        except (OSError, StateDbError) as error:
            log.error("a snapshot can't be sent to=%s: %s", member_id, error)
            with self._lock:
                self._begun_s[member_id] = now_s
                if self._term == term:
                    self._wanted.add(member_id)
            return
        outgoing = _Outgoing(member_id, reader, secrets.randbits(63), now_s, now_s, now_s)
        with self._lock:
            if self._term != term or member_id in self._outgoing:
                self._over.append(outgoing)
                return
            self._outgoing[member_id] = outgoing
            self._begun_s[member_id] = now_s
        index = reader.header.applied_index
        log.info("sending a snapshot to=%s index=%d bytes=%d", member_id, index, reader.size_bytes)
        self._send(outgoing, term)

    def _resend_late(self) -> None:
        now_s = time.monotonic()
        with self._lock:
            outgoing = list(self._outgoing.values())
            silent = [o.member_id for o in outgoing if o.heard_s < now_s - SILENCE_S]
            late = [o.member_id for o in outgoing if o.sent_s < now_s - RESEND_S]
            self._over += [self._outgoing.pop(member_id) for member_id in silent]
        for member_id in silent:
            log.warning("snapshot given up, for no answer comes from member=%s", member_id)
            self._host.snapshot_ended(member_id, None)
        for member_id in late:
            self.resend(member_id)

    def _install_received(self) -> None:
        with self._lock:
            incoming = self._incoming
            if incoming is None or not incoming.is_whole:
                return
        try:
            header, received = incoming.writer.finish()
        except (OSError, StateDbError) as error:
            self._refuse(incoming, error)
            return
        snapshot = snapshot_of(header)
        with self._saving:
            installed = self._host.install(snapshot, received, incoming.writer.install)
            if installed:
                self._saved_index = snapshot.index
        if installed:
            log.info("installed a snapshot index=%d keys=%d", snapshot.index, header.keys)
        incoming.writer.abort()
        with self._lock:
            self._incoming = None
        self._host.answer_chunk(
            incoming.last_chunk, incoming.writer.received_bytes, SnapshotOutcome.INSTALLED
        )
