"""What holds for every test module: it leaves no process and no thread behind."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from raft_status import NodeConfig
from tests.trio import QUICK, Trio

# Long enough for a process that was told to stop, short enough not to hide one that was not.
GRACE_S = 5.0


def _processes(marker: str) -> set[psutil.Process]:
    """Our children that run, and whatever was started with ``marker`` on its command line.

    A node outlives its manager on purpose, so it need not be our child: its data directory under
    pytest's own temporary directory gives it away.
    """
    own = psutil.Process()
    found = set(own.children(recursive=True))
    for process in psutil.process_iter(["cmdline"]):
        if any(marker in word for word in process.info["cmdline"] or ()):
            found.add(process)
    return {p for p in found if p != own and _runs(p)}


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if not t.daemon}


@pytest.fixture(scope="module", autouse=True)
def leaves_nothing_running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module that leaves a process or a non-daemon thread behind has failed.

    By module, not by test: a cluster may be shared by the tests of one module, and they may
    restart its nodes.
    """
    marker = str(tmp_path_factory.getbasetemp()) + os.sep
    processes, threads = _processes(marker), _threads()

    yield

    deadline = time.monotonic() + GRACE_S
    while left := (_processes(marker) - processes) | (_threads() - threads):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for one in left:
        if isinstance(one, psutil.Process):
            one.kill()  # by pid and creation time: psutil checks both
    assert not left, f"left running: {left}"


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """Let threads take turns so often that they meet inside of what should be one step."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval_s)


@pytest.fixture
def make_trio(tmp_path: Path) -> Iterator[Callable[..., Trio]]:
    """Makes nodes that are stopped in the end, and whose threads must not have died."""
    made: list[Trio] = []

    def make(config: NodeConfig = QUICK, count: int = 3) -> Trio:
        made.append(Trio(tmp_path, config, count))
        return made[-1].start()

    yield make

    for trio in made:
        trio.stop()
        for server in trio.servers:
            assert not server.fatal, server.fatal


@pytest.fixture(scope="module")
def shared_trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    """For tests that leave the cluster as they found it."""
    trio = Trio(tmp_path_factory.mktemp("trio"), QUICK).start()
    yield trio
    trio.stop()
    for server in trio.servers:
        assert not server.fatal, server.fatal
