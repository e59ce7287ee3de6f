"""The driver: named threads and one lock around the pure core. The core decides, the driver does.

Rule 1: ``_lock`` guards the core and everything else here; hold it for memory work only. What must
happen outside (waking a link, a log line, a callback) is returned as *effects* and run afterwards.
Rule 2: after taking the lock again, look at term and role again.
Rule 3: a thread that dies takes the process with it (raft-traps T24): see ``_guard``.
Rule 4: a write that was proposed ends in its reply or in UNKNOWN, never in a definite error.

| thread | does | waits on |
|---|---|---|
| raft-timer | ticks the core | the clock |
| raft-log-writer | writes what gathered while another thread wrote: one for all | disk |
| raft-applier | applies what is read from disk, or left by others; upkeep of the store | disk |
| raft-peer-NAME | dials a peer, pulls and pushes appends, heartbeats and votes | that socket |
| raft-recv-NAME | reads a peer's frames, ``core.step``; writes (secondary), applies | socket, disk |
| state-flusher | saves the state, cuts the log, sends and installs snapshots | disk |

Work is done by whoever finds it due, if no one is at it, which spares the change of threads that
costs more than the work; the thread named for it takes over when more has gathered meanwhile.
Lock order, never reversed: a link's sending lock > ``_lock``; ``store_lock`` > ``_lock``. Callers
are the client threads of ``kv_store_server.py``. Read on in ``raft_core.py`` and
``raft_transport.py``, ``raft_snapshots.py``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

from kv_errors import (
    BusyError,
    NoPrimaryError,
    NoSpaceError,
    NotPrimaryError,
    OutcomeUnknownError,
)
from kv_store import KeyValueStore, Slice
from kv_types import Reply
from raft_audit import StateAudit
from raft_core import (
    ImpossibleMessageError,
    MembershipChangeRefusedError,
    NotLeaderError,
    RaftCore,
    TooMuchUncommittedError,
    TransferRefusedError,
    TransferUnderWayError,
)
from raft_frames import FrameError, Hello, encode_message
from raft_snapshots import StateKeeper, recovered_core
from raft_status import (
    TICK_S,
    MemberStatus,
    NodeConfig,
    NodeStatus,
    OwnBugs,
    Pending,
    Waiting,
    node_role,
    wait_for,
)
from raft_transport import LATER, PeerLink, PeerLinks, PeerListener
from raft_types import (
    AppendEntries,
    EntriesOnDisk,
    Entry,
    EntryKind,
    HashReport,
    Identity,
    Member,
    MemberId,
    Membership,
    Message,
    Ready,
    Role,
    Room,
    Snapshot,
    SnapshotChunk,
    SnapshotDue,
    SnapshotOutcome,
    SnapshotReply,
)
from raft_watch import DiskWatch, Lease
from replication_log import ReplicationLog
from replication_log_format import DiskRefusesError
from state_db import SnapshotReader, StateDb, StateHeader

log = logging.getLogger(__name__)

# Under load, a new commit index that no entries have taken along for so long is told by itself.
COMMIT_NEWS_S = 0.003
APPLY_BYTES_MAX = 1024 * 1024
# What threads that hear peers, or clients, apply themselves: those who are not heard are taken for dead.
QUICK_BYTES_MAX = 64 * 1024
QUICK_S = 0.05
APPLY_LAG_MAX = 20_000  # entries, which take some 0.2 s
UPKEEP_INTERVAL_S = 0.1
STOP_TIMEOUT_S = 30.0  # the state is saved once more, which takes longest
DISK_CHECK_INTERVAL_S = 1.0
DISK_RETRY_S = 0.2

Effect = Callable[[], object]


class RaftNode:
    """One server of the cluster. ``start`` it, then call it from any thread."""

    def __init__(
        self,
        config: NodeConfig,
        identity: Identity,
        disk: ReplicationLog,
        state: StateDb,
        store: KeyValueStore,
        snapshot: Snapshot,
        listener: PeerListener,
        *,
        address: tuple[str, int],
        boot_id: str,
        on_step_down: Callable[[], None],
        on_fatal: Callable[[BaseException], None],
        upkeep: Callable[[], Sequence[bytes]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.identity = identity
        # Guards ``store``. The applier writes under it; readers of several keys take it too.
        self.store_lock = threading.Lock()
        self.store = store
        self._disk = disk  # append: by who holds the Ready; read: any thread
        self._address = address  # where peers reach this node
        self._boot_id = boot_id
        self._on_step_down = on_step_down
        self._on_fatal = on_fatal
        self._own_bugs = OwnBugs(on_fatal)
        self._upkeep = upkeep  # raft-applier asks the leader's store for payloads to propose
        self._clock = clock
        self._listener = listener
        # Guards all that follows. Memory work only.
        self._lock = threading.Lock()
        self._core = recovered_core(identity.member_id, config, disk.recovered, snapshot)
        # Notified when: a Ready is due; entries are to be applied; the primary has changed.
        self._ready_due = threading.Condition(self._lock)
        self._apply_due = threading.Condition(self._lock)
        self._apply_over = threading.Condition(self._lock)
        self._primary_changed = threading.Condition(self._lock)
        self._stopping = False
        self._applied_index = store.applied_index
        # Told to the peers without entries only up to here; None: to its end, at once.
        self._commit_due: int | None = None
        self._applying = False  # one thread at a time, in the log's order
        self._applies_slowly = False  # until raft-applier has caught up
        self._waiting = Waiting()
        self._links = PeerLinks(self._make_link)
        self._seen = (Role.FOLLOWER, self._core.term, self._core.leader_id)
        self._seen_membership = Membership()
        self._disk_watch = DiskWatch(disk)
        # What writes may count on, as it was at the last tick; looked at without the lock.
        self.room = Room.PLENTY
        self._lease = Lease(config.lease_reads, config.election_timeout_min_s, clock)
        self._keeper = StateKeeper(
            identity.member_id, disk, state, self, snapshot.index, config.log_bytes_max
        )
        # Held by who changes the log on disk; nothing else is taken or waited for meanwhile.
        self._changing_disk = threading.Lock()
        self._audit = StateAudit(identity.member_id)
        self._next_audit_s = 0.0
        self._threads = self._make_threads()

    def _make_threads(self) -> list[threading.Thread]:
        return [
            threading.Thread(target=self._guard, args=(run,), name=name, daemon=True)
            for name, run in (
                ("raft-timer", self._run_timer),
                ("raft-log-writer", self._run_log_writer),
                ("raft-applier", self._run_applier),
                ("state-flusher", self._keeper.run),
            )
        ]

    # ---- Start and stop (thread main) ----------------------------------------------------------

    def start(self) -> None:
        """Start the threads and talk to the peers."""
        with self._lock:
            effects = self._pump_locked()
        _run(effects)
        for thread in self._threads:
            thread.start()
        self._listener.start(self)

    def stop(self) -> None:
        """Stop everything; who still waits for a write gets UNKNOWN."""
        with self._lock:
            self._stopping = True
            effects = self._fail_waiting_locked(0, OutcomeUnknownError("the node is stopping"))
            self._ready_due.notify_all()
            self._apply_due.notify_all()
            self._primary_changed.notify_all()
            links = list(self._links.values())
        _run(effects)
        self._listener.close()
        for link in links:
            link.close()
        self._keeper.stop()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=STOP_TIMEOUT_S)

    def _guard(self, run: Callable[[], None]) -> None:
        """What fails in a thread of the node must not leave a zombie behind: see ``on_fatal``."""
        try:
            run()
        except BaseException as error:
            self._on_fatal(error)
            raise

    # ---- Any thread: writes, reads, questions --------------------------------------------------

    def propose(self, payloads: Sequence[bytes], *, blind: bool = False) -> Pending:
        """``propose_later``, and wait until it is done. Raises its error."""
        return wait_for(partial(self.propose_later, payloads, blind=blind))

    def propose_later(
        self,
        payloads: Sequence[bytes],
        on_done: Callable[[Pending], None],
        *,
        blind: bool = False,
    ) -> None:
        """Replicate commands; ``on_done`` is called when they are applied, or have failed.

        ``blind`` commands (whose reply is known beforehand) are done with this node's own disk
        where replication is asynchronous. Raises NotPrimaryError, NoPrimaryError, BusyError or
        NoSpaceError: nothing was proposed. Later there is only OutcomeUnknownError.
        """
        with self._own_bugs, self._lock:
            self._check_serving_locked()
            if self.room is Room.NONE and self._core.role is Role.LEADER:
                raise NoSpaceError(self.room_trouble() or "a disk is full: free some space")
            try:
                first = self._core.propose(payloads)
            except NotLeaderError:
                raise self._not_primary_locked() from None
            except TransferUnderWayError:
                raise NoPrimaryError("the leadership is being handed over; try again") from None
            except TooMuchUncommittedError:
                raise BusyError("too many writes wait for a majority; try again") from None
            pending = self._pending_locked(first, first + len(payloads) - 1, on_done)
            pending.blind = blind and self.config.async_replication
            self._waiting.add_write(pending)
            effects = self._pump_locked()
        self._settle(effects)

    def _pending_locked(self, first: int, last: int, on_done: Callable[[Pending], None]) -> Pending:
        # Check-quorum ends the wait long before this; the limit is for disks that hang.
        deadline_s = self._clock() + 2 * self.config.election_timeout_max_s
        return Pending(first, last, self._core.term, deadline_s, on_done)

    def read_barrier(self) -> None:
        """``read_later``, and wait until it is done. Raises its error."""
        wait_for(self.read_later)

    def read_later(self, on_done: Callable[[Pending], None]) -> None:
        """``on_done`` is called when reading the store is linearizable. Source: thesis 6.4.

        Raises NotPrimaryError or NoPrimaryError, which are also the only errors later: a read
        that failed is always definite.
        """
        with self._own_bugs, self._lock:
            self._check_serving_locked()
            core = self._core
            # With asynchronous replication what was answered OK may not be committed yet, and
            # must be seen all the same.
            last = core.log.last_index if self.config.async_replication else 0
            reader = self._pending_locked(0, last, on_done)
            if core.role is not Role.LEADER:
                raise self._not_primary_locked()
            self._waiting.add_read(reader)
            if self._lease.is_valid() and core.committed_in_own_term:
                done = self._waiting.confirmed(core.commit_index, [reader], self._applied_index)
                effects = self._done_locked(done)
            else:
                core.read_index(reader)
                effects = self._pump_locked()
        self._settle(effects)

    def _check_serving_locked(self) -> None:
        if self._stopping:
            raise NoPrimaryError("the node is stopping")
        if self._audit.trouble:
            raise NoPrimaryError(self._audit.trouble)
        if self._core.role is Role.LEADER and self._lease.must_wait():
            raise NoPrimaryError("the last primary's lease has not run out; try again")

    def _not_primary_locked(self) -> NotPrimaryError | NoPrimaryError:
        primary = self._primary_locked()
        if primary is None or primary.member_id == self.identity.member_id:
            return NoPrimaryError()
        return NotPrimaryError(primary.node_id, primary.host, primary.port)

    def _primary_locked(self) -> Member | None:
        leader_id = self._core.leader_id
        return None if leader_id is None else self._core.membership.get(leader_id)

    @property
    def is_primary(self) -> bool:
        """Whether this node leads (as far as it knows: only ``read_barrier`` is sure)."""
        return self._core.role is Role.LEADER

    def wait_for_primary(self, timeout_s: float) -> Member | None:
        """The primary, waiting up to ``timeout_s`` until there is one that serves."""
        deadline_s = self._clock() + timeout_s
        with self._lock:
            while not self._stopping:
                primary = self._primary_locked()
                if primary is not None and not (self.is_primary and self._lease.must_wait()):
                    return primary
                left_s = deadline_s - self._clock()
                if left_s <= 0:
                    break
                self._primary_changed.wait(left_s)
        return None

    # ---- Any thread: members and leadership ----------------------------------------------------

    @property
    def has_primary(self) -> bool:
        """Whether this node knows who leads."""
        return self._core.leader_id is not None

    @property
    def is_removed(self) -> bool:
        """Whether this node was a member, and is none any more."""
        return self._core.is_removed

    @property
    def membership(self) -> Membership:
        """Who belongs to the cluster, as far as this node knows."""
        return self._core.membership

    def is_alive(self, member_id: MemberId, *, but_for: str = "") -> bool:
        """Whether this member's process is known to run, unless it is the one that booted as that."""
        if member_id == self.identity.member_id:
            return self._boot_id != but_for
        with self._lock:
            return self._links.is_alive(member_id, but_for=but_for)

    def meet(self, peer: Member) -> None:
        """Dial this member there, where it was found, whatever the log says of its address."""
        with self._lock:
            effect = self._links.to(peer)
        effect()

    def settled_membership(self) -> Membership:
        """Who belongs to the cluster, by a change that can't be taken back any more.

        Raises BusyError while one is under way, and what ``propose`` raises.
        """
        with self._lock:
            self._check_serving_locked()
            if self._core.role is not Role.LEADER:
                raise self._not_primary_locked()
            if not self._core.membership_is_settled:
                raise BusyError("a change of members is under way; try again")
            return self._core.membership

    def change_members(self, present: Membership, change: Callable[[RaftCore], int]) -> None:
        """Let the core propose a change of membership, and wait until it is applied.

        ``change`` returns the entry's index; it was made with ``present`` in mind. Raises what
        ``propose`` raises; BusyError also if the members are others by now.
        """

        def begin(on_done: Callable[[Pending], None]) -> None:
            with self._own_bugs, self._lock:
                self._check_serving_locked()
                if self._core.role is not Role.LEADER:
                    raise self._not_primary_locked()
                if self._core.membership is not present:
                    raise BusyError("the members have changed meanwhile; try again")
                try:
                    index = change(self._core)
                except MembershipChangeRefusedError as error:
                    raise BusyError(str(error)) from None
                self._waiting.add_write(self._pending_locked(index, index, on_done))
                effects = self._pump_locked()
            self._settle(effects)

        wait_for(begin)

    def hand_over(self, target: MemberId | None) -> Member:
        """Let another voter lead (None: the most up to date); returns who leads now.

        Raises NotPrimaryError, NoPrimaryError, or BusyError if it did not succeed in time.
        """
        with self._own_bugs, self._lock:
            if self._core.role is not Role.LEADER:
                raise self._not_primary_locked()
            others = set(self._core.membership.voters) - {self.identity.member_id}
            if others <= self._links.dead:
                raise BusyError("no other voter lives")
            try:
                self._core.transfer_to(target)
            except TransferRefusedError as error:
                raise BusyError(str(error)) from None
            effects = self._pump_locked()
        self._settle(effects)
        deadline_s = self._clock() + self.config.election_timeout_max_s
        with self._lock:
            while self._clock() < deadline_s:
                primary = self._primary_locked()
                if primary is not None and primary.member_id != self.identity.member_id:
                    return primary
                heir = self._core.transfer_target
                if self._core.role is Role.LEADER and (heir is None or heir in self._links.dead):
                    break
                self._primary_changed.wait(TICK_S)
        raise BusyError("the leadership was not taken over in time: this node goes on")

    def open_backup(self) -> SnapshotReader:
        """The state that this node saves now, as bytes. Raises OSError, StateDbError."""
        if self.suspicion:
            raise OSError(self.suspicion)
        return self._keeper.open_backup()

    def status(self) -> NodeStatus:
        """How things stand."""
        with self.store_lock:
            applied_index, state_hash = self.store.applied_index, self.store.state_hash
        with self._lock:
            members = tuple(map(self._member_status_locked, self._core.membership.members))
            return NodeStatus.of(
                self._core,
                self.identity,
                primary=self._primary_locked(),
                applied_index=applied_index,
                state_hash=state_hash,
                members=members,
                trouble=self._trouble(),
            )

    def _trouble(self) -> str:
        found = (
            self._audit.trouble or (self._audit.finding if self.is_primary else ""),
            self._disk_watch.trouble,
            self.room_trouble(),
            *self._core.troubles,
            *self._keeper.troubles(self._core.membership),
        )
        return "; ".join(text for text in found if text)

    @property
    def suspicion(self) -> str:
        """Why nothing of this node's state may be told; "" if it may."""
        return self._audit.trouble

    def room_trouble(self) -> str:
        """Of a primary: why its clients may not write all; "" if they may."""
        return self._disk_watch.room_trouble(self.room) if self.is_primary else ""

    def _member_status_locked(self, member: Member) -> MemberStatus:
        link = self._links.get(member.member_id)
        state = "" if link is None else "up" if link.is_up else link.last_error or "not tried yet"
        snapshot = self._keeper.progress().get(member.member_id)
        return MemberStatus.of(self._core, member, state, snapshot)

    # ---- Caller holds _lock --------------------------------------------------------------------

    def _pump_locked(self) -> list[Effect]:
        """Notify whoever has work after the core has moved; returns what to do outside the lock."""
        core = self._core
        effects: list[Effect] = [
            link.push
            for member_id, link in self._links.items()
            if core.wants_append(member_id, self._commit_due)
        ]
        for read_index, readers in core.take_reads():
            done = self._waiting.confirmed(read_index, readers, self._applied_index)  # type: ignore[arg-type]
            effects += self._done_locked(done)
        if core.membership is not self._seen_membership:
            effects += self._follow_membership_locked()
        if (core.role, core.term, core.leader_id) != self._seen:
            effects += self._follow_role_locked()
        self._lease.follow(core)
        return effects

    def _done_locked(self, done: Sequence[Pending]) -> list[Effect]:
        for pending in done:
            # Whoever loses the leadership first gives up all reads, with the lock held: so this
            # node still leads, in their term (raft-traps T48).
            is_read = pending.first == 0
            assert not is_read or self._core.role is Role.LEADER
            assert not is_read or pending.term == self._core.term
        return [pending.finish for pending in done]

    def _follow_role_locked(self) -> list[Effect]:
        """What a change of role, term or leader asks for."""
        core, (old_role, old_term, _) = self._core, self._seen
        self._seen = (core.role, core.term, core.leader_id)
        self._primary_changed.notify_all()
        effects: list[Effect] = []
        if old_role is Role.LEADER and (core.role is not Role.LEADER or core.term != old_term):
            error = OutcomeUnknownError("this node lost the leadership")
            # Not core.commit_index: by now that may be the next leader's, over other entries.
            effects += self._fail_waiting_locked(core.led_commit_index, error)
            effects.append(self._on_step_down)
        if core.role is Role.LEADER and old_role is not Role.LEADER:
            self._lease.begin()
        self._keeper.lead(core.term if core.role is Role.LEADER else 0)
        leader = self._primary_locked()
        name = leader.node_id if leader else core.leader_id
        role = node_role(core)
        effects.append(partial(log.info, "role=%s term=%d leader=%s", role, core.term, name))
        return effects

    def _fail_waiting_locked(self, committed: int, error: OutcomeUnknownError) -> list[Effect]:
        failed = self._waiting.fail(committed, error, self._not_primary_locked())
        return [pending.finish for pending in failed]

    def _follow_membership_locked(self) -> list[Effect]:
        """Keep one link to each other member."""
        former, membership = self._seen_membership, self._core.membership
        self._seen_membership = membership
        voters = ",".join(m.node_id for m in membership.members if m.voter)
        learners = ",".join(m.node_id for m in membership.members if not m.voter)
        text = "members voters=%s learners=%s"
        effects: list[Effect] = [partial(log.info, text, voters, learners)]
        news = (m for m in membership.found_anew(former) if m.member_id != self.identity.member_id)
        effects += map(self._links.to, news)
        self._links.dead.intersection_update(self._links)
        return effects

    def _make_link(self, member: Member) -> PeerLink:
        return PeerLink(
            self.identity,
            member,
            address=self._address,
            boot_id=self._boot_id,
            lease_reads=self.config.lease_reads,
            source=self._next_append,
            on_up=self._on_link_up,
            on_peer_dead=self._on_peer_dead,
            on_fatal=self._on_fatal,
        )

    # ---- Thread raft-timer ---------------------------------------------------------------------

    def _run_timer(self) -> None:
        ticks_max = self._core.config.heartbeat_ticks
        last_s = self._clock()
        last_commit = 0
        while not self._stopping:
            time.sleep(TICK_S if self._commit_due is None else COMMIT_NEWS_S)
            now_s = self._clock()
            # A long pause of the process (SIGSTOP, suspend) counts as one heartbeat interval at
            # most: there may be news from the others in the sockets, to be read first (T60).
            ticks = min(int((now_s - last_s) / TICK_S), ticks_max)
            last_s = now_s if ticks == ticks_max else last_s + ticks * TICK_S
            with self._lock:
                self._core.check_invariants()
                # A follower whose own disk is slow has no cause to doubt its leader: it may not
                # have read yet what that one sent (raft-traps T23).
                if self._core.role is Role.LEADER or not self._core.is_writing:
                    for _ in range(ticks):
                        self._core.tick()
                if self._lease.just_ended():
                    self._primary_changed.notify_all()
                effects = self._watch_disk_locked(ticks)
                # While writes flow, the next entries take a new commit index along for nothing;
                # what none took since the last time is told now.
                commit = self._core.commit_index
                flows = self._core.role is Role.LEADER and commit > last_commit
                self._commit_due, last_commit = (last_commit if flows else None), commit
                effects += self._pump_locked() + self._give_up_late_locked(now_s)
                # A removed member has its link until it has been told, and is gone.
                needed = {self._core.leader_id, *self._core.progress, *self._links.connected}
                effects += self._links.end_others(self._core.membership, needed)
                effects += [partial(log.warning, "%s", text) for text in self._core.take_notices()]
                if self._core.has_ready:
                    self._ready_due.notify()
            _run(effects)

    def _watch_disk_locked(self, ticks: int) -> list[Effect]:
        """A primary whose own disk hangs makes way, though its heartbeats still flow."""
        core, disk = self._core, self._disk_watch
        changed = disk.watch(ticks, core.config.election_ticks_min, is_writing=core.is_writing)
        core.room = disk.room
        self.room = core.cluster_room if core.role is Role.LEADER else disk.room
        # Who has much to apply lets others go first: its clients would wait for that.
        is_behind = core.commit_index - self._applied_index > APPLY_LAG_MAX
        core.may_campaign = not (disk.hangs or is_behind or self._audit.trouble)
        if not changed:
            return []
        if not disk.hangs:
            return [partial(log.warning, "the disk answers again")]
        if core.membership.voters != (core.member_id,):  # else nobody could do better
            core.give_way()
        return [partial(log.error, "the disk hangs: this node does not lead until it answers")]

    def _give_up_late_locked(self, now_s: float) -> list[Effect]:
        text = "no majority has confirmed it in time"
        late = self._waiting.late(now_s, OutcomeUnknownError(text), NoPrimaryError(text))
        return [pending.finish for pending in late]

    # ---- Any thread: the work that a change of the core has made due ----------------------------

    def _settle(self, effects: Sequence[Effect]) -> None:
        """After a change of the core: run its effects, then write and apply what is due.

        Not on raft-timer, which must never wait for the disk (raft-traps T24).
        """
        # On a client's thread as well: a disk or a store that fails is never only that client's.
        self._guard(partial(self._do_due_work, effects))

    def _do_due_work(self, effects: Sequence[Effect]) -> None:
        _run(effects)
        with self._lock:
            ready = self._core.ready()
        if ready is None:
            self._apply_committed()
        else:
            self._write(ready)

    def _write(self, ready: Ready) -> None:
        """Make it durable, let its messages go, and apply what is committed now.

        One at a time: the core gives out no other.
        """
        while not self._is_written(ready):
            if self._stopping:
                return
            time.sleep(DISK_RETRY_S)
        with self._lock:
            effects = self._advance_locked(ready)
            if self._core.has_ready:
                self._ready_due.notify()  # more has gathered; this thread has its own work
            leads = self._core.role is Role.LEADER
        # A leader's clients come first: their next requests, and with them the next frames, wait
        # for these replies. Of a secondary it is the leader that waits.
        if leads:
            self._apply_committed()
        _run(effects)
        if not leads:
            self._apply_committed()

    def _is_written(self, ready: Ready) -> bool:
        """Write it; False if the disk has no room, and nothing is changed: it is to be tried again."""
        try:
            with self._changing_disk:
                hard_state = ready.hard_state
                if ready.log_base is not None:
                    # First, for the log can't begin in a term that it has not heard of.
                    self._disk.append(hard_state, ())
                    self._disk.reset(*ready.log_base)
                    hard_state = None
                self._disk.append(hard_state, ready.entries)
        except DiskRefusesError as error:
            self._disk_watch.refused(error)
            return False
        self._disk_watch.written()
        return True

    def _apply_committed(self, *, may_take_long: bool = False) -> None:
        """Apply what is committed, unless another thread is at it; that one then goes on.

        What takes long is left to raft-applier, and what follows until that has caught up.
        """
        bytes_max = APPLY_BYTES_MAX if may_take_long else QUICK_BYTES_MAX
        while True:
            with self._lock:
                if self._applying or self._stopping:
                    return
                first = self._applied_index + 1
                if first > self._core.commit_index:
                    return
                # None: they are on disk, which only raft-applier reads.
                entries = self._core.entries_to_apply(first, bytes_max)
                is_slow = self._applies_slowly or (entries and len(entries[0].data) > bytes_max)
                if not entries or (is_slow and not may_take_long):
                    self._apply_due.notify()
                    return
                self._applying = True
            self._apply(entries)

    # ---- Thread raft-log-writer ----------------------------------------------------------------

    def _run_log_writer(self) -> None:
        next_check_s = 0.0
        while not self._stopping:
            with self._lock:
                ready = self._core.ready()
                if ready is None and not self._stopping:
                    self._ready_due.wait(DISK_CHECK_INTERVAL_S)
                    ready = self._core.ready()
                effects = self._pump_locked()
            _run(effects)
            if ready is not None:
                self._write(ready)
            if self._clock() >= next_check_s:
                next_check_s = self._clock() + DISK_CHECK_INTERVAL_S
                self._disk_watch.look()

    def _advance_locked(self, ready: Ready) -> list[Effect]:
        """``ready`` is durable: its messages may go, and blind writes are done."""
        self._core.advance(ready)
        effects = self._post_locked(ready.messages)
        effects += self._pump_locked()
        if self.config.async_replication and self._core.role is Role.LEADER:
            effects += self._done_locked(self._waiting.durable(self._core.log.stable_index))
        return effects

    def _post_locked(self, messages: Sequence[Message]) -> list[Effect]:
        return [
            partial(link.post, message)
            for message in messages
            if (link := self._links.get(message.to)) is not None
        ]

    # ---- Thread raft-applier -------------------------------------------------------------------

    def _run_applier(self) -> None:
        next_upkeep_s = 0.0
        while not self._stopping:
            self._apply_committed(may_take_long=True)
            with self._lock:
                first = self._applied_index + 1
                # Further the disk may still hold what was replaced in memory.
                last = min(self._core.commit_index, self._core.log.stable_index)
                on_disk = not self._applying and first <= last
                if on_disk:
                    self._applying = True
                else:
                    self._applies_slowly = False
                    self._apply_due.wait(UPKEEP_INTERVAL_S)
            if on_disk:
                self._apply(self._disk.read(first, last, APPLY_BYTES_MAX))
            if self._clock() >= next_upkeep_s:
                next_upkeep_s = self._clock() + UPKEEP_INTERVAL_S
                self._do_upkeep()

    def _apply(self, entries: Sequence[Entry]) -> None:
        replies: list[Reply] = []
        until_s = self._clock() + QUICK_S
        with self.store_lock:
            for index, _, kind, data in entries:
                if self._clock() > until_s and replies:
                    break
                if kind is EntryKind.COMMAND:
                    replies.append(self.store.apply(index, data))
                else:
                    self.store.skip(index)
                    replies.append(None)
        entries = entries[: len(replies)]
        last = entries[-1]
        with self._lock:
            self._applying = False
            self._applies_slowly = self._applies_slowly or self._clock() > until_s
            self._apply_over.notify()
            self._applied_index = last.index
            self._core.applied_to(last.index)
            effects = self._done_locked(self._waiting.applied(entries, replies))
        _run(effects)

    def _do_upkeep(self) -> None:
        """Propose what the store wants done (expiry), and compare states with the others."""
        if self.is_primary:
            with self.store_lock:
                payloads = self._upkeep()
            if payloads:
                with self._lock:
                    effects = []
                    if self._core.role is Role.LEADER and self.room is not Room.NONE:
                        with suppress(TransferUnderWayError, TooMuchUncommittedError):
                            self._core.propose(payloads)
                        effects = self._pump_locked()
                self._settle(effects)
        self._compare_states()

    def _compare_states(self) -> None:
        """Ask the others for their state hash (as leader), or answer what was asked."""
        audit = self._audit
        with self.store_lock:
            applied_index, state_hash = self.store.applied_index, self.store.state_hash
            question = audit.question
            hash_there = self.store.hash_at(question.applied_index) if question else None
        with self._lock:
            reports: list[HashReport] = []
            if self._core.role is not Role.LEADER:
                if question is audit.question:
                    reports = audit.answer(applied_index, hash_there)
            elif self._clock() >= self._next_audit_s:
                self._next_audit_s = self._clock() + self.config.heartbeat_interval_s
                reports = audit.ask(self._core.term, self._links, applied_index, state_hash)
            effects = self._post_locked(reports)
        _run(effects)

    # ---- Threads raft-peer-NAME ----------------------------------------------------------------

    def _next_append(self, member_id: MemberId, may_wait: bool) -> bytes | None:
        """The next frame for this peer, with all that has gathered for it; see PeerLink."""
        with self._lock:
            message = self._append_for_locked(member_id)
        while isinstance(message, EntriesOnDisk):
            if not may_wait:
                return LATER  # raft-timer, for one, must never wait for a disk (raft-traps T24)
            entries = self._read_for_peer(message)
            with self._lock:
                message = self._core.append_with(member_id, entries)
                message = message or self._append_for_locked(member_id)
        if message is None:
            return None
        return encode_message(self.identity.cluster_id, message)

    def _append_for_locked(self, member_id: MemberId) -> AppendEntries | EntriesOnDisk | None:
        message = self._core.append_for(member_id)
        if isinstance(message, SnapshotDue):
            self._core.snapshot_started(member_id)
            self._keeper.want(member_id, self._core.progress[member_id].match_index)
            message = self._core.append_for(member_id)
            assert not isinstance(message, SnapshotDue)
        return message

    def _read_for_peer(self, wanted: EntriesOnDisk) -> list[Entry]:
        try:
            return self._disk.read(wanted.first, wanted.last, self._core.config.append_bytes_max)
        except IndexError:
            return []  # truncated since it was asked for, or dropped: ask the core again

    def _on_link_up(self, member_id: MemberId) -> None:
        with self._lock:
            self._links.dead.discard(member_id)
            self._core.link_up(member_id)
            effects = self._pump_locked()
        self._settle(effects)
        self._keeper.resend(member_id)

    def _on_peer_dead(self, member_id: MemberId) -> None:
        with self._lock:
            self._links.dead.add(member_id)
            effects = self._weigh_death_locked(member_id)
        self._settle(effects)

    def _weigh_death_locked(self, member_id: MemberId) -> list[Effect]:
        if not self._links.is_gone(member_id):
            return []
        self._core.leader_died(member_id)
        return self._pump_locked()

    # ---- Of the StateKeeper: threads state-flusher, raft-recv-NAME ------------------------------

    @property
    def is_suspect(self) -> bool:
        return bool(self._audit.trouble)

    def begin_flush(self) -> tuple[StateHeader, Iterator[Slice]]:
        """See ``raft_snapshots.Host``, as for all of these."""
        store = self.store
        with self.store_lock:
            index = store.applied_index
            with self._lock:
                term = self._core.log.term_at(index)
                membership_index, membership = self._core.membership_at(index)
            flush = store.begin_flush()
        header = StateHeader.of(flush, term, membership.encode(), membership_index)
        return header, flush.slices(self.store_lock)

    def end_flush(self, *, saved: bool) -> None:
        with self.store_lock:
            self.store.end_flush(saved=saved)

    def drop_log(self, index: int) -> None:
        with self._changing_disk:
            with self._lock:
                # What others hold may be applied, and saved, before this disk is known to have it.
                index = min(index, self._core.log.stable_index + 1)
            first_index = self._disk.drop_before(index)
        with self._lock:
            self._core.compacted_to(first_index)

    def snapshot_ended(self, member_id: MemberId, index: int | None) -> None:
        with self._lock:
            self._core.snapshot_ended(member_id, index)
            effects = self._pump_locked()
        self._settle(effects)

    def post(self, message: Message) -> None:
        with self._lock:
            effects = self._post_locked([message])
        _run(effects)

    def answer_chunk(
        self, chunk: SnapshotChunk, received_bytes: int, outcome: SnapshotOutcome
    ) -> None:
        with self._lock:
            self._core.answer_chunk(chunk, received_bytes, outcome)
            effects = self._pump_locked()
        self._settle(effects)

    def install(self, snapshot: Snapshot, received: KeyValueStore, rename: Effect) -> bool:
        with self._lock:
            while self._applying:
                self._apply_over.wait()
            if self._applied_index >= snapshot.index:
                return False
            self._applying = True  # nobody else touches the store
        rename()
        with self.store_lock:
            self.store.adopt(received)
            with self._lock:
                self._core.restore(snapshot)
                self._applying = False
                self._applied_index = snapshot.index
                effects = self._pump_locked()
        self._settle(effects)
        return True

    # ---- Threads raft-recv-NAME ----------------------------------------------------------------

    def on_connected(self, hello: Hello) -> None:
        """A peer has dialled us (of the listener)."""
        peer = Member(hello.sender, hello.node_id, hello.host, 0, hello.peer_port, voter=False)
        with self._lock:
            self._links.connected[hello.sender] = hello.boot_id
            # It need not be in our membership: a new leader, or any at all for a new member. It
            # must get its answers all the same (raft-traps T62).
            effects: list[Effect] = [self._links.to(peer)]
            # Answers on its old connection, or before it had one, are lost: ask anew.
            self._core.link_up(hello.sender)
            effects += self._pump_locked()
        self._settle(effects)
        self._keeper.resend(hello.sender)

    def on_disconnected(self, member_id: MemberId) -> None:
        """A peer's connection to us is gone (of the listener)."""
        with self._lock:
            self._links.connected.pop(member_id, None)
            effects = self._weigh_death_locked(member_id)
        self._settle(effects)

    def on_messages(self, messages: Sequence[Message]) -> None:
        """A peer's messages (of the listener): one write and one answer for all of them.

        Raises FrameError for one that no server of ours can have sent.
        """
        lie: ImpossibleMessageError | None = None
        with self._lock:
            core = self._core
            effects: list[Effect] = []
            for message in messages:
                if isinstance(message, HashReport):
                    effects += self._take_report_locked(message)
                    continue
                try:
                    core.step(message)
                except ImpossibleMessageError as error:
                    lie = error
                    break
                if isinstance(message, SnapshotChunk):
                    if message.sender == core.leader_id and message.term == core.term:
                        effects.append(partial(self._keeper.on_chunk, message))
                elif isinstance(message, SnapshotReply) and message.term == core.term:
                    effects.append(partial(self._keeper.on_reply, message))
            effects += self._pump_locked()
            leads = core.role is Role.LEADER
            if leads and core.has_ready:
                self._ready_due.notify()
        if leads:
            # Its answers from peers must not wait for its own disk. The clients' come first, as in
            # ``_write``.
            self._apply_committed()
            _run(effects)
        else:
            self._settle(effects)
        if lie is not None:
            raise FrameError(str(lie))

    def _take_report_locked(self, report: HashReport) -> list[Effect]:
        core, audit = self._core, self._audit
        if report.term != core.term:
            return []
        was_well, known = not audit.trouble, audit.finding
        leads = core.role is Role.LEADER
        effects = self._post_locked(audit.on_report(report, core.membership, leads=leads))
        if audit.trouble and was_well:
            core.step_down()
            effects.append(partial(log.critical, "%s", audit.trouble))
        elif audit.finding not in ("", known):
            text = "%s at index=%d"
            effects.append(partial(log.error, text, audit.finding, report.applied_index))
        return effects


def _run(effects: Sequence[Effect]) -> None:
    for effect in effects:
        effect()
