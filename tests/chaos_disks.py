"""How disks and memory fail: the rounds of chaos that fill, damage and lose what a node holds.

The letters are those of the fault model; what a round may do is in ``chaos_stage.py``.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kv_config import EXIT_CONFIG
from kv_errors import KVError, NoPrimaryError, NoSpaceError, OutOfMemoryError
from raft_types import Entry, EntryKind, encode_entries
from raft_watch import DISK_FLOOR_BYTES
from replication_log_format import (
    SECTOR_BYTES,
    SEGMENT_HEADER_BYTES,
    encode_record,
    record_start,
    scan,
)
from tests.chaos_links import Weather
from tests.chaos_stage import CUT, CannotTestError, ChaosCluster, NotDoneError, Stage
from tests.cluster import eventually

SMALL_DISK_BYTES: Final = 384 * 1024 * 1024
FILLER_BYTES: Final = 50_000
FILLER_COUNT: Final = 1000
PAGE_BYTES: Final = 4096


def fill(stage: Stage, done: Callable[[], bool]) -> KVError | None:
    """Write large values until ``done``; the error, if the cluster refuses them before."""
    with stage.cluster.client() as client:
        for number in range(FILLER_COUNT):
            if done():
                return None
            try:
                client.set(f"filler:{number}", "x" * FILLER_BYTES)
            except KVError as error:
                if error.definite:
                    return error
    raise AssertionError(f"{FILLER_COUNT} large values changed nothing")


def unfill(stage: Stage) -> None:
    with stage.cluster.client() as client:
        client.delete(*(f"filler:{number}" for number in range(FILLER_COUNT)))


def fall_behind(stage: Stage, follower: str) -> None:
    """The follower is cut off, until the others have dropped what it lacks from their logs."""
    cluster = stage.cluster
    seen = cluster.eventually(lambda: cluster.status(follower), f"{follower} answers")
    stage.weather("cut", stage.both_ways([follower], cluster.node_ids), CUT)

    def cut_behind() -> bool:
        others = filter(None, map(cluster.status, cluster.others(follower)))
        return any(
            s["role"] == "PRIMARY" and s["first_index"] > seen["last_index"] + 1 for s in others
        )

    refusal = fill(stage, cut_behind)
    assert refusal is None, str(refusal)
    stage.tell(f"{follower} is behind the log")


def snapshot(stage: Stage) -> None:
    """F6: a follower misses more than the log keeps, and is killed while it gets the state."""
    cluster = stage.cluster
    follower = stage.one(cluster.secondaries())
    incoming = cluster.node(follower).directory / "incoming.db"
    fall_behind(stage, follower)
    slow = Weather(bytes_per_s=500_000)
    stage.weather("slow", stage.both_ways([follower], cluster.node_ids), slow)
    cut_short = written_ns = 0  # what a killed process leaves is removed by the next one

    def comes() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return incoming.stat().st_mtime_ns > written_ns
        return False

    for _ in range(stage.rng.randint(1, 3)):
        cluster.eventually(comes, f"{follower} is sent a state")
        stage.hold(0.0, 1.0)
        cluster.kill(follower)
        is_under_way = incoming.exists()
        written_ns = time.time_ns()
        stage.tell(f"killed {follower}, which had {'a part of' if is_under_way else 'all of'} it")
        cluster.start(follower)
        if not is_under_way:
            break
        cut_short += 1
    stage.network.heal()
    cluster.heal()
    unfill(stage)
    if not cut_short:
        raise NotDoneError("it had the state before it was killed")


def snapshot_damaged(stage: Stage) -> None:
    """F8: a bit of a state is flipped on its way to a follower's disk; it is sent again."""
    cluster = stage.cluster
    follower = stage.one(cluster.secondaries())
    node = cluster.node(follower)
    incoming = node.directory / "incoming.db"
    fall_behind(stage, follower)
    slow = Weather(bytes_per_s=500_000)
    stage.weather("slow", stage.both_ways([follower], cluster.node_ids), slow)

    def flip() -> bool:
        with contextlib.suppress(FileNotFoundError), incoming.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size > 0:
                place = stage.rng.randrange(size)
                bit = 1 << stage.rng.randrange(8)
                os.pwrite(file.fileno(), bytes([os.pread(file.fileno(), 1, place)[0] ^ bit]), place)
                stage.tell(f"{follower}: a bit flipped at {place} of {size} received")
                return True
        return False

    refused = "a snapshot can't be installed"
    before = node.log.read_text(errors="replace").count(refused)
    cluster.eventually(flip, f"{follower} is sent a state")
    stage.network.heal()
    cluster.heal()
    unfill(stage)
    if node.log.read_text(errors="replace").count(refused) == before:
        raise NotDoneError("the state was installed before it was damaged")


def disk_error(stage: Stage) -> None:
    """F7: every write of one node fails from now on, so that it has to end; then the disk is well."""
    victim = stage.one([stage.cluster.primary(), *stage.cluster.node_ids])
    process = stage.cluster.process(victim)
    assert process is not None
    stage.tell(f"writes of {victim} fail")
    process.rlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    eventually(lambda: stage.cluster.process(victim) is None, f"{victim} ends")
    stage.hold(0.1, 1.0)


def fsync_error(stage: Stage) -> None:
    """F7: a sync of a node's log fails once (EIO): what is on the disk is unknown, so it has to end."""
    cluster = stage.cluster
    victim = stage.one([cluster.primary(), *cluster.node_ids])
    process = cluster.process(victim)
    assert process is not None
    stage.tell(f"a sync of {victim} fails")
    mark = cluster.fails(process)
    mark.touch()
    eventually(lambda: cluster.process(victim) is None, f"{victim} ends")
    assert not mark.exists(), f"{victim} ended for another reason"
    stage.hold(0.1, 1.0)


def power_loss(stage: Stage) -> None:
    """F2: the power of one, a majority or all is lost, and with it what was not synced, or parts."""
    cluster = stage.cluster
    nodes = cluster.node_ids
    majority = stage.rng.sample(nodes, len(nodes) // 2 + 1)
    victims = stage.rng.choice([nodes, majority, [cluster.primary()], [stage.one(nodes)]])
    unsafe_bytes = cluster.lose_power(victims, stage.rng)
    stage.tell(f"{' '.join(victims)} lost power, and {unsafe_bytes} bytes or a part of them")
    stage.hold(0.0, 1.0)
    if not unsafe_bytes:
        raise NotDoneError("everything was synced")


def disk_stall(stage: Stage) -> None:
    """F7: the log's writes wait for 0.1 to 10 s: the primary's, a secondary's, all secondaries'."""
    cluster = stage.cluster
    primary = cluster.primary()
    others = cluster.others(primary)
    victims = stage.rng.choice([[primary], [primary], [stage.one(others)], others])
    seconds = 10 ** stage.rng.uniform(-1.0, 1.0)
    stage.tell(f"disk of {' '.join(victims)} stalls for {seconds:.1f} s (primary {primary})")
    processes = [p for p in map(cluster.process, victims) if p is not None]
    marks = list(map(cluster.hangs, processes))
    for mark in marks:
        mark.touch()
    stage.hold(seconds, seconds)
    for mark in marks:
        mark.unlink()
    stage.hold(0.2, 1.0)


@contextmanager
def small_disk(cluster: ChaosCluster, node_id: str) -> Iterator[Path]:
    """Kill the node; its directory lies on a small disk in memory meanwhile, with what it held."""
    directory = cluster.node(node_id).directory
    aside = directory.with_name(f"{node_id}.aside")
    cluster.kill(node_id)
    shutil.copytree(directory, aside)
    size = f"size={SMALL_DISK_BYTES}"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(directory)]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    if done.returncode:
        raise CannotTestError(f"it takes the right to mount a disk: {done.stderr.strip()}")
    try:
        shutil.copytree(aside, directory, dirs_exist_ok=True)
        shutil.rmtree(aside)
        yield directory
    finally:
        if cluster.process(node_id) is not None:
            cluster.kill(node_id)
        shutil.copytree(directory, aside, dirs_exist_ok=True)
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
        shutil.rmtree(directory)
        aside.rename(directory)


def disk_full(stage: Stage) -> None:
    """F7, F15: no room on a node's disk (ENOSPC), or almost none; later there is some again.

    A secondary waits for room, and a primary makes way or refuses. One may be killed meanwhile, and
    started with its disk still full.
    """
    cluster = stage.cluster
    primary = cluster.primary()
    victim = stage.one([primary, *cluster.node_ids])
    with small_disk(cluster, victim) as directory:
        cluster.start(victim)
        cluster.heal()
        if victim == primary:
            with contextlib.suppress(OSError):
                cluster.ask(cluster.primary(), f"FAILOVER TO {victim}")
        almost = victim == primary and stage.rng.random() < 0.5
        status = os.statvfs(directory)
        size_bytes = status.f_bavail * status.f_frsize - (DISK_FLOOR_BYTES // 2 if almost else 0)
        ballast = directory / "ballast"
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        stage.tell(f"the disk of {victim} is {'almost ' * almost}full")

        def has_failed() -> bool:
            trouble = (cluster.status(victim) or {}).get("trouble") or ""
            return "are refused" in trouble if almost else "the disk is full" in trouble

        refusal = fill(stage, has_failed)
        assert refusal is None or isinstance(refusal, NoSpaceError | NoPrimaryError), refusal
        stage.tell(f"refused: {refusal}" if refusal else f"{victim} waits for room")
        stage.hold(0.2, 2.0)
        if stage.rng.random() < 0.3:
            stage.tell(f"{victim} is started with its disk full")
            cluster.kill(victim)
            cluster.start(victim)
        ballast.unlink()
        stage.tell(f"the disk of {victim} has room")
        cluster.heal()

        def has_room() -> bool:
            status = cluster.status(victim)
            return status is not None and "full" not in (status["trouble"] or "")

        eventually(has_room, f"{victim} notices that there is room")
        unfill(stage)
        stage.hold(0.2, 1.0)


def wipe(stage: Stage) -> None:
    """F11: a node loses its directory, and comes back by the same command as a new member."""
    cluster = stage.cluster
    victim = stage.one([cluster.primary(), *cluster.node_ids])
    others_have_all(stage, victim)
    stage.tell(f"wipe {victim}")
    shutil.rmtree(cluster.node(victim).directory)
    cluster.start(victim)
    stage.hold(0.0, 1.0)


def others_have_all(stage: Stage, victim: str) -> None:
    """Kill ``victim``, and wait until what it helped to commit is on the others' disks."""
    cluster = stage.cluster
    cluster.kill(victim)
    others = cluster.others(victim)
    cluster.primary(among=others)
    highest = max(s["last_index"] for s in filter(None, map(cluster.status, others)))

    def level() -> bool:
        seen = list(map(cluster.status, others))
        return all(s is not None and s["commit_index"] >= highest for s in seen)

    cluster.eventually(level, f"the others have everything without {victim}")


def flip_bit(stage: Stage, directory: Path) -> str:
    """A bit of a log or a state is not what it was.

    Not in the last records, where a flipped bit looks like a record that was not written to its
    end: the node cuts that off, but here it had been acknowledged, which Raft does not survive.
    """
    path, data = _some_file(stage, directory)
    place = stage.rng.randrange(len(data.rstrip(bytes(1))) // 2)
    data[place] ^= 1 << stage.rng.randrange(8)
    path.write_bytes(data)
    return f"{path.name} has a bit flipped at {place} of {len(data)}"


def zero_page(stage: Stage, directory: Path) -> str:
    """A page of a log or a state is nothing but zeros; not the last records, as with a bit."""
    path, data = _some_file(stage, directory)
    half = len(data.rstrip(bytes(1))) // 2
    place = stage.rng.randrange(half // PAGE_BYTES + 1) * PAGE_BYTES
    end = min(place + PAGE_BYTES, half)
    data[place:end] = bytes(end - place)
    path.write_bytes(data)
    return f"{path.name} has zeros at {place}..{end} of {len(data)}"


def _some_file(stage: Stage, directory: Path) -> tuple[Path, bytearray]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    path = stage.rng.choice([path for path in files if path.stat().st_size > 1000])
    return path, bytearray(path.read_bytes())


def delete_file(stage: Stage, directory: Path) -> str:
    """The file that says who the member is, or its state, is gone; the log is not."""
    path = directory / stage.rng.choice(["identity.json", "state.db"])
    path.unlink()
    return f"{path.name} is deleted"


def tear_tail(stage: Stage, directory: Path) -> str:
    """The log ends in a part of a record, of which nobody was told: it is cut off."""
    path = max(directory.glob("log-*.seg"))
    end = SEGMENT_HEADER_BYTES
    with path.open("r+b") as file:
        for offset, size_bytes, _, _ in scan(path, file.fileno(), path.stat().st_size):
            end = offset + size_bytes
        lost = Entry(
            10**9, 10**9, EntryKind.COMMAND, stage.rng.randbytes(stage.rng.randint(2000, 9000))
        )
        start = record_start(end)
        record = encode_record(None, encode_entries([lost]))
        # A disk writes a sector whole or not at all.
        count = stage.rng.randrange(
            1, (start + len(record)) // SECTOR_BYTES - start // SECTOR_BYTES
        )
        torn_end = start - start % SECTOR_BYTES + count * SECTOR_BYTES
        os.pwrite(file.fileno(), record[: torn_end - start], start)
    return f"{path.name} ends in a torn record at {start}..{torn_end}"


def damage(stage: Stage) -> None:
    """F8: a bit flipped, a page zeroed, a file deleted, a torn end; who refuses to start is wiped."""
    cluster = stage.cluster
    victim = stage.one(cluster.secondaries())
    others_have_all(stage, victim)
    directory = cluster.node(victim).directory
    how = stage.rng.choice([flip_bit, zero_page, delete_file, tear_tail])
    stage.tell(f"{victim}: {how(stage, directory)}")
    must_refuse = how is delete_file and not (directory / "identity.json").exists()
    cluster.start(victim)
    process = cluster.process(victim)

    def decided() -> bool:
        return cluster.process(victim) is None or cluster.status(victim) is not None

    cluster.eventually(decided, f"{victim} serves or refuses")
    refuses = cluster.process(victim) is None
    assert not (refuses and how is tear_tail), f"{victim} does not start after a crash"
    assert refuses or not must_refuse, f"{victim} does not know who it is, and serves"
    if refuses:
        stage.tell(f"{victim} refuses to start: wiped")
        ended = process.wait(1) if process else None
        assert ended in (None, EXIT_CONFIG), f"{victim} ended with {ended}"
        shutil.rmtree(directory)


def memory(stage: Stage) -> None:
    """F15: the memory is full: definite errors, and deletions make room."""
    stage.tell("fill the memory")
    refusal = fill(stage, lambda: False)
    assert isinstance(refusal, OutOfMemoryError), refusal
    stage.tell(f"refused: {refusal}")
    stage.hold(0.5, 2.0)
    unfill(stage)
