"""Starts, watches and stops the nodes of a cluster on this host; a program and a library.

Rule 1: a cluster is founded once. ``--primary`` is given to node1 only while no founding record
(``cluster.json``) stands beside the node directories and none of these holds data; a node that
lost its directory joins again, and never founds a second cluster.
Rule 2: the nodes outlive the manager. Whatever fails, only what this start started is stopped.

Files, under the data directory: ``node1/`` (the node's own), ``node1.log`` (its output, appended),
``node1.pid`` (there from the start until an orderly stop), ``cluster.json``, ``cluster.lock``.

Thread ``main`` calls everything here; a pool asks all nodes at once. The nodes' processes are in
``cluster_nodes.py``. Read on in ``kv_store_server.py``, which is what is started.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final

import psutil
from rich.console import Console
from rich.live import Live
from rich.text import Text

from cluster_nodes import (
    NODES_DEFAULT,
    POLL_S,
    RECORD_NAME,
    ClusterBusyError,
    ClusterStatus,
    LocalNodes,
    ManagerError,
    Member,
    Node,
    Processes,
    Record,
    RefusedError,
    Report,
    Restarts,
    Spawn,
    ask,
    counted,
    ending,
    is_free,
    picture,
    port_user,
    receive_backup,
    replace_durably,
)
from kv_config import EXIT_CONFIG, EXIT_REMOVED, PEER_PORT_OFFSET, Address, ConfigError
from state_db import StateDbError, verify_stream

__all__ = ["ClusterBusyError", "ClusterManager", "ManagerError", "main"]

BASE_PORT_DEFAULT: Final = 6379
SERVER_SCRIPT: Final = Path(__file__).with_name("kv_store_server.py")
START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 10.0  # as Docker's, before it kills
TAKE_BACK_TIMEOUT_S: Final = 10.0
COMMAND_TIMEOUT_S: Final = 10.0  # a transfer of leadership ends within an election timeout
HAND_OVER_TIMEOUT_S: Final = 15.0  # so long it is asked for again while the primary is busy
REFUSED_FOR_NOW: Final = ("BUSY", "NO_PRIMARY", "NOT_PRIMARY")
WATCH_S: Final = 0.5
NOT_RUNNING: Final = "The cluster is not running."
DIALLED_PORTS_FROM: Final = 32768  # Linux' default
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT

# ---- What is waited for --------------------------------------------------------------------------


def _waiting(status: ClusterStatus, node_ids: Iterable[str], committed: int) -> str:
    """What is missing until these nodes have their vote and ``committed`` applied; "" if nothing.

    A learner that is to stay one needs no vote.
    """
    rows = [status.row(node_id) for node_id in node_ids]
    for node in rows:
        if node.problem:
            return f"{node.node_id} {node.problem}"
    if status.primary is None:
        return "no primary is elected"
    for node in rows:
        if node.installing is not None:
            return f"{node.node_id} is installing a snapshot: {node.installing:.0%}"
        if not (node.voter or node.learner):
            return f"{node.node_id} is not a voter yet"
        if (node.applied_index or 0) < committed:
            return f"{node.node_id} has applied {node.applied_index} of {committed} entries"
    return ""


def _risk(status: ClusterStatus, without: str, *, voters: int) -> str:
    """Why the cluster, then of so many voters, can't do without that node; "" if it can."""
    left, needed = len(status.following - {without}), voters // 2 + 1
    if status.healthy and left >= needed:
        return ""
    if not status.healthy:
        return "no majority of the voters follows a primary"
    return f"it takes {needed} of {counted(voters, 'voter')}, and {left} would be left"


class NodeError(ManagerError):
    """One node cannot go on as it is."""

    def __init__(self, node: Node, message: str) -> None:
        super().__init__(f"{node.node_id} {message}")
        self.node = node


class RemovedError(NodeError):
    """The node was removed from the cluster."""

    def __init__(self, node: Node) -> None:
        super().__init__(node, "was removed from the cluster")


def verify(path: Path) -> str:
    """What a backup holds, in words. Raises ManagerError if it is not intact to the last byte."""
    try:
        if not path.is_file():
            raise ManagerError(f"{path} is no file")
        header = verify_stream(path)
    except (StateDbError, OSError) as error:
        raise ManagerError(str(error)) from error
    return f"{counted(header.keys, 'key')}, the state after entry {header.applied_index}"


def _answers(member: Member) -> bool:
    with suppress(OSError, ValueError):
        return ask((member.host, member.port), "STATUS").get("member_id") == member.member_id
    return False


# ---- The manager ---------------------------------------------------------------------------------


def _nothing(_: str) -> None:
    """A report that nobody wants."""


class ClusterManager:
    """The nodes of one data directory. For one thread; two managers exclude each other by a lock.

    ``nodes`` and ``base_port`` are for the founding; later what is recorded counts, except that
    ``start`` adds the nodes that there are too few of. ``base_port=None`` takes free ports.
    ``server_args`` go to every node. Raises ConfigError if the nodes would refuse their settings.
    """

    def __init__(
        self,
        nodes: int | None = None,
        base_port: int | None = BASE_PORT_DEFAULT,
        data_dir: Path = Path("data"),
        server_args: Sequence[str] | None = None,
        *,
        spawn: Spawn = psutil.Popen,
        clock: Callable[[], float] = time.monotonic,
        python: str = sys.executable,
        server_script: Path = SERVER_SCRIPT,
        start_timeout_s: float = START_TIMEOUT_S,
        stop_timeout_s: float = STOP_TIMEOUT_S,
    ) -> None:
        self.data_dir = data_dir
        self._clock = clock
        self._start_timeout_s = start_timeout_s
        self._processes = Processes(spawn, clock, stop_timeout_s)
        program = (python, str(server_script))
        self._local = LocalNodes(nodes, base_port, data_dir, server_args, program, self._processes)
        self._restarts: defaultdict[str, Restarts] = defaultdict(Restarts)  # by node id

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self._local.nodes

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where clients find the nodes."""
        return tuple(node.address for node in self.nodes)

    @property
    def is_founded(self) -> bool:
        """Whether a cluster was founded in this data directory."""
        return self._local.record is not None

    def node(self, node_id: str) -> Node:
        return self._local.node(node_id)

    def status(self) -> ClusterStatus:
        """The cluster as it is now; it takes no longer than one slow answer."""
        self._local.load()
        return self._local.status()

    # ---- Start ----

    def start(self, report: Report = print, progress: Report = _nothing) -> None:
        """Start what does not run, and wait until all are voters that answer.

        Raises ManagerError with the reason. What it had started for a new cluster is stopped then;
        nodes of a cluster that has data are left running, but for one that failed.
        """
        with self._local.exclusively():
            self._start_locked(report, progress)

    def _start_locked(
        self, report: Report, progress: Report, restore_from: Path | None = None
    ) -> None:
        deadline = self._clock() + self._start_timeout_s
        self._local.grow()
        missing = [node for node in self.nodes if not self._processes.find(node)]
        founding = self._check_may_start(missing)
        count = len(self.nodes)
        if not missing:
            self._await_ready(self.nodes, deadline, progress)
            runs = f"{counted(count, 'node')}, primary {self.status().primary}"
            report(f"The cluster runs already ({runs}).")
            return
        if len(missing) == count:
            kinds = f"1 primary + {count - 1} secondary"
            report(f"Starting KV Store Cluster ({counted(count, 'node')}: {kinds})...")
        else:
            report(f"{count - len(missing)} of {counted(count, 'node')} run already.")
        started: list[Node] = []
        try:
            for node in missing:
                # Who is elected after a restart is not known yet: node1 is named, as at founding.
                first = len(missing) == count and node is self.nodes[0]
                role = "PRIMARY" if first else "LEARNER" if node.learner else "SECONDARY"
                report(f"Starting {node.node_id} on port {node.port} ({role})...")
                started.append(node)
                founds = founding and first
                self._local.spawn(
                    node, founds=founds, restore_from=restore_from if founds else None
                )
                if founds:
                    self._await_founded(node, deadline, progress)
            self._await_all(report, deadline, progress)
        except ManagerError as error:
            if isinstance(error, NodeError):
                self._processes.end([error.node], _nothing)
            if founding:
                self._processes.end(started, _nothing)
                raise
            left = "What runs is left so: --action status shows it, --action stop ends it."
            if self._has_majority(deadline, progress):
                left = "A majority of the nodes runs, and is left so."
            raise ManagerError(f"{error}\n{left}") from error
        except BaseException:
            if founding:
                self._processes.end(started, _nothing)
            raise
        report("Cluster started successfully!")

    def _has_majority(self, deadline: float, progress: Report) -> bool:
        """Whether what runs comes to have a primary, if it is enough to."""
        while not self._local.status().healthy:
            running = sum(bool(self._processes.find(node)) for node in self.nodes)
            if 2 * running <= len(self.nodes) or self._clock() > deadline:
                return False
            progress("the others elect a primary")
            time.sleep(POLL_S)
        return True

    def _check_may_start(self, missing: Sequence[Node]) -> bool:
        """True if node1 is to found the cluster. Raises ManagerError if a start must fail."""
        for node in missing:
            for port, users in ((node.port, "clients"), (node.peer_port, "peers")):
                if not is_free(node.listen_host, port):
                    hint = "end that process, or give another --base-port"
                    if port >= DIALLED_PORTS_FROM:
                        hint += (
                            f" (below {DIALLED_PORTS_FROM - PEER_PORT_OFFSET}: the system gives "
                            f"ports from {DIALLED_PORTS_FROM} on to connections that are dialled)"
                        )
                    raise ManagerError(
                        f"port {port} ({node.node_id}, for {users}) is in use by "
                        f"{port_user(port)}: {hint}"
                    )
        nobody = len(missing) == len(self.nodes) and not any(n.holds_data() for n in self.nodes)
        if self._local.record and nobody and not self.nodes[0].in_memory:
            raise ManagerError(
                f"no node directory in {self.data_dir} holds data any more, but a cluster was "
                f"founded there. Restore the directories; or, if the data may be given up, remove "
                f"{self._local.record_path}, and a new cluster is founded"
            )
        return nobody

    def _await_founded(self, node: Node, deadline: float, progress: Report) -> None:
        """Wait until the first node has founded its cluster, and record which one that is."""
        while not (cluster_id := self._processes.look(node).cluster_id):
            self._check_alive((node,))
            progress(f"{node.node_id} founds the cluster")
            self._pause(deadline, f"{node.node_id} has not founded the cluster")
        self._local.founded(cluster_id)

    def _await_all(self, report: Report, deadline: float, progress: Report) -> None:
        """Wait until all are ready; forget those that turn out to be no members any more."""
        while True:
            try:
                status = self._await_ready(self.nodes, deadline, progress)
            except RemovedError as error:
                report(f"{error}. {self._forget(error.node)}")
            else:
                assert status.cluster_id is not None
                self._local.founded(status.cluster_id)
                return

    def _await_ready(
        self, nodes: Sequence[Node], deadline: float, progress: Report
    ) -> ClusterStatus:
        """Wait until the nodes are voters that answer and have what was committed by then."""
        node_ids = [node.node_id for node in nodes]
        committed = 0
        while True:
            self._check_alive(nodes)
            status = self._local.status()
            self._check_belongs(nodes, status)
            waiting = _waiting(status, node_ids, committed)
            if not waiting and not committed:
                # A mark that stands still: under load no secondary is ever level with the primary.
                committed = max(node.commit_index or 0 for node in status.nodes)
                waiting = _waiting(status, node_ids, committed)
            if not waiting:
                return status
            progress(waiting)
            self._pause(deadline, waiting)

    def _pause(self, deadline: float, waiting: str) -> None:
        if self._clock() > deadline:
            stuck = [node for node in self.nodes if waiting.startswith(f"{node.node_id} ")]
            more = f"See {self.data_dir / 'node*.log'}."
            if stuck and stuck[0].log.exists():
                more = self._processes.log_end(stuck[0])
            raise ManagerError(f"the cluster is not ready in time: {waiting}. {more}")
        time.sleep(POLL_S)

    def _check_alive(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if not self._processes.find(node):
                status = self._processes.exit_status(node)
                if status == EXIT_REMOVED:
                    raise RemovedError(node)
                log_end = self._processes.log_end(node)
                raise NodeError(node, f"{ending(status)} while it was starting. {log_end}")

    def _check_belongs(self, nodes: Iterable[Node], status: ClusterStatus) -> None:
        """Raises NodeError if one of ``nodes`` is of another cluster, or was removed from this."""
        record = self._local.record
        ids = {node.node_id: node.cluster_id for node in status.nodes if node.cluster_id}
        where, expected = next(iter(ids.items()), ("", None))
        if record:
            where, expected = str(self._local.record_path), record.cluster_id
        for node in nodes:
            if ids.get(node.node_id, expected) != expected:
                raise NodeError(
                    node,
                    f"belongs to cluster {ids[node.node_id]}, but {where} says {expected}: "
                    f"{node.directory} comes from another cluster. Move it away, and "
                    f"{node.node_id} joins this one as a new member",
                )
            # Only a majority's word: an old primary may not know the newest members.
            if status.healthy and status.row(node.node_id).removed:
                raise RemovedError(node)

    # ---- Stop, restart ----

    def stop(self, report: Report = print) -> None:
        """Stop what runs: secondaries first, SIGTERM, and SIGKILL after the deadline."""
        if not self.data_dir.is_dir():
            report(NOT_RUNNING)  # and no directory is made to say so
            return
        with self._local.exclusively():
            if not any(self._processes.find(node) for node in self.nodes):
                report(NOT_RUNNING)
                if any(node.alive for node in self._local.status().nodes):
                    report(f"(What answers on its ports was not started from {self.data_dir}.)")
            else:
                # The primary last, so that no election is held among nodes that are about to stop.
                primary = self._local.status().primary
                self._processes.end([n for n in self.nodes if n.node_id != primary], report)
                self._processes.end([n for n in self.nodes if n.node_id == primary], report)
                report("Cluster stopped.")
            for node in self.nodes:
                node.bury()  # what has died long ago, too

    def restart(self, report: Report = print, progress: Report = _nothing) -> None:
        """Restart one node after the other, the primary last, while the rest goes on serving.

        Raises ManagerError, and leaves the others as they are, if a node does not come back or if
        a majority would be at risk.
        """
        with self._local.exclusively():
            if not any(self._processes.find(node) for node in self.nodes):
                report(NOT_RUNNING)
                self._start_locked(report, progress)
                return
            left, count = list(self.nodes), len(self.nodes)
            while left:
                node = self._next_to_restart(left)
                number = f"{count - len(left) + 1} of {count}"
                try:
                    self._restart_one(node, number, report, progress)
                except RemovedError as error:
                    report(f"{error}. {self._forget(error.node)}")
                except ManagerError as error:
                    names = ", ".join(each.node_id for each in left)
                    raise ManagerError(f"{error}\nStill to be restarted: {names}.") from error
                left.remove(node)
            report(f"All nodes were restarted; {self._local.status().tolerance}.")

    def _next_to_restart(self, left: Sequence[Node]) -> Node:
        """One that does not run before one that does, and the primary last, whoever it is now."""
        primary = self._local.status().primary
        return min(
            left, key=lambda node: (node.node_id == primary, bool(self._processes.find(node)))
        )

    def _restart_one(self, node: Node, number: str, report: Report, progress: Report) -> None:
        if self._processes.find(node):
            status = self._local.status()
            risk = _risk(status, node.node_id, voters=status.voters)
            if risk and not node.learner:
                raise ManagerError(
                    f"{node.node_id} is not restarted now: {risk} (--action stop and --action "
                    "start restart all at once)"
                )
            if node.node_id == status.primary:
                self._hand_over(node.node_id, None, report, progress)
        report(f"Restarting {node.node_id} ({number})...")
        try:
            self._processes.end([node], _nothing)
        finally:
            self._local.spawn(node)  # also if one lost patience: it was not to stay down
        self._await_ready([node], self._clock() + self._start_timeout_s, progress)

    # ---- Members ----

    def failover(
        self, to: str | None = None, report: Report = print, progress: Report = _nothing
    ) -> None:
        """Have the primary hand over to ``to``, or to the voter that is most up to date."""
        with self._local.exclusively():
            status = self._need_primary()
            assert status.primary is not None
            if to == status.primary:
                report(f"{to} is the primary already.")
            elif status.voters == 1:
                raise ManagerError(f"{status.primary} is the only voter: nobody else can lead")
            else:
                self._hand_over(status.primary, to, report, progress)

    def _hand_over(self, old: str, to: str | None, report: Report, progress: Report) -> None:
        def done(status: ClusterStatus) -> bool:
            return status.primary not in (None, old) and to in (None, status.primary)

        command = f"FAILOVER TO {to}" if to else "FAILOVER"
        status = self._tell_primary(command, done, progress, HAND_OVER_TIMEOUT_S)
        report(f"{status.primary} is the primary now, in place of {old}.")

    def add(
        self,
        node_id: str,
        learner: bool = False,
        report: Report = print,
        progress: Report = _nothing,
    ) -> None:
        """Start one more node, on the next free port, and wait until it is a voter.

        A ``learner`` never votes: wait until it has caught up. Raises ManagerError, and takes
        everything back, if it does not come to that.
        """
        with self._local.exclusively():
            status = self._need_primary()
            if member := status.member(node_id):
                raise ManagerError(
                    f"there is a {node_id} already, at {member.host}:{member.port} (to bring it "
                    "back after its directory or its machine was lost: --action replace)"
                )
            for node in self.nodes:
                if node.node_id == node_id:  # it was removed, but is still on our list
                    report(self._forget(node))
            node = self._local.new_place(node_id, learner=learner)
            try:
                self._bring_in(node, report, progress)
            except ManagerError as error:
                self._take_back(node_id, report)
                raise ManagerError(f"{node_id} was not added: {error}") from error
            except BaseException:
                self._take_back(node_id, report)
                raise

    def _take_back(self, node_id: str, report: Report) -> None:
        try:
            self._take_out(node_id, report, _nothing, within_s=TAKE_BACK_TIMEOUT_S)
        except ManagerError as error:
            # It may have its vote already: without its process there might be no majority.
            report(f"{node_id} can't be taken back now ({error}): --action remove does so later.")

    def remove(self, node_id: str, report: Report = print, progress: Report = _nothing) -> None:
        """Make the node a member no more, end its process, and set its directory aside."""
        with self._local.exclusively():
            status = self._need_primary()
            ours = any(node.node_id == node_id for node in self.nodes)
            if not ours and status.member(node_id) is None:
                names = ", ".join(member.node_id for member in status.members)
                raise ManagerError(f"there is no {node_id} in this cluster of {names}")
            self._check_may_lose(node_id, status)
            if status.primary == node_id:
                self._hand_over(node_id, None, report, progress)
            self._take_out(node_id, report, progress)
            report(f"{self._local.status().tolerance}.")

    def replace(self, node_id: str, report: Report = print, progress: Report = _nothing) -> None:
        """Remove a member whose directory or machine was lost, and start a new one of that name."""
        with self._local.exclusively():
            status = self._need_primary()
            node = next((node for node in self.nodes if node.node_id == node_id), None)
            member = status.member(node_id)
            if node is None and member is None:
                raise ManagerError(f"there is no {node_id} to replace: --action add brings it in")
            if (node and self._processes.find(node)) or (member and _answers(member)):
                raise ManagerError(
                    f"{node_id} runs, and is replaced only when it is lost. A running node leaves "
                    "with --action remove, and comes back as a new one with --action add"
                )
            self._check_may_lose(node_id, status)
            new = node or self._local.new_place(node_id)
            self._take_out(node_id, report, progress)
            self._bring_in(new, report, progress)

    # ---- Backups ----

    def backup(self, path: Path, report: Report = print, progress: Report = _nothing) -> None:
        """Write the primary's state to a file, which is checked before it gets its name."""
        status = self._need_primary()
        assert status.primary is not None
        partial = path.with_name(f"{path.name}.partial")
        try:
            receive_backup(self.node(status.primary).reached_at, partial, progress)
            progress("checking what has arrived")
            found = verify(partial)
            replace_durably(partial, path)
        except (ManagerError, OSError, ValueError) as error:
            raise ManagerError(f"no backup was made: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
        report(f"{path} holds {found}.")

    def restore(
        self,
        path: Path,
        force: bool = False,
        report: Report = print,
        progress: Report = _nothing,
    ) -> None:
        """Found a new cluster that begins with a backup.

        ``force`` sets the directories of an old cluster aside. Raises ManagerError.
        """
        with self._local.exclusively():
            running = [node.node_id for node in self.nodes if self._processes.find(node)]
            if running:
                raise ManagerError(
                    f"{', '.join(running)} run: a restored cluster is a new one, so end the old "
                    "one first (--action stop)"
                )
            if any(node.holds_data() for node in self.nodes) and not force:
                raise ManagerError(
                    f"a cluster has its data in {self.data_dir}: with --force that is set aside, "
                    "and the restored cluster takes its place"
                )
            progress("checking the backup")
            found = verify(path)
            if aside := self._local.set_all_aside():
                report(f"What was there before is kept in {aside}.")
            self._start_locked(report, progress, restore_from=path)
            assert self._local.record is not None
            report(f"Cluster {self._local.record.cluster_id} has {found}.")

    def _need_primary(self) -> ClusterStatus:
        """The status, with a primary and its members in it. Raises ManagerError otherwise."""
        status = self._local.status()
        if not status.healthy or not status.members:
            raise ManagerError(
                "no majority of the voters follows a primary, and without one nothing can be "
                "changed (--action status says more, --action start starts what is missing)"
            )
        return status

    def _check_may_lose(self, node_id: str, status: ClusterStatus) -> None:
        member = status.member(node_id)
        if member is None or not member.voter:
            return
        if status.voters == 1:
            raise ManagerError(f"{node_id} is the last voter: --action stop ends the cluster")
        if risk := _risk(status, node_id, voters=status.voters - 1):
            raise ManagerError(f"{node_id} is not removed now: without it, {risk}")

    def _tell_primary(
        self,
        command: str,
        done: Callable[[ClusterStatus], bool],
        progress: Report,
        within_s: float | None = None,
    ) -> ClusterStatus:
        """Give the primary a command, again while it is busy or lost, until the status is so."""
        deadline = self._clock() + (within_s or self._start_timeout_s)
        accepted = False
        while not done(status := self._local.status()):
            waiting = f"{command} is not done yet"
            if status.primary and not accepted:
                try:
                    ask(self.node(status.primary).reached_at, command, COMMAND_TIMEOUT_S)
                    accepted = True
                except RefusedError as error:
                    if error.code not in REFUSED_FOR_NOW:
                        raise ManagerError(
                            f"{status.primary} refuses {command}: {error.message}"
                        ) from error
                    waiting = f"{command}: {error.message}"
                except (OSError, ValueError) as error:
                    waiting = f"{command}: {error}"
            progress(waiting)
            self._pause(deadline, waiting)
        return status

    def _take_out(
        self, node_id: str, report: Report, progress: Report, within_s: float | None = None
    ) -> None:
        """Remove the member, if there is one, and then the node, if it is ours; repeatable."""

        def gone(status: ClusterStatus) -> bool:
            return bool(status.members) and status.member(node_id) is None

        if not gone(self._local.status()):
            self._tell_primary(f"MEMBER REMOVE {node_id}", gone, progress, within_s)
            report(f"{node_id} is no longer a member.")
        for node in self.nodes:
            if node.node_id == node_id:
                report(self._forget(node))

    def _forget(self, node: Node) -> str:
        """End what runs of a removed node, and take it off the record; what became of its data."""
        self._processes.end([node], _nothing)
        aside = self._local.forget(node, "removed")
        kept = f"its data is kept in {aside}" if aside else "it had no data on disk"
        return f"{node.node_id} has ended; {kept}."

    def _bring_in(self, node: Node, report: Report, progress: Report) -> None:
        """Start a node that is to be a new member, and wait until it is."""
        self._local.remember(node)  # before it runs: nobody else would know of its process
        role = "LEARNER" if node.learner else "SECONDARY"
        report(f"Starting {node.node_id} on port {node.port} ({role})...")
        self._local.spawn(node)
        status = self._await_ready([node], self._clock() + self._start_timeout_s, progress)
        what = "has caught up, and stays a learner" if node.learner else "is a voter"
        report(f"{node.node_id} {what}; {status.tolerance}.")

    # ---- One node, for tests, demos and the monitor ----

    def start_node(self, node_id: str) -> int:
        """Start a node that does not run, without waiting for it; the pid of its process."""
        with self._local.exclusively():
            node = self.node(node_id)
            if process := self._processes.find(node):
                raise ManagerError(f"{node_id} runs already, with pid {process.pid}")
            return self._local.spawn(node)

    def kill_node(self, node_id: str) -> None:
        """SIGKILL: the node ends at once, as in a crash. Its pid file stays."""
        self._processes.kill(self.node(node_id), self._running(node_id))

    def suspend(self, node_id: str) -> None:
        """SIGSTOP: the node hangs, with its connections open, until ``resume``."""
        self._running(node_id).suspend()

    def resume(self, node_id: str) -> None:
        self._running(node_id).resume()

    def _running(self, node_id: str) -> psutil.Process:
        process = self._processes.find(self.node(node_id))
        if process is None:
            raise ManagerError(f"{node_id} does not run")
        return process

    # ---- Monitor ----

    def monitor(
        self,
        report: Report = print,
        stop: threading.Event | None = None,
        show: Callable[[ClusterStatus], object] | None = None,
    ) -> None:
        """Restart nodes that die, until ``stop`` is set; leave alone what was stopped on purpose."""
        stop = stop or threading.Event()
        while not stop.wait(WATCH_S):
            for event in self.watch():
                report(event)
            if show:
                show(self.status())

    def watch(self) -> list[str]:
        """Look at every process once, restart what is due, and say what was done."""
        with suppress(ClusterBusyError), self._local.exclusively(wait_s=0):
            return [event for node in self.nodes for event in self._watch_locked(node)]
        return []  # someone starts or stops the nodes: what is missing now is no failure

    def _watch_locked(self, node: Node) -> Iterator[str]:
        restarts, now = self._restarts[node.node_id], self._clock()
        if self._processes.find(node) or not node.pid_file.exists():
            # It runs, or was stopped on purpose, which is no death either.
            restarts.due, restarts.given_up = None, False
        elif restarts.due is None and not restarts.given_up:
            status = self._processes.exit_status(node)
            if status in (EXIT_CONFIG, EXIT_REMOVED):
                restarts.given_up = True
                why = "its data or its cluster is wrong"
                if status == EXIT_REMOVED:
                    why = "it was removed from the cluster"
                yield (
                    f"{node.node_id} exited with status {status}: {why}, so it is not restarted. "
                    f"{self._processes.log_end(node)}"
                )
                return
            pause_s = restarts.died(now)
            when = f"in {pause_s:g} s" if pause_s else "now"
            yield f"{node.node_id} {ending(status)}; it is restarted {when}."
        if restarts.due is not None and restarts.due <= now:
            pid = self._local.spawn(node)
            restarts.due, restarts.started = None, now
            yield f"{node.node_id} was restarted with pid {pid}."


# ---- The program ---------------------------------------------------------------------------------


def _console() -> Console:
    # Rich takes a pipe to be 80 columns wide, and would cut the table to fit.
    return Console() if sys.stdout.isatty() else Console(width=200)


_EPILOG = """\
actions:
  start     found the cluster, or resume it; returns once all nodes are voters that answer. Started
            twice, it says that the cluster runs already; nodes that are missing are started, and
            with a higher --nodes new ones are added
  status    one row a node, and how many failures are tolerated now (--json: the same for scripts)
  stop      secondaries first, then the primary; SIGKILL for what does not stop within 10 s
  restart   one node after the other while the rest serves: what is down, the secondaries, the
            primary after it has handed over. Ends where a majority would be at risk
  monitor   stay in the foreground, restart nodes that die (after 0, 1, 2, 4 ... 30 s) and show the
            status live; resumes the cluster if nothing runs. Ctrl-C leaves the nodes running
  add       --node-id NAME [--learner]: one more node, on the next free port; returns once it is a
            voter, or a learner that has caught up. If that fails, it is taken back
  remove    --node-id NAME: a member no more; its process ends, its directory is set aside
  replace   --node-id NAME: for a node whose directory or machine is lost; the old member is removed
            and a new one of that name takes its place
  failover  [--to NAME]: the primary hands over to that node, or to the one that is most up to date
  backup    --to FILE: the primary's state while it serves; checked, and only then given its name
  verify    FILE: is this backup intact to the last byte, and what does it hold
  restore   --from FILE [--force]: found a new cluster that begins with a backup; what a cluster has
            left here is set aside, and only with --force

examples:
  %(prog)s --action start
  %(prog)s --action start --nodes 5 --base-port 7000 --data-dir elsewhere
  %(prog)s --action start -- --replication async --heartbeat-interval 0.5
  %(prog)s --action status --json
  %(prog)s --action add --node-id node4
  %(prog)s --action add --node-id copy1 --learner
  %(prog)s --action failover --to node2
  %(prog)s --action backup --to monday.kv && %(prog)s --action verify monday.kv
  %(prog)s --action restore --from monday.kv --data-dir elsewhere --base-port 7000

The nodes run on when this program ends. Their output is in DIR/node1.log and so on.
What stands after -- is given to every node that is started (kv_store_server.py --help lists it), and
remembered for later starts, until something else stands there; -- with nothing behind it is nothing.

exit status: 0 done (status: a majority is healthy), 1 failed (status: it is not), 2 wrong
arguments, 130 interrupted by Ctrl-C: a founding or an add has then taken back what it had started,
and nodes of a cluster that was there before run on.
"""

ACTIONS: Final = (
    *("start", "status", "stop", "restart", "monitor"),
    *("add", "remove", "replace", "failover"),
    *("backup", "verify", "restore"),
)
# By action, the options that go with it: True for those that it needs.
_OPTIONS: Final[Mapping[str, Mapping[str, bool]]] = {
    "status": {"--json": False},
    "add": {"--node-id": True, "--learner": False},
    "remove": {"--node-id": True},
    "replace": {"--node-id": True},
    "failover": {"--to": False},
    "backup": {"--to": True},
    "verify": {"FILE": True},
    "restore": {"--from": True, "--force": False},
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cluster_manager.py",
        usage="%(prog)s --action ACTION [--nodes N] [--base-port PORT] [--data-dir DIR] "
        "[-- SERVER-FLAGS]",
        description="Starts, watches, changes and stops a cluster of key-value nodes on this host.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--action", required=True, choices=ACTIONS, metavar="ACTION", help=" | ".join(ACTIONS))
    founded = "as it was founded, else"
    add("--nodes", type=int, metavar="N", help=f"(default: {founded} {NODES_DEFAULT})")
    ports = f"node1's port; node2 has the next; for peers they are {PEER_PORT_OFFSET} higher"
    default = f"(default: {founded} {BASE_PORT_DEFAULT})"
    add("--base-port", type=int, metavar="PORT", help=f"{ports} {default}")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="(default: data)")
    limit = "how long to wait for a node or a change (default: %(default)g)"
    add("--timeout", type=_seconds, default=START_TIMEOUT_S, metavar="SECONDS", help=limit)
    add("--node-id", metavar="NAME", help="with add, remove, replace: which node")
    add("--learner", action="store_true", help="with add: a read copy, which never votes")
    add("--to", metavar="NAME|FILE", help="with failover: who is to lead; with backup: the file")
    add("--from", metavar="FILE", type=Path, help="with restore: a file that backup has made")
    add("--force", action="store_true", help="with restore: set data that is there aside")
    add("file", metavar="FILE", type=Path, nargs="?", help="with verify: a file of backup's")
    add("--json", action="store_true", help="with status: JSON instead of a table")
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError
    return seconds


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Leave with exit status 2 if an option does not go with the action, or is missing."""
    fitting = _OPTIONS.get(options.action, {})
    for name in sorted({name for options_of in _OPTIONS.values() for name in options_of}):
        given = bool(getattr(options, name.lower().removeprefix("--").replace("-", "_")))
        if given and name not in fitting:
            actions = " or ".join(action for action, its in _OPTIONS.items() if name in its)
            parser.error(f"{name} goes with --action {actions} only")
        if not given and fitting.get(name):
            parser.error(f"--action {options.action} needs {name}")


def main(argv: Sequence[str], server_script: Path = SERVER_SCRIPT) -> int:
    """Do what the command line says; the exit status."""
    words = list(argv)
    split = words.index("--") if "--" in words else len(words)
    parser = _parser()
    options, unknown = parser.parse_known_args(words[:split])
    if unknown:
        hint = "what is meant for the servers stands behind --"
        parser.error(f"unrecognized arguments: {' '.join(unknown)} ({hint})")
    _check_options(parser, options)
    base_port = options.base_port
    try:
        if options.action == "verify":
            _say(f"{options.file} is intact: {verify(options.file)}.")
            return 0
        if base_port is None and Record.load(options.data_dir / RECORD_NAME) is None:
            base_port = BASE_PORT_DEFAULT
        manager = ClusterManager(
            options.nodes,
            base_port,
            options.data_dir,
            words[split + 1 :] if "--" in words else None,
            server_script=server_script,
            start_timeout_s=options.timeout,
        )
        return _act(manager, options)
    except ConfigError as error:
        print(f"cluster_manager: {error}\nTry --help.", file=sys.stderr)
        return 2
    except (ManagerError, psutil.Error, OSError) as error:
        print(f"cluster_manager: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cluster_manager: interrupted; --action status shows what runs", file=sys.stderr)
        return EXIT_INTERRUPTED


def _say(text: str) -> None:
    """A line of the result. That nobody reads any more is no reason to stop half-way."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _act(manager: ClusterManager, options: argparse.Namespace) -> int:
    report = _say
    progress = _progress() if sys.stderr.isatty() else _nothing
    match options.action:
        case "status":
            status = manager.status()
            if options.json:
                print(json.dumps(asdict(status), indent=2))
            else:
                _console().print(picture(status))
            return 0 if status.healthy else 1
        case "start":
            manager.start(report, progress)
        case "stop":
            manager.stop(report)
        case "restart":
            manager.restart(report, progress)
        case "monitor":
            if not manager.is_founded:
                raise ManagerError(
                    f"there is no cluster in {manager.data_dir} to watch: --action start founds one"
                )
            if not any(node.alive for node in manager.status().nodes):
                manager.start(report, progress)
            _monitor(manager)
        case _:
            _change(manager, options, report, progress)
    return 0


def _change(
    manager: ClusterManager, options: argparse.Namespace, report: Report, progress: Report
) -> None:
    match options.action:
        case "add":
            manager.add(options.node_id, options.learner, report, progress)
        case "remove":
            manager.remove(options.node_id, report, progress)
        case "replace":
            manager.replace(options.node_id, report, progress)
        case "failover":
            manager.failover(options.to, report, progress)
        case "backup":
            manager.backup(Path(options.to), report, progress)
        case "restore":
            manager.restore(getattr(options, "from"), options.force, report, progress)


def _progress() -> Report:
    """Says on stderr what a start waits for, when that changes; stdout has its exact lines."""
    said = ""

    def progress(text: str) -> None:
        nonlocal said
        if text != said:
            print(f"  {text}", file=sys.stderr, flush=True)
        said = text

    return progress


def _monitor(manager: ClusterManager) -> None:
    console = _console()
    try:
        if console.is_terminal:
            with Live(picture(manager.status()), console=console, auto_refresh=False) as live:
                manager.monitor(
                    lambda event: console.print(Text(event)),
                    show=lambda status: live.update(picture(status), refresh=True),
                )
        else:
            manager.monitor(_say)
    except KeyboardInterrupt:
        print("The monitor ends; the nodes keep running (--action stop stops them).")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
