"""A node that dies by SIGKILL at a step, or whose disk hangs or fails: the server, started by tests.

    KV_TEST_FAILPOINT="save-committed" python tests/failpoint_server.py --primary ...

Rule 1: nothing of this is in the product, which passes no test of a variable at any step. What is
patched is patched before the server begins, and only if the variable is set.
Rule 2: a point that does not exist is refused at start: a test must not pass because nothing died.

The points, of which each has a count (``... 3``: the third time; 1 if none is given):

    save-begun ...               a failpoint of state_db.py
    append before fdatasync      a call that changes the disk, within a method of the log
    append torn                  the first half of a record's sectors is written
    before RaftNode._apply       a method of the node is called
    after RaftNode._apply        it returns
    after RaftNode._apply membership     it returns, and a change of membership was in it

With KV_TEST_DISK the log's writes wait as long as there is a file in that directory that is called by
the process' pid; and if there is one that is called ``pid.fails``, it is taken away, and the next sync
fails with EIO.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kv_store_server  # noqa: E402
import raft_node  # noqa: E402
import raft_snapshots  # noqa: E402
import raft_status  # noqa: E402
import replication_log  # noqa: E402
import state_db  # noqa: E402
from raft_core import RaftCore  # noqa: E402
from raft_types import Entry, EntryKind, HardState, Role  # noqa: E402
from replication_log_format import SECTOR_BYTES  # noqa: E402

VARIABLE = "KV_TEST_FAILPOINT"
DISK = "KV_TEST_DISK"
TORN = "append torn"
# Operations of the log whose calls to the disk are points. ``vote`` is an append of a hard state.
OPERATIONS = ("append", "vote", "drop_before", "reset", "save_identity", "_create_segment")
DISK_CALLS = ("pwrite", "fdatasync", "fsync", "rename", "unlink")
METHODS: dict[str, type] = {
    "ReplicationLog.append": replication_log.ReplicationLog,
    "ReplicationLog.drop_before": replication_log.ReplicationLog,
    "ReplicationLog.reset": replication_log.ReplicationLog,
    "ReplicationLog.save_identity": replication_log.ReplicationLog,
    "RaftNode._advance_locked": raft_node.RaftNode,
    "RaftNode._write": raft_node.RaftNode,
    "RaftNode._next_append": raft_node.RaftNode,
    "RaftNode._apply": raft_node.RaftNode,
    "StateKeeper.on_chunk": raft_snapshots.StateKeeper,
    "Waiting.applied": raft_status.Waiting,
    "RaftNode._follow_membership_locked": raft_node.RaftNode,
}


def always(*_: object, **__: object) -> bool:
    return True


def leads(core: RaftCore, index: int) -> bool:
    """Whether a primary's commit index grows."""
    return core.role is Role.LEADER and index > core.commit_index


def follows(core: RaftCore, index: int) -> bool:
    return core.role is not Role.LEADER and index > core.commit_index


def commits_membership(core: RaftCore, index: int) -> bool:
    return core._memberships.at(index)[0] > core.commit_index


def holds_membership(_: object, entries: Sequence[Entry]) -> bool:
    return any(entry.kind is EntryKind.MEMBERSHIP for entry in entries)


def writes_membership(_: object, hard_state: HardState | None, entries: Sequence[Entry]) -> bool:
    return holds_membership(_, entries)


# Calls of a method that are points only if this is true of them.
CALLS: dict[str, tuple[type, Callable[..., bool]]] = {
    "RaftCore._commit_to as primary": (RaftCore, leads),
    "RaftCore._commit_to as secondary": (RaftCore, follows),
    "RaftCore._commit_to membership": (RaftCore, commits_membership),
    "RaftCore._append_entries membership": (RaftCore, holds_membership),
    "ReplicationLog.append membership": (replication_log.ReplicationLog, writes_membership),
    "RaftNode._apply membership": (raft_node.RaftNode, holds_membership),
}


def points() -> set[str]:
    """Every name that may be given."""
    source = (ROOT / "state_db.py").read_text()
    steps = set(re.findall(r'failpoint\("([a-z-]+)"\)', source))
    calls = {f"{name} before {call}" for name in OPERATIONS for call in DISK_CALLS}
    methods = {f"{when} {name}" for name in (*METHODS, *CALLS) for when in ("before", "after")}
    return steps | calls | methods | {TORN}


def die() -> NoReturn:
    """As ``kill -9``: no handler, no flush, no goodbye."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


class Failpoint:
    """Counts how often its point is reached."""

    def __init__(self, text: str) -> None:
        name, count = re.fullmatch(r"(.*?)(?: (\d+))?", text).groups()  # type: ignore[union-attr]
        if name not in points():
            raise SystemExit(f"{VARIABLE}: no point is called {name!r}")
        self.name, self._left = name, int(count or 1)
        self._operations: list[str] = []  # of the log, the innermost last

    def reach(self, name: str) -> None:
        """The process is at this point."""
        if self.is_due(name):
            die()

    def is_due(self, name: str) -> bool:
        if name != self.name:
            return False
        self._left -= 1
        return self._left == 0

    def install(self) -> None:
        """Patch what can be reached."""
        state_db.failpoint = self.reach
        # A write and its sync are one call where the system has it: there is no point in it.
        disk = replace(replication_log._system_disk(), pwrite_durably=None)
        calls = {call: self._watched(call, getattr(disk, call)) for call in DISK_CALLS}
        assert calls.keys() <= {field.name for field in fields(disk)}
        faulty = replace(disk, **calls)
        replication_log._system_disk = lambda: faulty
        log = replication_log.ReplicationLog
        for name in OPERATIONS:
            if name != "vote":
                setattr(log, name, self._named(name, getattr(log, name)))
        every = {name: (owner, always) for name, owner in METHODS.items()}
        for name, (owner, is_point) in (every | CALLS).items():
            method = name.partition(".")[2].partition(" ")[0]
            setattr(owner, method, self._surrounded(name, getattr(owner, method), is_point))

    def _watched(self, call: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            for operation in self._operations[-1:]:
                self.reach(f"{operation} before {call}")
                if (operation, call) == ("append", "pwrite") and self.is_due(TORN):
                    fd, data, offset = args
                    # The kernel stops at a page's border, a disk at a sector's, never within one.
                    end = offset + len(data.rstrip(b"\0")) // 2
                    end -= end % SECTOR_BYTES
                    function(fd, data[: max(0, end - offset)], offset)
                    die()
            return function(*args)

        return watched

    def _named(self, operation: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def named(*args: Any, **kwargs: Any) -> Any:
            votes = operation == "append" and args[1] is not None and args[1].voted_for
            self._operations.append("vote" if votes else operation)
            try:
                return method(*args, **kwargs)
            finally:
                self._operations.pop()

        return named

    def _surrounded(
        self, name: str, method: Callable[..., Any], is_point: Callable[..., bool]
    ) -> Callable[..., Any]:
        @functools.wraps(method)
        def surrounded(*args: Any, **kwargs: Any) -> Any:
            if not is_point(*args, **kwargs):
                return method(*args, **kwargs)
            self.reach(f"before {name}")
            result = method(*args, **kwargs)
            self.reach(f"after {name}")
            return result

        return surrounded


def trouble_disk(directory: Path) -> None:
    """Let every write to the log wait, and the next sync fail, while there is a file that says so."""
    disk = replication_log._system_disk()
    hangs = directory / str(os.getpid())
    fails = directory / f"{os.getpid()}.fails"

    def wait() -> None:
        while hangs.exists():
            time.sleep(0.01)

    def fail_once() -> None:
        if fails.exists():
            fails.unlink()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        wait()
        return disk.pwrite(fd, data, offset)

    def fdatasync(fd: int) -> None:
        fail_once()
        disk.fdatasync(fd)

    def pwrite_durably(fd: int, data: bytes, offset: int) -> int:
        assert disk.pwrite_durably is not None
        wait()
        fail_once()
        return disk.pwrite_durably(fd, data, offset)

    troubled = replace(disk, pwrite=pwrite, fdatasync=fdatasync)
    if disk.pwrite_durably is not None:
        troubled = replace(troubled, pwrite_durably=pwrite_durably)
    replication_log._system_disk = lambda: troubled


if __name__ == "__main__":
    if directory := os.environ.get(DISK):
        trouble_disk(Path(directory))
    if text := os.environ.get(VARIABLE):
        Failpoint(text).install()
    sys.exit(kv_store_server.main())
