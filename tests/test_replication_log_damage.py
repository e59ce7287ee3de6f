"""The durable log after a crash or on a bad disk: what it cuts, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

import replication_log
from raft_types import Entry, EntryKind, HardState
from replication_log import CorruptLogError, UnknownFormatError
from tests.log_files import (
    VOTE,
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
    segment = segments(tmp_path)[-1]
    data, ends = segment.read_bytes(), record_ends(segment)
    last_after = [0, 0, 2, 3, 6][-len(ends) :]  # after each record that this segment may hold

    for length in range(ends[0], len(data) + 1):
        segment.write_bytes(data[:length])
        whole = sum(end <= length for end in ends)
        last = last_after[whole - 1]
        with open_log(tmp_path) as log:
            assert log.recovered.tail == tuple(entries(1, last))
            voted = whole > 1 or segment != segments(tmp_path)[0]
            assert log.recovered.hard_state == (VOTE if voted else HardState(0, None))
            log.append(HardState(2, None), [entry(last + 1, term=2)])
        assert recover(tmp_path).tail == (*entries(1, last), entry(last + 1, term=2))
        for later in segments(tmp_path):
            if later.name > segment.name:
                later.unlink()


def test_open_when_a_torn_tail_is_cut_then_a_copy_is_kept(tmp_path: Path) -> None:
    """What is cut off can still be looked at (etcd keeps a .broken file)."""
    write_log(tmp_path, entries(1, 2), entries(3, 4))
    segment = segments(tmp_path)[0]
    data, start = segment.read_bytes(), record_ends(segment)[-2]
    segment.write_bytes(data[:-1])

    assert recover(tmp_path).last_index == 2
    assert segment.read_bytes() == data[:start]
    assert segment.with_suffix(".seg.torn").read_bytes() == data[start:-1]


@pytest.mark.parametrize("zeros", [1, 15, 16, 17, 600, 5000])
def test_open_when_the_file_ends_in_zeros_then_they_are_cut(tmp_path: Path, zeros: int) -> None:
    """A file may have grown before its bytes arrived: nothing but zeros is no record."""
    write_log(tmp_path, entries(1, 2))
    with segments(tmp_path)[0].open("ab") as file:
        file.write(bytes(zeros))

    with open_log(tmp_path) as log:
        assert log.recovered.tail == tuple(entries(1, 2))
        log.append(None, [entry(3)])
    assert recover(tmp_path).last_index == 3


def test_open_when_a_sector_of_the_last_record_is_unwritten_then_it_is_cut(tmp_path: Path) -> None:
    """Sectors of one write may arrive in any order; those that did not are zeros (etcd's rule)."""
    last = entry(3, data=b"x" * 4 * SECTOR_BYTES)
    write_log(tmp_path, entries(1, 2), [last])
    segment = segments(tmp_path)[0]
    data, start = segment.read_bytes(), record_ends(segment)[-2]
    assert start < SECTOR_BYTES

    for sector in range(SECTOR_BYTES, len(data), SECTOR_BYTES):
        torn = bytearray(data)
        torn[sector : sector + SECTOR_BYTES] = bytes(len(data[sector : sector + SECTOR_BYTES]))
        segment.write_bytes(torn)
        assert recover(tmp_path).last_index == 2
    # The same zeros before another record are no crash, but damage.
    write_log(tmp_path, [last], [entry(4)])
    torn = bytearray(segment.read_bytes())
    torn[2 * SECTOR_BYTES : 3 * SECTOR_BYTES] = bytes(SECTOR_BYTES)
    segment.write_bytes(torn)
    with pytest.raises(CorruptLogError, match="wrong checksum"):
        recover(tmp_path)


def test_open_when_a_record_header_crosses_an_unwritten_sector_then_it_is_cut(
    tmp_path: Path,
) -> None:
    """Half a header, and zeros from the sector's border on, is a torn tail as well."""
    write_log(tmp_path, [entry(1, data=b"x" * 402)], [entry(2)])
    segment = segments(tmp_path)[0]
    data, start = segment.read_bytes(), record_ends(segment)[-2]
    assert start < SECTOR_BYTES < start + 16

    segment.write_bytes(data[:SECTOR_BYTES] + bytes(len(data) - SECTOR_BYTES))
    assert recover(tmp_path).last_index == 1


def test_open_when_a_tear_is_not_at_the_end_of_the_log_then_refused(tmp_path: Path) -> None:
    """Only the last segment was being written; an earlier one was complete before it was left."""
    write_log(tmp_path, *([item] for item in entries(1, 20)), segment_bytes_max=300)
    segment = segments(tmp_path)[1]
    data = segment.read_bytes()

    for damaged in (data[:-1], data + bytes(100), data[: record_ends(segment)[-2]], b""):
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


@pytest.mark.slow
@pytest.mark.parametrize("segment_bytes_max", [64 << 20, 150])
def test_open_when_any_byte_is_flipped_then_refused(tmp_path: Path, segment_bytes_max: int) -> None:
    """Not one wrong byte, in no file, is taken for what was written."""
    write_log(
        tmp_path, entries(1, 2), [entry(3)], entries(4, 6), segment_bytes_max=segment_bytes_max
    )
    intact = recover(tmp_path)

    for path in (*segments(tmp_path), tmp_path / "identity.json"):
        for offset in range(path.stat().st_size):
            for pattern in FLIPS:
                flip(path, offset, pattern)
                with pytest.raises(CorruptLogError) as caught:
                    recover(tmp_path)
                assert str(path) in str(caught.value)
                assert "start a new node instead" in str(caught.value)
                flip(path, offset, pattern)
    assert recover(tmp_path) == intact


@pytest.mark.slow
def test_open_when_any_byte_is_flipped_beside_zeros_then_never_a_wrong_entry(
    tmp_path: Path,
) -> None:
    """Where the last record has a sector of zeros of its own, a flip may pass for a torn tail."""
    last = entry(3, data=b"x" + bytes(1500) + b"x")
    write_log(tmp_path, entries(1, 2), [last])
    segment = segments(tmp_path)[0]
    data, start = segment.read_bytes(), record_ends(segment)[-2]

    for offset in range(len(data)):
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
    data = segment.read_bytes()
    assert len(data) > 4 * 4096

    for page in range(0, len(data) - 4096, 4096):
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
    """Segments are numbered: the first or a middle one cannot be lost unseen."""
    write_log(tmp_path, *([item] for item in entries(1, 20)), segment_bytes_max=300)

    for segment in segments(tmp_path)[:-1]:
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
    ]
    write_log(tmp_path, entries(1, 2))
    append_raw(tmp_path, HardState(2, "a" * 16), [entry(3, term=2)])
    segment = segments(tmp_path)[0]
    data = segment.read_bytes()

    for hard_state, batch in wrong:
        append_raw(tmp_path, hard_state, batch)
        with pytest.raises(CorruptLogError, match=f"at byte {len(data)}"):
            recover(tmp_path)
        segment.write_bytes(data)
    assert recover(tmp_path).last_index == 3


def test_open_when_written_by_a_later_version_then_told_to_use_that(tmp_path: Path) -> None:
    """An unknown format is no damage, and throwing the data away is no advice."""
    write_log(tmp_path, entries(1, 3))
    segment = segments(tmp_path)[0]
    data = segment.read_bytes()
    header = replication_log._SEGMENT_HEADER.pack(b"RLOG", 2, 1, 1, 0)[:-4]
    segment.write_bytes(replication_log._sealed(header) + data[len(header) + 4 :])

    with pytest.raises(UnknownFormatError, match=r"version 2.*Start the version"):
        recover(tmp_path)
    segment.write_bytes(data)
    path = tmp_path / "identity.json"
    path.write_bytes(replication_log._encode_identity({"format_version": 2, "new": "field"}))
    with pytest.raises(UnknownFormatError, match=r"identity\.json.*version 2"):
        recover(tmp_path)
