"""Disks that are full, read-only or hang, memory that runs out, and what async replication gives up.

Real nodes, and real disks where the tests may mount some: small ones in memory, over the data
directory of a node.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from kv_errors import NoSpaceError, OutOfMemoryError
from kv_types import Reply
from raft_watch import DISK_FLOOR_BYTES, DISK_RESERVE_BYTES
from tests.cluster import PATIENCE_S, SHORT_TIMERS, Cluster, eventually
from tests.failpoint_server import DISK
from tests.test_crash_points import EVERY_POINT

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

MIB = 1024 * 1024
BALLAST = "ballast"
only_with_every_point = pytest.mark.skipif(not EVERY_POINT, reason="runs with `make crash-points`")


# ---- Small disks -------------------------------------------------------------------------------


@contextmanager
def small_disk(directory: Path, size_bytes: int) -> Iterator[None]:
    """A file system of its own for a directory; its files are taken along."""
    held = {path.name: path.read_bytes() for path in directory.iterdir()}
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(directory)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"a test may not mount a disk here: {done.stderr.decode().strip()}")
    try:
        for name, data in held.items():
            (directory / name).write_bytes(data)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def leave_free(directory: Path, free_bytes: int) -> None:
    """Fill a disk up to that; with 0 as far as it goes."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    status = os.statvfs(directory)
    size_bytes = max(0, status.f_bavail * status.f_frsize - free_bytes)
    fd = os.open(directory / BALLAST, os.O_WRONLY | os.O_CREAT)
    try:
        while size_bytes > 0:
            size_bytes -= os.write(fd, bytes(min(size_bytes, MIB)))
    finally:
        os.close(fd)


def log_of(cluster: Cluster, node_id: str) -> str:
    return cluster.node(node_id).log.read_text()


def trouble(cluster: Cluster, node_id: str) -> str:
    """What the node complains of; "" if it does not, or says nothing at all."""
    return str((cluster.status(node_id) or {}).get("trouble") or "")


def write(cluster: Cluster, node_id: str, key: str, size_bytes: int = 10) -> Reply:
    with cluster.resp(node_id) as connection:
        return connection.ask("SET", key, "x" * size_bytes)


@contextmanager
def trio_with_small_disk(size_bytes: int, *, leads: bool) -> Iterator[tuple[Cluster, str]]:
    """Three nodes, and which of them has the small disk: the primary, or a secondary."""
    with Cluster(*SHORT_TIMERS, "--max-log", "1MiB") as cluster:
        node_id = cluster.secondaries()[0]
        cluster.kill(node_id)
        with small_disk(cluster.node(node_id).directory, size_bytes):
            cluster.start(node_id)
            cluster.in_step()
            if leads:
                answer = cluster.ask(cluster.primary(), f"FAILOVER TO {node_id}")
                assert answer["status"] == "OK", answer
                cluster.primary(among=[node_id])
            try:
                yield cluster, node_id
            finally:
                if cluster.process(node_id) is not None:
                    cluster.kill(node_id)


def test_secondary_when_its_disk_is_full_then_it_waits_and_goes_on_when_there_is_room() -> None:
    """It says why; the others go on meanwhile, and nothing has to be started again."""
    with trio_with_small_disk(300 * MIB, leads=False) as (cluster, victim):
        process = cluster.process(victim)
        assert process is not None
        leave_free(cluster.node(victim).directory, 0)

        def write_and_look() -> bool:
            assert write(cluster, primary, f"k{len(written)}", 4000) == "OK"
            written.append(1)
            return "the disk is full" in trouble(cluster, victim)

        primary, written = cluster.primary(), list[int]()
        cluster.eventually(write_and_look, f"{victim} has no room")
        assert "the disk is full: this node writes nothing" in log_of(cluster, victim)
        assert "the disk is full" in (cluster.manager.status().row(victim).trouble or "")
        for _ in range(20):
            write_and_look()
        (cluster.node(victim).directory / BALLAST).unlink()

        assert cluster.in_step()["keys"] == len(written)
        assert process.is_running()
        cluster.eventually(lambda: not trouble(cluster, victim), "it has no trouble any more")
        assert "the disk takes what is written again" in log_of(cluster, victim)


def test_secondaries_when_both_have_no_room_then_the_primary_refuses_but_serves_reads() -> None:
    """Else both would run into the end of their disks, and nothing would be served any more."""
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(*SHORT_TIMERS, "--max-log", "1MiB"))
        assert write(cluster, cluster.primary(), "before") == "OK"
        victims = cluster.secondaries()
        for node_id in victims:
            cluster.kill(node_id)
            stack.enter_context(small_disk(cluster.node(node_id).directory, 400 * MIB))
            stack.callback(cluster.kill, node_id)
            cluster.start(node_id)
            cluster.in_step()
        primary = cluster.primary()
        assert primary not in victims
        for node_id in victims:
            leave_free(
                cluster.node(node_id).directory, (DISK_FLOOR_BYTES + DISK_RESERVE_BYTES) // 2
            )

        cluster.eventually(
            lambda: "a majority's disks are almost full" in trouble(cluster, primary), "it hears"
        )
        with cluster.resp(primary) as connection:
            assert isinstance(connection.ask("SET", "more", "x"), NoSpaceError)
            assert connection.ask("GET", "before") == b"x" * 10
            assert connection.ask("DEL", "before") == 1
        (cluster.node(victims[0]).directory / BALLAST).unlink()

        cluster.eventually(lambda: not trouble(cluster, primary), "a majority has room again")
        assert write(cluster, primary, "after") == "OK"


def test_primary_when_its_disk_is_almost_full_then_only_deletions_are_done() -> None:
    """A definite error, reads go on, ``status`` shows it; with room again it ends by itself."""
    with trio_with_small_disk(400 * MIB, leads=True) as (cluster, primary):
        directory = cluster.node(primary).directory
        assert write(cluster, primary, "before") == "OK"
        leave_free(directory, (DISK_FLOOR_BYTES + DISK_RESERVE_BYTES) // 2)
        cluster.eventually(lambda: "are refused" in trouble(cluster, primary), "it notices")

        with cluster.resp(primary) as connection:
            assert isinstance(connection.ask("SET", "more", "x"), NoSpaceError)
            assert connection.ask("GET", "before") == b"x" * 10
            assert connection.ask("DEL", "before") == 1
        shown = cluster.manager.status()
        assert "the disk is almost full" in (shown.row(primary).trouble or "")

        (directory / BALLAST).unlink()
        cluster.eventually(lambda: not trouble(cluster, primary), "there is room again")
        assert write(cluster, primary, "after") == "OK"
        assert "disk has room again" in log_of(cluster, primary)


@only_with_every_point
def test_primary_when_its_disk_is_full_at_once_then_another_leads_until_there_is_room() -> None:
    """What it had answered is there; it comes back in step by itself."""
    with trio_with_small_disk(300 * MIB, leads=True) as (cluster, victim):
        process = cluster.process(victim)
        assert process is not None
        written: list[str] = []
        leave_free(cluster.node(victim).directory, 0)

        def write_and_look() -> bool:
            key = f"k{len(written)}"
            with suppress(OSError):
                if write(cluster, victim, key, 4000) == "OK":
                    written.append(key)
            return cluster.primary() != victim

        cluster.eventually(write_and_look, "another leads")
        with cluster.resp(cluster.primary(cluster.others(victim))) as connection:
            assert not written or connection.ask("EXISTS", *written) == len(written)
        assert "the disk is full" in trouble(cluster, victim)
        (cluster.node(victim).directory / BALLAST).unlink()

        cluster.in_step()
        assert process.is_running()


@only_with_every_point
def test_snapshot_when_the_disk_has_no_room_for_it_then_it_is_refused_until_there_is() -> None:
    """The follower stays up meanwhile, and the primary that sends it too."""
    with trio_with_small_disk(300 * MIB, leads=False) as (cluster, late):
        reached = cluster.in_step()["applied_index"]
        cluster.kill(late)
        primary = cluster.primary()

        def write_and_look() -> bool:
            for _ in range(10):
                assert write(cluster, primary, f"k{len(written)}", 100_000) == "OK"
                written.append(1)
            status = cluster.status(primary)
            is_cut = status is not None and status["first_index"] > reached + 1
            return is_cut and len(written) > 80

        written: list[int] = []
        cluster.eventually(write_and_look, "the log is cut")
        leave_free(cluster.node(late).directory, 3 * MIB)
        cluster.start(late)
        cluster.eventually(
            lambda: "a snapshot can't be installed" in log_of(cluster, late), "it is refused"
        )
        assert cluster.status(late) is not None

        (cluster.node(late).directory / BALLAST).unlink()

        assert cluster.in_step()["keys"] == len(written)


@only_with_every_point
def test_start_when_the_file_system_is_read_only_then_it_says_so_and_exits_with_1() -> None:
    """With the directory; as a fault that may pass, so that the monitor tries again."""
    with trio_with_small_disk(300 * MIB, leads=False) as (cluster, victim):
        directory = cluster.node(victim).directory
        cluster.kill(victim)
        subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)

        cluster.start(victim)

        process = cluster.manager._processes.find(cluster.node(victim))
        assert process is None or process.wait(PATIENCE_S) == 1
        assert f"can't start: the file system is read-only ({directory})" in log_of(cluster, victim)
        subprocess.run(["mount", "-o", "remount,rw", str(directory)], check=True)
        cluster.start(victim)
        cluster.in_step()


# ---- A disk that hangs -------------------------------------------------------------------------


def test_primary_when_its_disk_hangs_then_another_leads_though_its_process_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heartbeats flow, but it makes way; ``status`` says why, until the disk answers again."""
    monkeypatch.setenv(DISK, str(tmp_path))
    script = Path(__file__).with_name("failpoint_server.py")
    with Cluster(*SHORT_TIMERS, server_script=script) as cluster:
        old = cluster.primary()
        process = cluster.process(old)
        assert process is not None
        assert write(cluster, old, "before") == "OK"
        hangs = tmp_path / str(process.pid)
        hangs.touch()
        writer = threading.Thread(target=partial(write, cluster, old, "meanwhile"))
        writer.start()

        new = cluster.primary(among=cluster.others(old))

        assert write(cluster, new, "after") == "OK"
        assert "the disk hangs" in trouble(cluster, old)
        assert "the disk hangs" in (cluster.manager.status().row(old).trouble or "")
        assert process.is_running()
        hangs.unlink()
        writer.join(PATIENCE_S)
        assert cluster.in_step()["keys"] in (2, 3)  # of the one meanwhile nobody was told
        cluster.eventually(lambda: not trouble(cluster, old), "it has recovered")


# ---- A disk that fails ---------------------------------------------------------------------------


def test_disk_when_a_sync_fails_then_the_node_ends_and_says_of_which_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO is no bug of the program's to be told in a traceback; what was answered is there later."""
    monkeypatch.setenv(DISK, str(tmp_path))
    script = Path(__file__).with_name("failpoint_server.py")
    with Cluster(*SHORT_TIMERS, nodes=1, server_script=script) as cluster:
        process = cluster.process("node1")
        assert process is not None
        assert write(cluster, "node1", "before") == "OK"
        (tmp_path / f"{process.pid}.fails").touch()

        with suppress(OSError):
            assert write(cluster, "node1", "lost") != "OK"

        process.wait(PATIENCE_S)
        log = log_of(cluster, "node1")
        assert f"the process ends: the disk has failed ({cluster.node('node1').directory})" in log
        assert "Traceback" not in log
        cluster.start("node1")
        cluster.primary()
        assert cluster.ask("node1", "GET before")["status"] == "OK"


# ---- Memory ------------------------------------------------------------------------------------


def test_memory_when_it_runs_out_then_there_is_a_warning_a_refusal_and_a_way_back() -> None:
    """From 80 % on ``status`` says so; above the limit writes are refused; it clears by itself."""
    with Cluster(*SHORT_TIMERS, "--max-memory", "1mb", nodes=1) as cluster:
        written = 0

        def write_one() -> Reply:
            nonlocal written
            written += 1
            return write(cluster, "node1", f"k{written}", 10_000)

        def is_warned() -> bool:
            return "% of --max-memory" in trouble(cluster, "node1") or write_one() != "OK"

        cluster.eventually(is_warned, "a warning")
        assert "8" in trouble(cluster, "node1").partition("% of")[0]
        cluster.eventually(
            lambda: "WARNING node-watch the data takes" in log_of(cluster, "node1"), "it is logged"
        )
        while (reply := write_one()) == "OK":
            pass
        assert isinstance(reply, OutOfMemoryError)
        assert "writes are refused, deletes are not" in trouble(cluster, "node1")
        shown = cluster.manager.status().row("node1").trouble or ""
        assert "--max-memory is reached" in shown

        with cluster.resp("node1") as connection:
            for number in range(1, written // 2):
                assert connection.ask("DEL", f"k{number}") == 1
        assert write_one() == "OK"

        assert not trouble(cluster, "node1")
        cluster.eventually(
            lambda: "takes less than 80 % of --max-memory again" in log_of(cluster, "node1"),
            "the log says so",
        )


# ---- A disk that forgets ----------------------------------------------------------------------


def test_secondary_when_an_old_copy_of_its_directory_is_put_back_then_the_primary_says_so() -> None:
    """It had acknowledged more than the copy holds. The others go on."""
    with Cluster(*SHORT_TIMERS) as cluster:
        primary, victim = cluster.primary(), cluster.secondaries()[0]
        directory = cluster.node(victim).directory
        cluster.in_step()
        cluster.kill(victim)
        copy = shutil.copytree(directory, directory.with_suffix(".copy"))
        cluster.start(victim)
        with cluster.resp(primary) as connection:
            for number in range(20):
                assert connection.ask("SET", f"k{number}", "1") == "OK"
            # It may apply, in step with the others, what it has not acknowledged yet.
            assert connection.ask("WAIT", "2", "10000") == 2
        cluster.kill(victim)
        shutil.rmtree(directory)
        shutil.move(copy, directory)

        cluster.start(victim)

        text = f"{victim} has lost entries that it had acknowledged"
        eventually(lambda: text in trouble(cluster, primary), "the primary names it")
        eventually(lambda: text in log_of(cluster, primary), "its log says so too")
        assert write(cluster, primary, "later") == "OK"


# ---- Asynchronous replication ------------------------------------------------------------------


def test_async_when_the_primary_dies_then_what_no_majority_had_is_rolled_back_and_counted() -> None:
    """``WAIT`` tells beforehand; its state is that of the others again."""
    timers = ("--heartbeat-interval", "0.4", "--election-timeout", "2.0-3.0")
    with Cluster(*timers, "--replication", "async") as cluster:
        old = cluster.primary()
        others = cluster.others(old)
        with cluster.resp(old) as connection:
            assert connection.ask("SET", "safe", "1") == "OK"
            assert connection.ask("WAIT", "2", "10000") == 2
            cluster.kill(*others)
            for number in range(20):
                assert connection.ask("SET", f"hasty:{number}", "1") == "OK"
            assert connection.ask("WAIT", "1", "100") == 0
        cluster.kill(old)
        cluster.start(*others)
        new = cluster.primary(among=others)
        with cluster.resp(new) as connection:
            assert connection.ask("SET", "later", "1") == "OK"
            assert connection.ask("WAIT", "1", "10000") == 1

        cluster.start(old)

        assert cluster.in_step()["keys"] == 2
        eventually(lambda: "rolled back entries=20" in log_of(cluster, old), "the loss is told")
