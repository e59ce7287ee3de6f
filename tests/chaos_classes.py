"""The classes of faults: which rounds belong to one, and the cluster that it is made for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from kv_errors import NoSpaceError, OutOfMemoryError
from tests.chaos_disks import damage, disk_error, disk_full, disk_stall, memory, snapshot, wipe
from tests.chaos_faults import (
    chain,
    clients,
    delay,
    kill,
    kill_primary,
    loss,
    one_way,
    partition,
    pause,
    reset,
    restart_all,
    swizzle,
)
from tests.chaos_members import members, transfer, transfer_unheard
from tests.chaos_stage import FaultClass, Stage

STALLING_SERVER: Final = Path(__file__).with_name("failpoint_server.py")
SMALL_LOG: Final = ("--max-log", "1MiB")
SMALL_MEMORY: Final = ("--max-memory", "16MiB")
# The node's own limit of descriptors has to allow that; it lowers --max-clients otherwise.
MANY_CLIENTS: Final = ("--max-clients", "11000")

DISK_WORDS: Final = ("File too large", "Errno 27", "can't be saved")
STALL_WORDS: Final = ("the disk hangs",)
FULL_WORDS: Final = ("the disk is", "the disk hangs", "No space left", "can't be saved")
DAMAGE_WORDS: Final = ("can't start", "damaged", "checksum")

SINGLE: Final = (
    FaultClass("kill-primary", (kill_primary,)),
    FaultClass("kill", (kill,)),
    FaultClass("pause", (pause,)),
    FaultClass("partition", (partition,)),
    FaultClass("one-way", (one_way,)),
    FaultClass("ring", (chain, swizzle), nodes=5),
    FaultClass("chain", (chain, swizzle)),
    FaultClass("delay", (delay,)),
    FaultClass("loss", (loss,)),
    FaultClass("snapshot", (snapshot,), server_args=SMALL_LOG),
    FaultClass("disk-error", (disk_error,), expected=DISK_WORDS),
    FaultClass("disk-stall", (disk_stall,), server_script=STALLING_SERVER, expected=STALL_WORDS),
    FaultClass(
        "disk-full",
        (disk_full,),
        server_args=SMALL_LOG,
        refusals=(NoSpaceError.code,),
        expected=FULL_WORDS,
    ),
    FaultClass("damage", (damage,), expected=DAMAGE_WORDS),
    FaultClass("wipe", (wipe,)),
    FaultClass("members", (members,)),
    FaultClass("transfer", (transfer, transfer_unheard)),
    FaultClass("clients", (clients, reset), server_args=MANY_CLIENTS),
    FaultClass("memory", (memory,), server_args=SMALL_MEMORY, refusals=(OutOfMemoryError.code,)),
    FaultClass("restart-all", (restart_all,)),
)
# Those that need a cluster, a server or rights of their own.
APART: Final = ("ring", "memory", "disk-stall", "disk-full")
CLASSES: Final = (
    *SINGLE,
    FaultClass(
        "mixed",
        tuple(r for c in SINGLE for r in c.rounds if c.name not in APART),
        server_args=SMALL_LOG + MANY_CLIENTS,
        expected=DISK_WORDS + DAMAGE_WORDS,
    ),
)


def repeat(fault: FaultClass, stage: Stage) -> int:
    """Round after round until the time is over; how many there were."""
    count = 0
    while time.monotonic() < stage.until:
        stage.rng.choice(fault.rounds)(stage)
        count += 1
        stage.heal()
        stage.hold(0.2, 0.8)
    return count
