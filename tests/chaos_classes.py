"""The classes of faults: which rounds belong to one, and the cluster that it is made for."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from kv_errors import NoSpaceError, OutOfMemoryError
from tests.chaos_disks import (
    damage,
    disk_error,
    disk_full,
    disk_stall,
    fsync_error,
    memory,
    power_loss,
    snapshot,
    snapshot_damaged,
    wipe,
)
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
from tests.chaos_members import (
    members,
    members_after_election,
    replace,
    transfer,
    transfer_lagging,
    transfer_unheard,
    transfer_unpaused,
)
from tests.chaos_stage import FaultClass
from tests.chaos_steps import (
    crash_following,
    crash_installing,
    crash_leading,
    crash_saving,
    crash_voting,
)

# A stall, a sync that fails and a death at a step take a server that is patched.
FAILPOINT_SERVER: Final = Path(__file__).with_name("failpoint_server.py")
SMALL_LOG: Final = ("--max-log", "1MiB")
SMALL_MEMORY: Final = ("--max-memory", "16MiB")
# The node's own limit of descriptors has to allow that; it lowers --max-clients otherwise.
MANY_CLIENTS: Final = ("--max-clients", "11000")

DISK_WORDS: Final = ("File too large", "Errno 27", "can't be saved")
FSYNC_WORDS: Final = ("Input/output error",)
STALL_WORDS: Final = ("the disk hangs",)
FULL_WORDS: Final = ("the disk is", "the disk hangs", "No space left", "can't be saved")
DAMAGE_WORDS: Final = ("can't start", "damaged", "checksum")
# Both secondaries may stall for ten seconds.
STALL_PAUSE_S_MAX: Final = 25.0
SNAPSHOT_WORDS: Final = ("a snapshot can't be installed",)

SINGLE: Final = (
    FaultClass("kill-primary", (kill_primary,)),
    FaultClass("kill", (kill,)),
    FaultClass(
        "crash-step",
        (crash_following, crash_leading, crash_saving, crash_installing, crash_voting),
        server_args=SMALL_LOG,
        server_script=FAILPOINT_SERVER,
    ),
    FaultClass("pause", (pause,)),
    FaultClass("partition", (partition,)),
    FaultClass("one-way", (one_way,)),
    FaultClass("ring", (chain, swizzle), nodes=5),
    FaultClass("chain", (chain, swizzle)),
    FaultClass("delay", (delay,)),
    FaultClass("loss", (loss,)),
    FaultClass("snapshot", (snapshot,), server_args=SMALL_LOG),
    FaultClass("disk-error", (disk_error,), expected=DISK_WORDS),
    FaultClass("fsync-error", (fsync_error,), server_script=FAILPOINT_SERVER, expected=FSYNC_WORDS),
    FaultClass(
        "disk-stall",
        (disk_stall,),
        server_script=FAILPOINT_SERVER,
        expected=STALL_WORDS,
        pause_s_max=STALL_PAUSE_S_MAX,
    ),
    FaultClass(
        "damage",
        (damage, snapshot_damaged),
        server_args=SMALL_LOG,
        expected=DAMAGE_WORDS + SNAPSHOT_WORDS,
    ),
    FaultClass("wipe", (wipe,)),
    FaultClass("members", (members, replace)),
    FaultClass("members-election", (members_after_election, replace), nodes=5),
    FaultClass("transfer", (transfer, transfer_unheard, transfer_lagging)),
    FaultClass("clients", (clients, reset), server_args=MANY_CLIENTS),
    FaultClass("memory", (memory,), server_args=SMALL_MEMORY, refusals=(OutOfMemoryError.code,)),
    FaultClass("restart-all", (restart_all,)),
)
# What all of them can share: enough nodes, a server that can be made to fail, and small limits.
MIXED: Final = FaultClass(
    "mixed",
    tuple(dict.fromkeys(one for fault in SINGLE for one in fault.rounds)),
    nodes=5,
    is_mixed=True,
    pause_s_max=STALL_PAUSE_S_MAX,
    server_args=SMALL_LOG + SMALL_MEMORY + MANY_CLIENTS,
    server_script=FAILPOINT_SERVER,
    refusals=(OutOfMemoryError.code,),
    expected=tuple({word for fault in SINGLE for word in fault.expected}),
)
# Those that it leaves out take rights, a recorder or a mode of their own.
CLASSES: Final = (
    *SINGLE,
    FaultClass("power", (power_loss,), server_args=SMALL_LOG, loses_power=True),
    FaultClass(
        "disk-full",
        (disk_full,),
        server_args=SMALL_LOG,
        refusals=(NoSpaceError.code,),
        expected=FULL_WORDS,
    ),
    # No pause of a process: a lease does not outlive one between the look at the clock and the answer.
    FaultClass(
        "lease",
        (kill_primary, kill, partition, one_way, transfer_unpaused, transfer_unheard),
        server_args=("--read-mode", "lease"),
    ),
    MIXED,
)
