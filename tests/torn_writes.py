"""What a power cut leaves of a write to the log, as the log's own reader finds it.

Rule: the bytes are those that ``replication_log.py`` would write, torn where chance will have it,
and read back by the code that reads them after a crash. Nothing here knows what a record looks like.

Used by ``sim_cluster.py``. The file system's part is torn in ``power_loss.py``.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from raft_types import Entry, HardState, encode_entries
from replication_log_format import (
    SECTOR_BYTES,
    SEGMENT_HEADER_BYTES,
    TornRecordError,
    decode_payload,
    encode_record,
    record_start,
    scan,
)

Written = tuple[HardState | None, Sequence[Entry]]


def is_torn(write: Written, rng: random.Random) -> bool:
    """Whether a power cut in the middle of the write leaves nothing of it that is found again.

    Raises CorruptLogError if the reader takes what is left for damage, which stops a node.
    """
    earlier = encode_record(None, rng.randbytes(rng.randint(1, 2 * SECTOR_BYTES)))
    start = record_start(SEGMENT_HEADER_BYTES + len(earlier))
    record = encode_record(write[0], encode_entries(write[1]))
    end = start + len(record)
    with tempfile.TemporaryFile() as file:
        fd = file.fileno()
        os.ftruncate(fd, end + rng.choice((0, SECTOR_BYTES)))  # zeros, as before the write
        os.pwrite(fd, earlier, SEGMENT_HEADER_BYTES)
        for sector_start, sector_end in _arrived(start, end, rng):
            os.pwrite(fd, record[sector_start - start : sector_end - start], sector_start)
        if rng.random() < 0.5:  # the write made the file longer, and that may be lost too
            os.ftruncate(fd, rng.randint(start, end))
        try:
            _, *found = scan(Path("torn"), fd, os.fstat(fd).st_size)
        except TornRecordError:
            return True
    if not found:
        return True
    ((_, _, kind, payload),) = found
    hard_state, entries = decode_payload(kind, payload)
    assert (hard_state, entries) == (write[0], [*write[1]]), "what is found was never written"
    return False


def _arrived(start: int, end: int, rng: random.Random) -> list[tuple[int, int]]:
    """What of the bytes from ``start`` to ``end`` is on the disk: sectors, in whatever order."""
    borders = [start, *range(start - start % SECTOR_BYTES + SECTOR_BYTES, end, SECTOR_BYTES), end]
    sectors = list(pairwise(borders))
    if rng.random() < 0.5:  # one after the other, up to somewhere
        return sectors[: rng.randrange(len(sectors) + 1)]
    return [sector for sector in sectors if rng.random() < 0.5]
