"""The files of the replicated log as bytes: what is written, and what damage means.

Rule 1: whatever a crash can leave of the last write is told apart from damage, sector by sector.
Where the two look the same it counts as damage, but for a last record without a trace, or one that
may lack a sector (docs/adr/0003 has the table).
Rule 2: nothing here changes a file.

The files are listed at the top of ``replication_log.py``, which alone calls this.
"""

from __future__ import annotations

import errno
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple
from zlib import crc32

from raft_types import Entry, HardState, Identity, decode_entries

FORMAT_VERSION = 2  # of identity.json and of segments; 1 was never released
_READ_BYTES = 4 << 20  # a recovery reads a segment in pieces of this size
SECTOR_BYTES = 512  # what a disk writes whole or not at all

_WHAT_TO_DO = (
    "This node does not start on a damaged log, and nothing in it was changed. While the others "
    "are a majority, move this data directory away and start the node again by the same command: "
    "it comes back as a new member and copies the data from them. Never delete single files: the "
    "node would forget its promises."
)


# ---- Errors: why a data directory cannot be used -----------------------------------------------

# What a disk may answer, and a person can mend while a node waits.
DISK_FAULTS: Final = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
}


class DataDirError(Exception):
    """The data directory cannot be used; the message says why, and what to do."""


class DataDirLockedError(DataDirError):
    """Another process uses the directory."""


class DiskRefusesError(OSError):
    """The disk took no more, for one of DISK_FAULTS; nothing was synced, so nothing is in doubt."""


class UnknownFormatError(DataDirError):
    """The directory was written by a version of this program with another file format."""

    def __init__(self, path: Path, version: object) -> None:
        super().__init__(
            f"{path} has format version {version}, and this program reads only version "
            f"{FORMAT_VERSION}. Start the version of the program that wrote it."
        )


class CorruptLogError(DataDirError):
    """A file is damaged or missing, in a way that a crash does not explain."""

    def __init__(self, path: Path, offset: int, reason: str) -> None:
        super().__init__(f"{path} at byte {offset}: {reason}. {_WHAT_TO_DO}")
        self.path = path
        self.offset = offset
        self.reason = reason


class TornRecordError(Exception):
    """What stands at ``offset`` looks like a record whose write a crash interrupted."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.offset = offset


# ---- The format --------------------------------------------------------------------------------

# Magic, format version, sequence, begins anew (0 or 1), first index, base term; the hard state's
# term and voted_for (empty: nobody); CRC32. A sector holds it all.
_SEGMENT_HEADER = struct.Struct(">4sIIIQQQ64pI")
SEGMENT_HEADER_BYTES = _SEGMENT_HEADER.size
_VOTED_FOR_BYTES_MAX = 63  # as 64p has it: a byte for the length
_SEGMENT_MAGIC = b"RLOG"
_SEGMENT_NAME = re.compile(r"log-([0-9a-f]{8})-([0-9a-f]{16})\.seg")

_RECORD_HEADER = struct.Struct(">IIII")  # payload length, kind, CRC32 of payload, own CRC32
RECORD_HEADER_BYTES = _RECORD_HEADER.size
RECORD_BYTES_MAX = 0x7FFF_F000  # the most that one read or write call of Linux moves
_ENTRIES = 0  # kinds of records
_HARD_STATE_AND_ENTRIES = 1

_HARD_STATE = struct.Struct(">QB")  # term, length of voted_for (0: nobody), which follows


_CRC_BYTES = 4  # of a header, at its end, over what comes before


class SegmentHeader(NamedTuple):
    """What a segment knows of the log at its creation: it needs none before it, nor trusts them."""

    sequence: int  # orders the files
    begins_anew: bool  # no segment before it counts: see ReplicationLog.reset
    # No entry in the segment is before this one, which is the first written to it. It need not
    # grow from file to file: a replacement that reaches further back begins a segment.
    first_index: int
    base_term: int  # of the entry before first_index
    hard_state: HardState


def encode_segment_header(header: SegmentHeader) -> bytes:
    sequence, begins_anew, first_index, base_term, (term, voted_for) = header
    vote = (voted_for or "").encode()
    assert len(vote) <= _VOTED_FOR_BYTES_MAX
    fields = sequence, begins_anew, first_index, base_term, term, vote
    packed = _SEGMENT_HEADER.pack(_SEGMENT_MAGIC, FORMAT_VERSION, *fields, 0)
    return _sealed(packed[:-_CRC_BYTES])


def decode_segment_header(path: Path, data: bytes) -> SegmentHeader:
    """Raises CorruptLogError or UnknownFormatError. ``data`` is the segment's first sector."""
    magic, version = data[:4], int.from_bytes(data[4:8], "big")
    if len(data) < 8 or magic != _SEGMENT_MAGIC:
        raise CorruptLogError(path, 0, "not a segment of the log")
    # The header of another version may be longer or shorter, but its checksum is at its end.
    for end in [SEGMENT_HEADER_BYTES] if version == FORMAT_VERSION else range(12, len(data) + 1):
        if data[:end] == _sealed(data[: end - _CRC_BYTES]):
            break
    else:
        raise CorruptLogError(path, 0, "the segment's header has a wrong checksum")
    if version != FORMAT_VERSION:
        raise UnknownFormatError(path, version)
    _magic, _version, *fields, term, vote, _crc = _SEGMENT_HEADER.unpack_from(data)
    sequence, begins_anew, first_index, base_term = fields
    try:
        voted_for = vote.decode() or None
    except UnicodeDecodeError as error:
        raise CorruptLogError(path, 0, f"the vote is no member's id: {error}") from error
    hard_state = HardState(term, voted_for)
    header = SegmentHeader(sequence, bool(begins_anew), first_index, base_term, hard_state)
    named = _SEGMENT_NAME.fullmatch(path.name)
    if named is None or (sequence, first_index) != tuple(int(x, 16) for x in named.groups()):
        raise CorruptLogError(path, 0, "the segment has another's name")
    return header


def record_start(end: int) -> int:
    """Where the record after one that ends at ``end`` begins: there, or at the next sector.

    Within one sector, its header is on the disk whole or not at all, whenever the power fails.
    """
    left_bytes = -end % SECTOR_BYTES
    return end + left_bytes if 0 < left_bytes < RECORD_HEADER_BYTES else end


def encode_record(hard_state: HardState | None, entries: bytes) -> bytes:
    kind, payload = _ENTRIES, entries
    if hard_state is not None:
        voted_for = (hard_state.voted_for or "").encode()
        kind = _HARD_STATE_AND_ENTRIES
        payload = _HARD_STATE.pack(hard_state.term, len(voted_for)) + voted_for + entries
    header = _RECORD_HEADER.pack(len(payload), kind, crc32(payload), 0)
    return _sealed(header[:-_CRC_BYTES]) + payload


def _sealed(fields: bytes) -> bytes:
    return fields + crc32(fields).to_bytes(_CRC_BYTES, "big")


def decode_record_header(buffer: bytes, at: int) -> tuple[int, int, int] | None:
    """Payload length, kind and payload CRC32; None if the header's own checksum is wrong."""
    length, kind, payload_crc, header_crc = _RECORD_HEADER.unpack_from(buffer, at)
    if crc32(buffer[at : at + RECORD_HEADER_BYTES - _CRC_BYTES]) != header_crc:
        return None
    return length, kind, payload_crc


def decode_payload(kind: int, payload: bytes) -> tuple[HardState | None, list[Entry]]:
    """A record's hard state, if it has one, and its entries. ValueError if it has neither form."""
    if kind == _ENTRIES:
        return None, decode_entries(payload)
    if kind != _HARD_STATE_AND_ENTRIES or len(payload) < _HARD_STATE.size:
        raise ValueError(f"a record of the unknown kind {kind}")
    term, length = _HARD_STATE.unpack_from(payload)
    end = _HARD_STATE.size + length
    voted_for = payload[_HARD_STATE.size : end].decode() or None
    return HardState(term, voted_for), decode_entries(payload, end)


def _data_end(fd: int, size_bytes: int) -> int:
    """The offset behind the file's last byte that is not zero."""
    end = size_bytes
    while end > 0:
        start = max(0, end - _READ_BYTES)
        data = os.pread(fd, end - start, start).rstrip(b"\0")
        if data:
            return start + len(data)
        end = start
    return 0


def scan(path: Path, fd: int, size_bytes: int) -> Iterator[tuple[int, int, int, bytes]]:
    """Offset, size, kind and payload of each record, until nothing but zeros is left.

    A last record of which not one byte is on the disk cannot be told from one that was never
    written. Raises TornRecordError where an interrupted write explains what is found, else
    CorruptLogError.
    """
    data_end = _data_end(fd, size_bytes)
    offset, want_bytes = SEGMENT_HEADER_BYTES, _READ_BYTES
    while offset < data_end:
        buffer = os.pread(fd, want_bytes, offset)
        at, end, want_bytes = 0, 0, _READ_BYTES
        while offset + at < data_end and len(buffer) - at >= RECORD_HEADER_BYTES:
            header = decode_record_header(buffer, at)
            if header is None:
                raise _judge_header(path, fd, offset + at, size_bytes)
            length, kind, payload_crc = header
            end = at + RECORD_HEADER_BYTES + length
            if end > len(buffer):
                break
            payload = buffer[at + RECORD_HEADER_BYTES : end]
            if crc32(payload) != payload_crc:
                raise _judge_payload(path, offset + at, payload, data_end)
            yield offset + at, end - at, kind, payload
            at = record_start(offset + end) - offset
        if at == 0:  # not one whole record: it is longer than what was read, or than the file
            if offset + len(buffer) >= size_bytes:
                raise TornRecordError(offset, "the file ends within a record")
            want_bytes = end
        offset += at


def _judge_header(path: Path, fd: int, offset: int, size_bytes: int) -> Exception:
    """A record header has a wrong checksum: torn only if its sector did not arrive.

    Then zeros are left of it, up to the sector's border. Other sectors of the record may have
    arrived, but nothing was written behind it: one write is under way at a time.
    """
    data = os.pread(fd, size_bytes - offset, offset)
    if not _is_zero(data[: SECTOR_BYTES - offset % SECTOR_BYTES]):
        return CorruptLogError(path, offset, "a record's header has a wrong checksum")
    if _holds_a_record(data):
        return CorruptLogError(path, offset, "zeros in place of a record, and others after it")
    return TornRecordError(offset, "zeros in place of the last record's header")


# What a record's header begins with: a length, not 0, and a kind. Finds all, and little else.
_HEADER_LIKE = re.compile(rb"(?=[\x00-\x7f].{3}\0\0\0[\0\1])(?!\0{4})", re.DOTALL)


def _holds_a_record(data: bytes) -> bool:
    """Whether a whole record, with both its checksums right, begins anywhere."""
    for found in _HEADER_LIKE.finditer(data):
        start = found.start() + RECORD_HEADER_BYTES
        header = decode_record_header(data, found.start()) if start <= len(data) else None
        if header is not None:
            length, _kind, payload_crc = header
            payload = data[start : start + length]
            if len(payload) == length and crc32(payload) == payload_crc:
                return True
    return False


def _judge_payload(path: Path, offset: int, payload: bytes, data_end: int) -> Exception:
    """A payload has a wrong checksum: torn only in the last record, with a sector still unwritten.

    The rule is etcd's (wal/decoder.go, isTornEntry). The sector that the header ends in did arrive,
    for the header is whole: only those after it count.
    """
    start = offset + RECORD_HEADER_BYTES
    if start + len(payload) >= data_end:
        for at in range(-start % SECTOR_BYTES, len(payload), SECTOR_BYTES):
            if _is_zero(payload[at : at + SECTOR_BYTES]):
                return TornRecordError(offset, "zeros in place of a part of the last record")
    return CorruptLogError(path, offset, "a record has a wrong checksum")


def is_cut_short(path: Path) -> bool:
    """Whether a crash interrupted the creation of a segment, before anything was in it."""
    with path.open("rb") as file:
        data = file.read(SEGMENT_HEADER_BYTES + 1)
    return len(data) < SEGMENT_HEADER_BYTES or (
        len(data) == SEGMENT_HEADER_BYTES and _is_zero(data)
    )


def _is_zero(data: bytes) -> bool:
    return data.count(0) == len(data)


def encode_identity(fields: dict[str, object]) -> bytes:
    """The identity file: fields and their CRC32, readable for a person."""
    crc = crc32(json.dumps(fields).encode())
    return json.dumps({**fields, "crc32": f"{crc:08x}"}, indent=2).encode() + b"\n"


def decode_identity(path: Path, data: bytes) -> Identity:
    try:
        fields = json.loads(data)
        fields.pop("crc32")
        # Compared as bytes, so that no change at all, by hand or by a bad disk, goes unseen.
        if data != encode_identity(fields):
            raise ValueError("its checksum is wrong")
        version = fields.pop("format_version")
        if version != FORMAT_VERSION:
            raise UnknownFormatError(path, version)
        return Identity(**fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptLogError(path, 0, f"not an identity: {error!r}") from error
