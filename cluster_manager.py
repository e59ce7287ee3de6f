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
import fcntl
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster_nodes import (
    POLL_S,
    ClusterStatus,
    ManagerError,
    Node,
    NodeStatus,
    Processes,
    Report,
    Spawn,
    counted,
    ending,
    free_ports,
    is_free,
    port_user,
    summarize,
    voters_of,
    write_durably,
)
from kv_config import (
    PEER_PORT_OFFSET,
    PORT_MAX,
    Address,
    ConfigError,
    format_address,
    parse_settings,
)

__all__ = ["ClusterBusyError", "ClusterManager", "ManagerError", "main"]

NODES_DEFAULT: Final = 3
BASE_PORT_DEFAULT: Final = 6379
SERVER_SCRIPT: Final = Path(__file__).with_name("kv_store_server.py")
START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 10.0  # as Docker's, before it kills
LOCK_TIMEOUT_S: Final = 5.0
WATCH_S: Final = 0.5
RECORD_NAME: Final = "cluster.json"
NOT_RUNNING: Final = "The cluster is not running."
# How a node ends that must not be restarted: wrong data, wrong cluster, removed (raft-traps T65).
EXIT_CONFIG: Final = os.EX_CONFIG
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
BACKOFF_S_MAX: Final = 30.0
STABLE_S: Final = 60.0  # a node that ran so long starts with a fresh back-off

# Given to every node by the manager, so not to be given after ``--``.
OWN_FLAGS: Final = ("--node-id", "--port", "--peer-port", "--data-dir", "--join", "--primary")


class ClusterBusyError(ManagerError):
    """Another manager starts or stops nodes of the same data directory."""


# ---- What is recorded and remembered -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Founding:
    """The record that a cluster was founded here, and with which shape."""

    cluster_id: str = ""
    nodes: int = NODES_DEFAULT
    base_port: int = BASE_PORT_DEFAULT

    @staticmethod
    def load(path: Path) -> Founding | None:
        try:
            fields = json.loads(path.read_bytes())
            return Founding(fields["cluster_id"], int(fields["nodes"]), int(fields["base_port"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ManagerError(
                f"{path} cannot be read ({error}). It says which cluster was founded here: "
                "restore it, or remove it; the nodes that have data keep it."
            ) from error


def _primary(nodes: Iterable[NodeStatus], founded: Founding | None) -> NodeStatus | None:
    """The primary of the highest term: one that was cut off may not know yet that it was."""
    claims = [node for node in nodes if node.role == "PRIMARY"]
    if founded:
        claims = [node for node in claims if node.cluster_id == founded.cluster_id]
    return max(claims, key=lambda node: node.term or 0, default=None)


@dataclass(slots=True)
class _Restarts:
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


def _waiting(status: ClusterStatus, committed: int) -> str:
    """What is missing until all are voters that have applied ``committed``; empty if nothing."""
    for node in status.nodes:
        if node.problem:
            return f"{node.node_id} {node.problem}"
    if status.primary is None:
        return "no primary is elected"
    for node in status.nodes:
        if not node.voter:
            return f"{node.node_id} is not a voter yet"
        if (node.applied_index or 0) < committed:
            return f"{node.node_id} has applied {node.applied_index} of {committed} entries"
    return ""


# ---- The manager ---------------------------------------------------------------------------------


def _nothing(_: str) -> None:
    """A report that nobody wants."""


class ClusterManager:
    """The nodes of one data directory. For one thread; two managers exclude each other by a lock.

    ``base_port=None`` takes free ports. ``server_args`` go to every node. Raises ConfigError if
    the nodes would refuse their settings.
    """

    def __init__(
        self,
        nodes: int = NODES_DEFAULT,
        base_port: int | None = BASE_PORT_DEFAULT,
        data_dir: Path = Path("data"),
        server_args: Sequence[str] = (),
        *,
        spawn: Spawn = psutil.Popen,
        clock: Callable[[], float] = time.monotonic,
        python: str = sys.executable,
        server_script: Path = SERVER_SCRIPT,
        start_timeout_s: float = START_TIMEOUT_S,
        stop_timeout_s: float = STOP_TIMEOUT_S,
    ) -> None:
        if nodes < 1:
            raise ConfigError(f"--nodes: a cluster has at least one node, not {nodes}")
        for word in server_args:
            if (flag := word.partition("=")[0]) in OWN_FLAGS:
                raise ConfigError(f"{flag} is given to each node by the manager: leave it out")
        self.data_dir = data_dir
        self._record_path = data_dir / RECORD_NAME
        self._base_port = free_ports(nodes)[0] if base_port is None else base_port
        self._server_args = tuple(server_args)
        self._clock = clock
        self._processes = Processes(spawn, clock, stop_timeout_s)
        self._program = (python, str(server_script))
        self._start_timeout_s = start_timeout_s
        self.nodes = tuple(self._place(number) for number in range(1, nodes + 1))
        self._restarts = {node.node_id: _Restarts() for node in self.nodes}

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where clients find the nodes."""
        return tuple(node.address for node in self.nodes)

    def node(self, node_id: str) -> Node:
        for node in self.nodes:
            if node.node_id == node_id:
                return node
        raise ManagerError(f"there is no {node_id} in this cluster of {len(self.nodes)}")

    # ---- Start ----

    def start(self, report: Report = print, progress: Report = _nothing) -> None:
        """Start what does not run, and wait until all are voters that answer.

        Raises ManagerError with the reason, after it has stopped what it had started.
        """
        with self._exclusively():
            self._start_locked(report, progress)

    def _start_locked(self, report: Report, progress: Report) -> None:
        deadline = self._clock() + self._start_timeout_s
        missing = [node for node in self.nodes if not self._processes.find(node)]
        founding = self._check_may_start(missing)
        count = len(self.nodes)
        if not missing:
            self._await_ready(deadline, progress)
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
                role = "PRIMARY" if first else "SECONDARY"
                report(f"Starting {node.node_id} on port {node.port} ({role})...")
                started.append(node)
                self._spawn(node, primary=founding and first)
                if founding and first:
                    self._await_founded(node, deadline, progress)
            self._await_ready(deadline, progress)
        except BaseException:
            self._processes.end(started, _nothing)
            raise
        report("Cluster started successfully!")

    def _check_may_start(self, missing: Sequence[Node]) -> bool:
        """True if node1 is to found the cluster. Raises ManagerError if a start must fail."""
        record = self._founding()
        if record and (record.base_port != self._base_port or record.nodes > len(self.nodes)):
            raise ManagerError(
                f"{self._record_path} says that this cluster has {record.nodes} nodes from port "
                f"{record.base_port} on: start it with --nodes {record.nodes} (or more) "
                f"--base-port {record.base_port}, or give another --data-dir"
            )
        for node in missing:
            for port, users in ((node.port, "clients"), (node.peer_port, "peers")):
                if not is_free(node.listen_host, port):
                    raise ManagerError(
                        f"port {port} ({node.node_id}, for {users}) is in use by "
                        f"{port_user(port)}: end that process, or give another --base-port"
                    )
        nobody = len(missing) == len(self.nodes) and not any(n.holds_data() for n in self.nodes)
        if record and nobody:
            raise ManagerError(
                f"no node directory in {self.data_dir} holds data any more, but a cluster was "
                f"founded there. Restore the directories; or, if the data may be given up, remove "
                f"{self._record_path}, and a new cluster is founded"
            )
        return nobody

    def _await_founded(self, node: Node, deadline: float, progress: Report) -> None:
        """Wait until the first node has founded its cluster, and record which one that is."""
        while not (cluster_id := self._processes.look(node).cluster_id):
            self._check_alive((node,))
            progress(f"{node.node_id} founds the cluster")
            self._pause(deadline, f"{node.node_id} has not founded the cluster")
        self._record(cluster_id)

    def _await_ready(self, deadline: float, progress: Report) -> None:
        """Wait until every node is a voter that answers and has what was committed by then."""
        committed = 0
        while True:
            self._check_alive(self.nodes)
            status = self.status()
            self._check_one_cluster(status)
            waiting = _waiting(status, committed)
            if not waiting and not committed:
                # A mark that stands still: under load no secondary is ever level with the primary.
                committed = max(node.commit_index or 0 for node in status.nodes)
                waiting = _waiting(status, committed)
            if not waiting:
                assert status.cluster_id is not None
                self._record(status.cluster_id)
                return
            progress(waiting)
            self._pause(deadline, waiting)

    def _pause(self, deadline: float, waiting: str) -> None:
        if self._clock() > deadline:
            logs = self.data_dir / "node*.log"
            raise ManagerError(f"the cluster is not ready in time: {waiting} (see {logs})")
        time.sleep(POLL_S)

    def _check_alive(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if not self._processes.find(node):
                how = ending(self._processes.exit_status(node))
                raise ManagerError(
                    f"{node.node_id} {how} while the cluster was starting. "
                    f"{self._processes.log_end(node)}"
                )

    def _check_one_cluster(self, status: ClusterStatus) -> None:
        ids = {node.node_id: node.cluster_id for node in status.nodes if node.cluster_id}
        record = self._founding()
        expected = record.cluster_id if record else next(iter(ids.values()), None)
        for node_id, cluster_id in ids.items():
            if cluster_id != expected:
                where = self._record_path if record else next(iter(ids))
                raise ManagerError(
                    f"{node_id} belongs to cluster {cluster_id}, but {where} says {expected}: "
                    f"{self.node(node_id).directory} comes from another cluster. Move it away, and "
                    f"{node_id} joins this one as a new member"
                )

    # ---- Stop, restart ----

    def stop(self, report: Report = print) -> None:
        """Stop what runs: secondaries first, SIGTERM, and SIGKILL after the deadline."""
        if not self.data_dir.is_dir():
            report(NOT_RUNNING)  # and no directory is made to say so
            return
        with self._exclusively():
            self._stop_locked(report)

    def restart(self, report: Report = print, progress: Report = _nothing) -> None:
        """Stop everything and start it again."""
        with self._exclusively():
            self._stop_locked(report)
            self._start_locked(report, progress)

    def _stop_locked(self, report: Report) -> None:
        if not any(self._processes.find(node) for node in self.nodes):
            report(NOT_RUNNING)
        else:
            # The primary last, so that no election is held among nodes that are about to stop.
            primary = self.status().primary
            self._processes.end([node for node in self.nodes if node.node_id != primary], report)
            self._processes.end([node for node in self.nodes if node.node_id == primary], report)
            report("Cluster stopped.")
        for node in self.nodes:
            node.pid_file.unlink(missing_ok=True)  # stale ones too

    # ---- One node, for tests, demos and the monitor ----

    def start_node(self, node_id: str) -> int:
        """Start a node that does not run, without waiting for it; the pid of its process."""
        with self._exclusively():
            node = self.node(node_id)
            if process := self._processes.find(node):
                raise ManagerError(f"{node_id} runs already, with pid {process.pid}")
            return self._spawn(node)

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

    # ---- Status ----

    def status(self) -> ClusterStatus:
        """The cluster as it is now; it takes no longer than one slow answer."""
        with ThreadPoolExecutor(len(self.nodes), thread_name_prefix="ask") as pool:
            seen = list(pool.map(self._processes.look, self.nodes))
        primary = _primary(seen, self._founding())
        voters = voters_of(self.node(primary.node_id).reached_at) if primary else frozenset()
        return summarize(seen, primary, voters)

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
        with suppress(ClusterBusyError), self._exclusively(wait_s=0):
            return [event for node in self.nodes for event in self._watch_locked(node)]
        return []  # someone starts or stops the nodes: what is missing now is no failure

    def _watch_locked(self, node: Node) -> Iterator[str]:
        restarts, now = self._restarts[node.node_id], self._clock()
        if self._processes.find(node) or not node.pid_file.exists():
            # It runs, or was stopped on purpose, which is no death either.
            restarts.due, restarts.given_up = None, False
        elif restarts.due is None and not restarts.given_up:
            status = self._processes.exit_status(node)
            if status == EXIT_CONFIG:
                restarts.given_up = True
                yield (
                    f"{node.node_id} exited with status {EXIT_CONFIG}: its data or its cluster is "
                    f"wrong, so it is not restarted. {self._processes.log_end(node)}"
                )
                return
            pause_s = restarts.died(now)
            when = f"in {pause_s:g} s" if pause_s else "now"
            yield f"{node.node_id} {ending(status)}; it is restarted {when}."
        if restarts.due is not None and restarts.due <= now:
            pid = self._spawn(node)
            restarts.due, restarts.started = None, now
            yield f"{node.node_id} was restarted with pid {pid}."

    # ---- Settings, record, lock ----

    def _spawn(self, node: Node, *, primary: bool = False) -> int:
        """Start the node's process; its pid."""
        command = self._command(node)
        return self._processes.start(node, [*command, "--primary"] if primary else command)

    def _place(self, number: int) -> Node:
        """The node of that number. Raises ConfigError if a server would refuse its settings."""
        node_id, port = f"node{number}", self._base_port + number - 1
        peer_port, directory = port + PEER_PORT_OFFSET, self.data_dir / node_id
        if peer_port > PORT_MAX:
            raise ConfigError(f"--base-port: {node_id}'s port for peers would be {peer_port}")
        given = {"node-id": node_id, "port": port, "peer-port": peer_port, "data-dir": directory}
        flags = tuple(f"--{name}={value}" for name, value in given.items())
        settings = parse_settings([*flags, *self._server_args], os.environ)
        if settings.primary:
            raise ConfigError(
                "the manager says which node founds the cluster: take `primary` out of KV_PRIMARY "
                "and of the configuration file"
            )
        address = settings.advertise_host, port
        return Node(node_id, settings.host, address, peer_port, directory, flags)

    def _command(self, node: Node) -> list[str]:
        # A single node is told of itself: without --join it would look for a cluster on 6379.
        others = [other for other in self.nodes if other != node] or [node]
        join = ",".join(format_address(other.address) for other in others)
        return [*self._program, *node.flags, f"--join={join}", *self._server_args]

    def _founding(self) -> Founding | None:
        return Founding.load(self._record_path)

    def _record(self, cluster_id: str) -> None:
        record = Founding(cluster_id, len(self.nodes), self._base_port)
        if record != self._founding():
            write_durably(self._record_path, asdict(record))

    @contextmanager
    def _exclusively(self, wait_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
        """Hold the lock of the data directory. Raises ClusterBusyError if another holds it."""
        deadline = self._clock() + wait_s
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with (self.data_dir / "cluster.lock").open("a") as file:
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if self._clock() >= deadline:
                    raise ClusterBusyError(
                        f"another cluster_manager starts or stops nodes in {self.data_dir}; "
                        "wait until it is done"
                    )
                time.sleep(POLL_S / 2)
            yield


# ---- The program ---------------------------------------------------------------------------------


def _picture(status: ClusterStatus) -> Group:
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
            node.role or ("no answer" if node.alive else "down"),
            "yes" if node.voter else "no",
            *("-" if number is None else str(number) for number in (*numbers, node.port, node.pid)),
            "-" if node.memory_bytes is None else f"{node.memory_bytes / 1024**2:.1f} MiB",
            "-" if node.cpu_percent is None else f"{node.cpu_percent:.1f} %",
            "-" if up is None else str(up),
            style=style,
        )
    lines = [f"{node.node_id} {node.problem}." for node in status.nodes if node.problem]
    if status.healthy:
        more = counted(status.failures_tolerated, "more failure")
        lines.append(f"Healthy: {status.primary} is primary; {more} would be tolerated.")
    else:
        lines.append("Not healthy: no majority of the voters follows a primary.")
    return Group(table, *(Text(line) for line in lines))


def _console() -> Console:
    # Rich takes a pipe to be 80 columns wide, and would cut the table to fit.
    return Console() if sys.stdout.isatty() else Console(width=200)


_EPILOG = """\
actions:
  start    found the cluster, or resume it; returns once all nodes are voters that answer. Started
           twice, it says that the cluster runs already; nodes that are missing are started
  status   one row a node (--json: the same for scripts)
  stop     secondaries first, then the primary; SIGKILL for what does not stop within 10 s
  restart  stop, then start
  monitor  stay in the foreground, restart nodes that die (after 0, 1, 2, 4 ... 30 s) and show the
           status live; starts the cluster if nothing runs. Ctrl-C leaves the nodes running

examples:
  %(prog)s --action start
  %(prog)s --action start --nodes 5 --base-port 7000 --data-dir elsewhere
  %(prog)s --action start -- --replication async --heartbeat-interval 0.5
  %(prog)s --action status --json

The nodes run on when this program ends. Their output is in DIR/node1.log and so on.
What stands after -- is given to every node; kv_store_server.py --help lists it.

exit status: 0 done (status: a majority is healthy), 1 failed (status: it is not), 2 wrong
arguments, 130 interrupted by Ctrl-C: a start has then stopped what it had started.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cluster_manager.py",
        usage="%(prog)s --action ACTION [--nodes N] [--base-port PORT] [--data-dir DIR] "
        "[-- SERVER-FLAGS]",
        description="Starts, watches and stops a cluster of key-value nodes on this host.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    actions = ("start", "status", "stop", "restart", "monitor")
    add("--action", required=True, choices=actions, metavar="ACTION", help=" | ".join(actions))
    founded = "as it was founded, else"
    add("--nodes", type=int, metavar="N", help=f"(default: {founded} {NODES_DEFAULT})")
    ports = f"node1's port; node2 has the next; for peers they are {PEER_PORT_OFFSET} higher"
    default = f"(default: {founded} {BASE_PORT_DEFAULT})"
    add("--base-port", type=int, metavar="PORT", help=f"{ports} {default}")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="(default: data)")
    limit = "how long a start may take (default: %(default)g)"
    add("--timeout", type=float, default=START_TIMEOUT_S, metavar="SECONDS", help=limit)
    add("--json", action="store_true", help="with status: JSON instead of a table")
    return parser


def main(argv: Sequence[str], server_script: Path = SERVER_SCRIPT) -> int:
    """Do what the command line says; the exit status."""
    words = list(argv)
    split = words.index("--") if "--" in words else len(words)
    try:
        options = _parser().parse_args(words[:split])
        shape = Founding.load(options.data_dir / RECORD_NAME) or Founding()
        manager = ClusterManager(
            shape.nodes if options.nodes is None else options.nodes,
            shape.base_port if options.base_port is None else options.base_port,
            options.data_dir,
            words[split + 1 :],
            server_script=server_script,
            start_timeout_s=options.timeout,
        )
        return _act(manager, options.action, options.json)
    except ConfigError as error:
        print(f"cluster_manager: {error}\nTry --help.", file=sys.stderr)
        return 2
    except (ManagerError, psutil.Error, OSError) as error:
        print(f"cluster_manager: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cluster_manager: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _act(manager: ClusterManager, action: str, as_json: bool) -> int:
    report = functools.partial(print, flush=True)
    progress = _progress() if sys.stderr.isatty() else _nothing
    if action == "status":
        status = manager.status()
        if as_json:
            print(json.dumps(asdict(status), indent=2))
        else:
            _console().print(_picture(status))
        return 0 if status.healthy else 1
    if action == "stop":
        manager.stop(report)
    elif action == "restart":
        manager.restart(report, progress)
    # A monitor needs something to watch.
    elif action == "start" or not any(node.alive for node in manager.status().nodes):
        manager.start(report, progress)
    if action == "monitor":
        _monitor(manager)
    return 0


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
            with Live(_picture(manager.status()), console=console, auto_refresh=False) as live:
                manager.monitor(
                    lambda event: console.print(Text(event)),
                    show=lambda status: live.update(_picture(status), refresh=True),
                )
        else:
            manager.monitor(functools.partial(print, flush=True))
    except KeyboardInterrupt:
        print("The monitor ends; the nodes keep running (--action stop stops them).")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
