"""The durable log after a crash or on a bad disk: what it cuts, and what it refuses."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import replication_log
import replication_log_format
from raft_types import Entry, EntryKind, HardState, encode_entries
from replication_log_format import CorruptLogError, UnknownFormatError
from tests.log_files import (
    VOTE,
    WatchedDisk,
    append_raw,
    entries,
    entry,
    flip,
    open_log,
    record_ends,
    recover,
    segments,
    write_log,
)

SECTOR_BYTES = 512
FLIPS = (0x01, 0x80, 0xFF)


@pytest.fixture(autouse=True)
def few_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files short enough to damage each of their bytes."""
    monkeypatch.setattr(replication_log, "_ZEROS_BYTES", 2048)


def put(path: Path, offset: int, data: bytes) -> None:
    """Overwrite a part of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


# ---- Torn tails --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("segment_bytes_max", [64 << 20, 150])
def test_open_when_cut_at_any_byte_then_whole_records_are_kept_and_more_can_follow(
    tmp_path: Path, segment_bytes_max: int
) -> None:
    """A crash cuts the last write anywhere: all before it is there, and the log goes on."""
    write_log(
        tmp_path, entries(1, 2), [entry(3)], entries(4, 6), segment_bytes_max=segment_bytes_max
    )
    contents = {path: path.read_bytes() for path in segments(tmp_path)}
    segment = segments(tmp_path)[-1]
    data, ends = segment.read_bytes(), record_ends(segment)
    last_after = [0, 0, 2, 3, 6][-len(ends) :]  # after each record that this segment may hold

    for length in [*range(ends[0], min(ends[-1] + 20, len(data))), len(data)]:
        for path, content in contents.items():
            path.write_bytes(content if path != segment else data[:length])
        whole = sum(end <= length for end in ends)
        last = last_after[whole - 1]
        with open_log(tmp_path) as log:
            assert log.recovered.tail == tuple(entries(1, last))
            voted = whole > 1 or len(contents) > 1
            assert log.recovered.hard_state == (VOTE if voted else HardState(0, None))
            log.append(HardState(2, None), [entry(last + 1, term=2)])
        assert recover(tmp_path).tail == (*entries(1, last), entry(last + 1, term=2))


def test_open_when_a_torn_tail_is_cut_then_a_copy_is_kept(tmp_path: Path) -> None:
    """What is cut off can still be looked at (etcd keeps a .broken file)."""
    write_log(tmp_path, entries(1, 2), entries(3, 4))
    segment = segments(tmp_path)[0]
    data = segment.read_bytes()
    start, end = record_ends(segment)[-2:]
    segment.write_bytes(data[: end - 1])

    assert recover(tmp_path).last_index == 2
    assert segment.read_bytes() == data[:start]
    assert segment.with_suffix(".seg.torn").read_bytes() == data[start : end - 1]


@pytest.mark.parametrize("zeros", [0, 1, 15, 16, 17, 600, 5000])
@pytest.mark.parametrize("segment_bytes_max", [64 << 20, 300])
def test_open_when_a_file_ends_in_zeros_then_they_are_its_clean_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, zeros: int, segment_bytes_max: int
) -> None:
    """In any segment, however many zeros: no copy, no cut, no warning, and more can follow."""
    write_log(tmp_path, *([item] for item in entries(1, 20)), segment_bytes_max=segment_bytes_max)
    contents = {}
    for segment in segments(tmp_path):
        contents[segment] = segment.read_bytes()[: record_ends(segment)[-1]] + bytes(zeros)
        segment.write_bytes(contents[segment])

    assert recover(tmp_path).tail == tuple(entries(1, 20))
    assert caplog.messages == []
    assert {path: path.read_bytes() for path in segments(tmp_path)} == contents
    assert not list(tmp_path.glob("*.torn"))
    with open_log(tmp_path) as log:
        log.append(None, [entry(21)])
    assert recover(tmp_path).tail == tuple(entries(1, 21))


def test_open_when_a_torn_tail_is_cut_then_nothing_of_it_stays_behind_later_records(
    tmp_path: Path,
) -> None:
    """The cut is durable before the next record, which may be shorter than the torn one."""
    watched = WatchedDisk()
    write_log(tmp_path, entries(1, 2), [entry(3, data=b"x" * 3 * SECTOR_BYTES)])
    segment = segments(tmp_path)[0]
    start = record_ends(segment)[-2]
    put(segment, SECTOR_BYTES, bytes(SECTOR_BYTES))

    torn = segment.read_bytes()[start:].rstrip(b"\0")

    with open_log(tmp_path, fsync=True, disk=watched.disk()) as log:
        calls = watched.take()
        assert segment.stat().st_size == start
        assert segment.with_suffix(".seg.torn").read_bytes() == torn
        log.append(None, [entry(3)])

    assert calls.index(("fsync", segment.name)) < calls.index(("pwrite", segment.name))
    end = record_ends(segment)[-1]
    assert not any(segment.read_bytes()[end:])
    assert recover(tmp_path).tail == tuple(entries(1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("with_zeros", [True, False])
@pytest.mark.parametrize("ahead_bytes", [0, 1, 250, 340, 350, 360, 366, 367, 370, 382, 383, 400])
def test_open_when_any_sectors_of_the_last_write_arrived_then_the_record_is_there_or_not(
    tmp_path: Path, ahead_bytes: int, with_zeros: bool
) -> None:
    """Whichever sectors of a write are on the disk: all of its record or nothing, never refused.

    And whatever length the file has: the file system may not have come to store the new one.
    """
    last = entry(3, data=b"x" * 700 + bytes(600) + b"y" * 500)
    write_log(tmp_path, [entry(1)], [entry(2, data=b"z" * (1 + ahead_bytes))])
    segment = segments(tmp_path)[0]
    before = segment.read_bytes()
    if not with_zeros:
        before = before[: record_ends(segment)[-1]]
        segment.write_bytes(before)
    with open_log(tmp_path) as log:
        log.append(None, [last])
    written, (start, end) = segment.read_bytes(), record_ends(segment)[-2:]
    sectors = range(start // SECTOR_BYTES * SECTOR_BYTES, end, SECTOR_BYTES)
    lengths = {len(before), len(written), end - 1, *(at for at in sectors if at >= len(before))}
    outcomes = set()

    for arrived in itertools.product([False, True], repeat=len(sectors)):
        for length in sorted(length for length in lengths if length >= len(before)):
            after = bytearray(before.ljust(length, b"\0"))
            for at, here in zip(sectors, arrived, strict=True):
                if here:
                    after[at : at + SECTOR_BYTES] = written[at : at + SECTOR_BYTES]
            segment.write_bytes(after[:length])
            tail = recover(tmp_path).tail
            outcomes.add(len(tail))
            assert len(tail) == 2 or tail[2:] == (last,)
            with open_log(tmp_path) as log:
                log.append(None, [entry(len(tail) + 1)])
            assert recover(tmp_path).last_index == len(tail) + 1
    assert outcomes == {2, 3}


def test_open_when_a_sector_of_the_last_record_is_unwritten_then_it_is_cut(tmp_path: Path) -> None:
    """Sectors of one write may arrive in any order; those that did not are zeros (etcd's rule)."""
    last = entry(3, data=b"x" * 4 * SECTOR_BYTES)
    write_log(tmp_path, entries(1, 2), [last])
    segment = segments(tmp_path)[0]
    data, (start, end) = segment.read_bytes(), record_ends(segment)[-2:]
    assert start < SECTOR_BYTES

    for sector in range(SECTOR_BYTES, end, SECTOR_BYTES):
        torn = bytearray(data)
        torn[sector : sector + SECTOR_BYTES] = bytes(len(data[sector : sector + SECTOR_BYTES]))
        segment.write_bytes(torn)
        assert recover(tmp_path).last_index == 2
    # A wrong byte in a last record that lacks no sector is no crash, but damage.
    segment.write_bytes(data)
    for offset in range(start + 16, end, 100):
        flip(segment, offset)
        with pytest.raises(CorruptLogError, match="wrong checksum"):
            recover(tmp_path)
        flip(segment, offset)
    # And so are the same zeros before another record.
    put(segment, start, bytes(end - start))
    write_log(tmp_path, [last], [entry(4)])
    torn = bytearray(segment.read_bytes())
    torn[2 * SECTOR_BYTES : 3 * SECTOR_BYTES] = bytes(SECTOR_BYTES)
    segment.write_bytes(torn)
    with pytest.raises(CorruptLogError, match="wrong checksum"):
        recover(tmp_path)


def test_open_when_zeros_stand_for_a_header_then_only_a_crash_may_explain_them(
    tmp_path: Path,
) -> None:
    """A header is missing with its whole sector, and nothing whole was written behind it."""
    last = entry(3, data=b"x" * 2 * SECTOR_BYTES)
    write_log(tmp_path, [entry(1)], [entry(2)], [last])
    segment = segments(tmp_path)[0]
    data, start = segment.read_bytes(), record_ends(segment)[-2]

    put(segment, start, bytes(16))  # of the header's sector, zeros up to here only
    with pytest.raises(CorruptLogError, match="header has a wrong checksum"):
        recover(tmp_path)
    put(segment, start, bytes(SECTOR_BYTES - start))
    assert recover(tmp_path).last_index == 2

    segment.write_bytes(data)
    with open_log(tmp_path) as log:
        log.append(None, [entry(4)])
    put(segment, start, bytes(SECTOR_BYTES - start))
    with pytest.raises(CorruptLogError, match="and others after it"):
        recover(tmp_path)


@pytest.mark.parametrize("rest", [b"", b"x", bytes(40), bytes(15) + b"x"])
def test_open_when_searching_for_records_then_each_whole_one_is_found(rest: bytes) -> None:
    """At any place, with a payload of any length, also where the data ends."""
    record = replication_log_format.encode_record(VOTE, encode_entries([entry(1)]))
    for ahead in (b"", b"\0", bytes(600), b"\0\0\0\1\0\0\0\1", record[:-1], record[4:]):
        assert replication_log_format._holds_a_record(ahead + record + rest)
        assert not replication_log_format._holds_a_record(ahead + record[:-1])
        assert not replication_log_format._holds_a_record(ahead + record[4:] + rest)
        wrong = bytes([record[-1] ^ 1])
        assert not replication_log_format._holds_a_record(ahead + record[:-1] + wrong + rest)


def test_open_when_a_tear_is_not_at_the_end_of_the_log_then_refused(tmp_path: Path) -> None:
    """Only the last segment was being written; an earlier one was complete before it was left."""
    write_log(tmp_path, *([item] for item in entries(1, 20)), segment_bytes_max=300)
    segment = segments(tmp_path)[1]
    data = segment.read_bytes()

    end, start = record_ends(segment)[-1], record_ends(segment)[-2]

    for damaged in (data[: end - 1], data + b"x", data[:start], data[:start] + bytes(100), b""):
        segment.write_bytes(damaged)
        with pytest.raises(CorruptLogError):
            recover(tmp_path)
        assert segment.read_bytes() == damaged
    segment.write_bytes(data)
    assert recover(tmp_path).last_index == 20


def test_open_when_a_segment_lost_its_end_before_one_without_entries_then_refused(
    tmp_path: Path,
) -> None:
    """A segment knows where the log ended before it, even if nothing in it shows the gap."""
    write_log(tmp_path, entries(1, 2), entries(3, 4))
    segment = segments(tmp_path)[0]
    with open_log(tmp_path, segment_bytes_max=1) as log:
        log.append(HardState(2, None), [])

    segment.write_bytes(segment.read_bytes()[: record_ends(segment)[-2]])
    with pytest.raises(CorruptLogError, match="continues at entry 5 a log that ends at 2"):
        recover(tmp_path)


def test_open_when_the_creation_of_a_segment_was_cut_short_then_it_is_removed(
    tmp_path: Path,
) -> None:
    """A segment takes records only after its header is durable: before that it holds nothing."""
    write_log(tmp_path, *([item] for item in entries(1, 10)), segment_bytes_max=300)
    segment = segments(tmp_path)[-1]
    header = segment.read_bytes()[: record_ends(segment)[0]]
    with open_log(tmp_path) as log:
        last = log.recovered.last_index

    for index, content in enumerate(
        [header[:length] for length in range(len(header))] + [bytes(24)]
    ):
        name = f"log-{len(segments(tmp_path)) + 1:08x}-{last + index + 1:016x}.seg"
        (tmp_path / name).write_bytes(content)
        with open_log(tmp_path) as log:
            assert log.recovered.tail == tuple(entries(1, last + index))
            assert not (tmp_path / name).exists()
            log.append(None, [entry(last + index + 1)])


# ---- Damage ------------------------------------------------------------------------------------


def test_open_when_a_segment_lost_a_replacement_then_refused(tmp_path: Path) -> None:
    """The next segment knows the term in which the log ended, where the index is the same."""
    write_log(tmp_path, entries(1, 2), entries(3, 4))
    segment = segments(tmp_path)[0]
    with open_log(tmp_path) as log:
        log.append(HardState(2, None), [entry(4, term=2)])
    start = record_ends(segment)[-2]
    with open_log(tmp_path, segment_bytes_max=1) as log:
        log.append(None, [entry(5, term=2)])

    segment.write_bytes(segment.read_bytes()[:start])
    with pytest.raises(CorruptLogError, match="continues after term 2"):
        recover(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("segment_bytes_max", [64 << 20, 150])
def test_open_when_any_byte_is_flipped_then_refused(tmp_path: Path, segment_bytes_max: int) -> None:
    """Not one wrong byte, in no file, is taken for what was written."""
    write_log(
        tmp_path, entries(1, 2), [entry(3)], entries(4, 6), segment_bytes_max=segment_bytes_max
    )
    intact = recover(tmp_path)

    used_bytes = {path: record_ends(path)[-1] for path in segments(tmp_path)}
    used_bytes[tmp_path / "identity.json"] = (tmp_path / "identity.json").stat().st_size

    for path, size_bytes in used_bytes.items():
        for offset in range(size_bytes):
            for pattern in FLIPS:
                flip(path, offset, pattern)
                with pytest.raises(CorruptLogError) as caught:
                    recover(tmp_path)
                assert str(path) in str(caught.value)
                assert "move this data directory away" in str(caught.value)
                flip(path, offset, pattern)
    assert recover(tmp_path) == intact


@pytest.mark.slow
def test_open_when_any_zero_behind_the_records_is_flipped_then_never_a_wrong_entry(
    tmp_path: Path,
) -> None:
    """Nothing is read out of it: it is cut as a torn tail, or refused."""
    write_log(tmp_path, entries(1, 2), [entry(3)], entries(4, 6))
    intact = recover(tmp_path)
    segment = segments(tmp_path)[0]
    data, end = segment.read_bytes(), record_ends(segment)[-1]

    for offset in range(end, len(data)):
        flip(segment, offset)
        if offset < SECTOR_BYTES:
            with pytest.raises(CorruptLogError, match="header has a wrong checksum"):
                recover(tmp_path)
            flip(segment, offset)
        else:
            assert recover(tmp_path) == intact
            segment.write_bytes(data)


@pytest.mark.slow
def test_open_when_any_byte_is_flipped_beside_zeros_then_never_a_wrong_entry(
    tmp_path: Path,
) -> None:
    """Where the last record has a sector of zeros of its own, a flip may pass for a torn tail."""
    last = entry(3, data=b"x" + bytes(1500) + b"x")
    write_log(tmp_path, entries(1, 2), [last])
    segment = segments(tmp_path)[0]
    data, (start, end) = segment.read_bytes(), record_ends(segment)[-2:]

    for offset in range(end):
        flip(segment, offset)
        try:
            assert recover(tmp_path).tail == tuple(entries(1, 2))
            assert offset >= start + 16
        except CorruptLogError:
            assert offset < start + 16
        segment.write_bytes(data)


def test_open_when_a_page_in_the_middle_is_zero_then_refused(tmp_path: Path) -> None:
    """A page that was lost takes whole records with it; the records after it show the damage."""
    write_log(tmp_path, *([item] for item in entries(1, 400)))
    segment = segments(tmp_path)[0]
    data, end = segment.read_bytes(), record_ends(segment)[-1]
    assert end > 4 * 4096

    for page in range(0, end - 4096, 4096):
        segment.write_bytes(data[:page] + bytes(4096) + data[page + 4096 :])
        with pytest.raises(CorruptLogError, match=segment.name):
            recover(tmp_path)


def test_open_when_refused_then_nothing_was_changed(tmp_path: Path) -> None:
    """The damaged files stay as they are, to be looked at, and the lock is given back."""
    write_log(tmp_path, entries(1, 2), entries(3, 4))
    segment = segments(tmp_path)[0]
    flip(segment, record_ends(segment)[1] + 20)
    data = segment.read_bytes()

    for _ in range(2):
        with pytest.raises(CorruptLogError):
            recover(tmp_path)
    assert segment.read_bytes() == data


def test_open_when_a_segment_is_missing_then_refused(tmp_path: Path) -> None:
    """Segments are numbered: one in the middle cannot be lost unseen.

    One at the front may have been dropped; who holds the state knows whether it was.
    """
    write_log(tmp_path, *([item] for item in entries(1, 20)), segment_bytes_max=300)

    for segment in segments(tmp_path)[1:-1]:
        moved = segment.rename(segment.with_suffix(".away"))
        with pytest.raises(CorruptLogError, match="missing"):
            recover(tmp_path)
        moved.rename(segment)
    assert recover(tmp_path).last_index == 20


def test_open_when_a_segment_has_another_name_then_refused(tmp_path: Path) -> None:
    """A segment's header repeats its name, so that files cannot change places."""
    write_log(tmp_path, entries(1, 3))
    segment = segments(tmp_path)[0]

    for name in ("log-00000001-0000000000000002.seg", "log-00000001-1.seg"):
        renamed = segment.rename(tmp_path / name)
        with pytest.raises(CorruptLogError, match="another's name"):
            recover(tmp_path)
        renamed.rename(segment)


def test_open_when_whole_records_make_no_log_then_refused(tmp_path: Path) -> None:
    """Right checksums are not enough: indexes without a gap, terms that never fall, one vote."""
    wrong = [
        (None, [entry(5, term=2)]),
        (None, [entry(4, term=2), entry(6, term=2)]),
        (None, [entry(4, term=1)]),
        (None, [entry(4, term=3)]),
        (HardState(3, None), [entry(4, term=3), entry(5, term=2)]),
        (HardState(2, "b" * 16), []),
        (HardState(1, None), []),
        (None, [Entry(4, 2, EntryKind.MEMBERSHIP, b"[{}]")]),
        (None, [Entry(4, 2, EntryKind.MEMBERSHIP, b"[" * 100_000)]),
    ]
    write_log(tmp_path, entries(1, 2))
    append_raw(tmp_path, HardState(2, "a" * 16), [entry(3, term=2)])
    segment = segments(tmp_path)[0]
    data = segment.read_bytes()

    for hard_state, batch in wrong:
        start = append_raw(tmp_path, hard_state, batch)
        with pytest.raises(CorruptLogError, match=f"at byte {start}"):
            recover(tmp_path)
        segment.write_bytes(data)
    assert recover(tmp_path).last_index == 3


def test_open_when_a_segments_vote_is_no_text_then_refused(tmp_path: Path) -> None:
    """A right checksum over nonsense is refused in words, as every other flaw (found by fuzzing)."""
    write_log(tmp_path, entries(1, 2))
    segment = segments(tmp_path)[0]
    data = segment.read_bytes()
    fields = data[: replication_log_format.SEGMENT_HEADER_BYTES - 4]
    wrong = fields[:-64] + b"\x01\xf4" + bytes(62)
    segment.write_bytes(replication_log_format._sealed(wrong) + data[len(wrong) + 4 :])

    with pytest.raises(CorruptLogError, match="no member's id"):
        recover(tmp_path)


@pytest.mark.parametrize(("version", "fields_bytes"), [(1, 16), (3, 100)])
def test_open_when_written_by_another_version_then_told_to_use_that(
    tmp_path: Path, version: int, fields_bytes: int
) -> None:
    """An unknown format is no damage, and throwing the data away is no advice."""
    write_log(tmp_path, entries(1, 3))
    segment = segments(tmp_path)[0]
    data = segment.read_bytes()
    header = b"RLOG" + version.to_bytes(4, "big") + b"x" * fields_bytes
    segment.write_bytes(replication_log_format._sealed(header) + data[len(header) + 4 :])

    with pytest.raises(UnknownFormatError, match=rf"version {version}.*Start the version"):
        recover(tmp_path)
    segment.write_bytes(data)
    path = tmp_path / "identity.json"
    path.write_bytes(
        replication_log_format.encode_identity({"format_version": version, "new": "field"})
    )
    with pytest.raises(UnknownFormatError, match=rf"identity\.json.*version {version}"):
        recover(tmp_path)
