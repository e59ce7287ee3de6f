"""The mutants: mistakes that were made somewhere, as changes of one place of the source.

M1 to M21 are those of the fault model, in the words of its list; the others have names of their
own. How they are run is told in ``mutants.py``.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Mutant(NamedTuple):
    """One mistake, and who is to notice it."""

    name: str
    what: str
    file: str  # "": a switch of the simulation's tests
    old: str  # stands once in the file
    new: str
    commands: tuple[str, ...]  # SIMULATION, or tests as pytest takes them


SIMULATION: Final = "simulation"


_FAULT_MODEL = (
    Mutant(
        "M1",
        "the vote is not persisted",
        "replication_log_format.py",
        '        voted_for = (hard_state.voted_for or "").encode()\n',
        '        voted_for = b""\n',
        (
            "tests/test_replication_log.py::test_append_when_only_the_hard_state_changes_then_the_latest_is_kept",
        ),
    ),
    Mutant(
        "M2",
        "term and vote in two writes",
        "replication_log.py",
        "        begin = size_bytes = 0\n",
        "        if hard_state is not None:\n"
        "            self._append_record(HardState(hard_state.term, None), [])\n"
        "        begin = size_bytes = 0\n",
        (
            "tests/test_replication_log.py::test_append_when_it_returns_then_one_write_and_one_sync_were_made",
        ),
    ),
    Mutant(
        "M3",
        "the driver sends its answers before the write",
        "raft_node.py",
        "            with self._changing_disk:\n                hard_state = ready.hard_state\n",
        "            with self._lock:\n"
        "                early = self._post_locked(ready.messages)\n"
        "            _run(early)\n"
        "            with self._changing_disk:\n                hard_state = ready.hard_state\n",
        ("tests/test_raft_order.py::test_message_when_it_leaves_then_what_it_says_is_on_the_disk",),
    ),
    Mutant(
        "M3-log",
        "an append returns without a sync",
        "replication_log.py",
        "        self._write(fd, data, offset, self._disk.pwrite)\n        self._disk.fdatasync(fd)\n",
        "        self._write(fd, data, offset, self._disk.pwrite)\n",
        (
            "tests/test_replication_log.py::test_append_when_it_returns_then_one_write_and_one_sync_were_made",
        ),
    ),
    Mutant(
        "M3-dsync",
        "the write of the log is not a durable one",
        "replication_log.py",
        "os.pwritev(fd, [data], offset, os.RWF_DSYNC)",
        "os.pwritev(fd, [data], offset, 0)",
        (
            "tests/test_replication_log.py::test_append_when_one_call_writes_and_syncs_then_each_write_asks_for_that",
        ),
    ),
    Mutant(
        "M4",
        "entries of an older term are committed by counting",
        "raft_core.py",
        "        if index >= self._term_first_index:\n",
        "        if index > 0:\n",
        (
            SIMULATION,
            "tests/test_raft_core.py::test_leader_commits_only_entries_of_its_own_term_by_counting",
        ),
    ),
    Mutant(
        "M5",
        "reads before an entry of the own term is committed",
        "raft_core.py",
        "or not self._reads_waiting or not self.committed_in_own_term:",
        "or not self._reads_waiting:",
        (
            SIMULATION,
            "tests/test_raft_core_thesis.py::test_read_waits_for_an_entry_of_the_own_term_to_be_committed",
        ),
    ),
    Mutant(
        "M6",
        "the leader serves local reads",
        "raft_core.py",
        "        self._reads_waiting.append(token)\n        self._start_read_round()\n",
        "        self._reads_done.append((self.commit_index, [token]))\n",
        (
            SIMULATION,
            "tests/test_raft_core_thesis.py::test_read_waits_for_an_entry_of_the_own_term_to_be_committed",
        ),
    ),
    Mutant(
        "M7",
        "reads are given though the leadership ended during their round",
        "raft_core.py",
        "        self._read_round = 0\n"
        "        self._reads_waiting = []\n"
        "        self._reads_in_round = []\n"
        "        self._reads_done = []\n",
        "        self._reads_done.append((self._read_index, self._reads_in_round))\n"
        "        self._read_round = 0\n"
        "        self._reads_waiting = []\n"
        "        self._reads_in_round = []\n",
        (
            SIMULATION,
            "tests/test_raft_core_thesis.py::test_read_that_waits_when_the_leadership_ends_is_never_given",
        ),
    ),
    Mutant(
        "M8",
        "a follower truncates always",
        "raft_core.py",
        "            if not self.log.matches(entry.index, entry.term):\n",
        "            if entry.index > self.commit_index:\n",
        (
            SIMULATION,
            "tests/test_raft_core.py::test_conflicting_entries_are_replaced_with_all_that_follow",
        ),
    ),
    Mutant(
        "M9",
        "the commit index is bounded by the log, not by the last verified entry",
        "raft_core.py",
        "self._commit_to(min(message.commit_index, last_verified))",
        "self._commit_to(min(message.commit_index, self.log.last_index))",
        (
            SIMULATION,
            "tests/test_raft_core.py::test_follower_commits_no_further_than_the_message_verified",
        ),
    ),
    Mutant(
        "M10",
        "the match index can go back",
        "raft_progress.py",
        "        self.match_index = max(self.match_index, index)\n",
        "        self.match_index = index\n",
        (
            SIMULATION,
            "tests/test_raft_core.py::test_match_index_never_goes_back",
        ),
    ),
    Mutant(
        "M11",
        "votes are counted by message, not by voter",
        "raft_core.py",
        "        self._votes[voter] = granted  # by voter, so that a repeated answer counts once (T15)\n",
        "        unheard = [v for v in self.membership.voters if v not in self._votes]\n"
        "        self._votes[unheard[0] if voter in self._votes and unheard else voter] = granted\n",
        (
            SIMULATION,
            "tests/test_raft_core.py::test_votes_are_counted_by_voter_not_by_message",
        ),
    ),
    Mutant(
        "M12",
        "the sessions are left out of the state on disk",
        "kv_store.py",
        "        yield from _slices(self.sessions, lock, min(rows_max, FLUSH_SESSIONS_MAX))\n",
        "",
        (
            SIMULATION,
            "tests/test_state_db.py::test_load_when_states_were_saved_then_the_last_one_is_back",
        ),
    ),
    Mutant(
        "M12-answers",
        "the state on disk has the sessions, but not what they did",
        "kv_client_sessions.py",
        "        for answer in self.answers.values():\n            parts +=",
        "        for answer in ():\n            parts +=",
        (
            SIMULATION,
            "tests/test_kv_store_flush.py::test_flush_hands_out_sessions_by_the_same_rules",
        ),
    ),
    Mutant(
        "M13",
        "the state machine does not know what was done; only the primary could",
        "kv_client_sessions.py",
        "        if serial in answers or not 0 <= serial - session.first_unanswered < SERIALS_MAX:\n",
        "        if not 0 <= serial - session.first_unanswered < SERIALS_MAX:\n",
        (
            SIMULATION,
            "tests/test_client_sessions.py::test_serial_when_it_comes_again_then_the_first_answer_and_nothing_else",
        ),
    ),
    Mutant(
        "M14",
        "membership may change before an entry of the own term is committed",
        "raft_core.py",
        "        may_change = self.committed_in_own_term and self.membership_is_settled\n",
        "        may_change = self.membership_is_settled\n",
        (
            SIMULATION,
            "tests/test_raft_core_members.py::test_membership_does_not_change_before_an_entry_of_the_own_term_is_committed",
        ),
    ),
    Mutant(
        "M15",
        "a snapshot is renamed before it is synced",
        "state_db.py",
        "            self._db.sync(file.fileno())\n",
        "",
        (
            "tests/test_state_db.py::test_install_and_create_sync_the_file_then_rename_it_then_sync_the_directory",
        ),
    ),
    Mutant(
        "M16",
        "the log is cut before the state is on disk",
        "raft_snapshots.py",
        "        try:\n            if not saved:\n",
        "        self._saved_index = header.applied_index\n"
        "        self._drop_log()\n"
        "        try:\n            if not saved:\n",
        (
            "tests/test_raft_order.py::test_save_when_the_state_can_not_be_saved_then_the_log_stays_whole",
        ),
    ),
    Mutant(
        "M17",
        "the log goes on after a sync that failed",
        "replication_log.py",
        "        if self._broken:\n            raise",
        "        if False:\n            raise",
        (
            "tests/test_replication_log.py::test_append_when_the_disk_fails_then_every_further_append_is_refused",
        ),
    ),
    Mutant(
        "M18",
        "the answer to an append of an older term counts",
        "raft_core.py",
        "        elif message.term < self.term:\n",
        "        elif message.term < self.term and not isinstance(message, AppendReply):\n",
        (
            SIMULATION,
            "tests/test_raft_core.py::test_replies_of_an_older_term_are_ignored",
        ),
    ),
    Mutant(
        "M19",
        "a read calls a key expired by its own clock",
        "kv_store.py",
        "            raise ExpiredKeysError([(key, deadline_ms)])\n",
        "            return None\n",
        ("tests/test_kv_store.py::test_read_when_a_key_is_due_asks_for_the_purge",),
    ),
    Mutant(
        "M20",
        "a pre-vote is granted without a look at the log",
        "raft_core.py",
        "            granted = up_to_date and message.term > self.term and",
        "            granted = message.term > self.term and",
        (
            SIMULATION,
            "tests/test_raft_core_thesis.py::test_pre_vote_is_denied_to_a_log_that_is_less_up_to_date",
        ),
    ),
    Mutant(
        "M21",
        "a wrong checksum is taken for a torn tail",
        "replication_log_format.py",
        "                raise _judge_payload(path, offset + at, payload, data_end)\n",
        '                raise TornRecordError(offset + at, "torn")\n',
        (
            "tests/test_replication_log_damage.py::test_open_when_a_sector_of_the_last_record_is_unwritten_then_it_is_cut",
        ),
    ),
)

_OWN = (
    Mutant(
        "session-revived",
        "a session that is unknown is taken for a new one",
        "kv_client_sessions.py",
        "        if session is None:\n            raise _no_session(session_id)\n        answers =",
        "        if session is None:\n"
        "            session = self._sessions[session_id] = ClientSession(session_id, now_ms)\n"
        "        answers =",
        (
            SIMULATION,
            "tests/test_client_sessions.py::test_session_when_closed_or_never_opened_then_is_an_explicit_error",
        ),
    ),
    Mutant(
        "session-forgotten-serial",
        "a serial whose answer was forgotten is done again",
        "kv_client_sessions.py",
        "        if serial < self.first_unanswered:\n",
        "        if serial < 0:\n",
        (
            "tests/test_client_sessions.py::test_answers_when_the_client_has_them_then_are_forgotten_and_never_done_again",
        ),
    ),
    Mutant(
        "session-error-not-kept",
        "an error is no answer, so a repeated write is tried again",
        "kv_client_sessions.py",
        "        except KVError as error:\n            reply = error  # is",
        "        except KVError as error:\n            raise\n            reply = error  # is",
        (
            "tests/test_client_sessions.py::test_serial_when_it_comes_again_then_the_first_answer_and_nothing_else",
        ),
    ),
    Mutant(
        "snapshot-goes-back",
        "a state that is older than what was applied is installed",
        "raft_node.py",
        "            if self._applied_index >= snapshot.index:\n                return False\n",
        "",
        (
            "tests/test_raft_order.py::test_install_when_the_node_has_got_further_by_itself_then_nothing_is_changed",
        ),
    ),
    Mutant(
        "snapshot-keeps-the-log",
        "a log that differs from the state is kept",
        "raft_core.py",
        "        if self.log.matches(index, term):\n            self._commit_to(index)\n",
        "        if index <= self.log.last_index:\n            self._commit_to(index)\n",
        ("tests/test_raft_core_snapshot.py::test_log_that_differs_at_the_state_is_emptied",),
    ),
    Mutant(
        "snapshot-chunk-unchecked",
        "a chunk is written wherever it came from in the stream",
        "raft_snapshots.py",
        "        if chunk.offset == incoming.writer.received_bytes:\n",
        "        if chunk:\n",
        (
            "tests/test_raft_order.py::test_chunk_when_it_is_repeated_or_too_early_then_it_is_not_written",
        ),
    ),
    Mutant(
        "snapshot-seal-unchecked",
        "a snapshot's checksum is not looked at",
        "state_db.py",
        "    if sealed_bytes != size_bytes or digest != _digest(fd, size_bytes):\n",
        "    if sealed_bytes != size_bytes:\n",
        (
            "tests/test_state_db_damage.py::test_stream_when_any_byte_is_flipped_or_the_end_is_cut_then_refused",
        ),
    ),
    Mutant(
        "flush-sees-later-writes",
        "a flush hands out rows as they are now, not as they were at its begin",
        "kv_store.py",
        "        if self._flush is not None:\n            self._flush.keep(key)\n",
        "",
        (
            SIMULATION,
            "tests/test_kv_store_flush.py::test_flush_when_rows_change_meanwhile_hands_out_the_old_ones",
        ),
    ),
    Mutant(
        "learner-votes",
        "a learner counts in majorities",
        "raft_types.py",
        "        voters = tuple(m.member_id for m in self.members if m.voter)\n",
        "        voters = tuple(m.member_id for m in self.members)\n",
        (
            SIMULATION,
            "tests/test_raft_core_members.py::test_learner_and_stranger_never_campaign",
        ),
    ),
    Mutant(
        "learner-promoted-at-once",
        "a learner gets its vote before it has caught up",
        "raft_members.py",
        "        if progress.match_index < progress.catch_up_index or not progress.match_index:\n",
        "        if not progress.match_index:\n",
        ("tests/test_raft_core_members.py::test_learner_that_holds_only_a_part_is_not_promoted",),
    ),
    Mutant(
        "members-without-majority",
        "a change is made after which too few voters answer",
        "raft_members.py",
        "        if changed.has_quorum(answering):\n",
        "        if answering:\n",
        (
            "tests/test_raft_core_members.py::test_removal_that_would_leave_too_few_who_answer_is_refused",
        ),
    ),
    Mutant(
        "members-not-rolled-back",
        "a change of membership stays in force though its entry was truncated",
        "raft_core.py",
        "        self._memberships.truncate_from(index)\n        self._use_latest_membership()\n",
        "",
        (
            SIMULATION,
            "tests/test_raft_core_members.py::test_membership_is_rolled_back_when_its_entry_is_truncated",
        ),
    ),
    Mutant(
        "members-removed-too-early",
        "a removal counts before it is committed",
        "raft_core.py",
        "self._memberships.is_removed(self.commit_index)\n",
        "self._memberships.is_removed(self.log.last_index)\n",
        (
            SIMULATION,
            "tests/test_raft_core_members.py::test_leader_that_removes_itself_steps_down_when_that_is_committed",
        ),
    ),
    Mutant(
        "transfer-too-early",
        "the heir is told to campaign before it has everything",
        "raft_core.py",
        "        if self.progress[target].match_index == self.log.last_index:\n",
        "        if target:\n",
        (
            "tests/test_raft_core_transfer.py::test_target_is_told_only_when_it_has_everything_and_all_is_committed",
        ),
    ),
    Mutant(
        "transfer-accepts-writes",
        "writes are accepted while the leadership is handed over",
        "raft_core.py",
        "            raise TransferUnderWayError\n",
        "            pass\n",
        ("tests/test_raft_core_transfer.py::test_nothing_new_is_accepted_while_it_lasts",),
    ),
    Mutant(
        "check-quorum-gone",
        "a leader without a majority goes on leading",
        "raft_core.py",
        "        if not self.membership.has_quorum(self._followers.answering(self._now_ticks)):\n",
        "        if not self.membership:\n",
        (
            "tests/test_raft_core_thesis.py::test_leader_that_no_majority_answers_steps_down_within_the_minimum_timeout",
        ),
    ),
    Mutant(
        "expiry-clock-goes-back",
        "an entry's stamp counts even where it is before an earlier one's",
        "kv_store.py",
        "        else:\n            now_ms = self.last_stamp_ms\n",
        "",
        (
            SIMULATION,
            "tests/test_kv_store.py::test_stamp_when_it_goes_backwards_counts_as_the_last_one",
        ),
    ),
    Mutant(
        "expiry-of-another-deadline",
        "a PURGE that comes late deletes a key that was given a new deadline",
        "kv_store.py",
        "            if int(deadline) <= now_ms and self._deadlines.get(key) == int(deadline):\n",
        "            if int(deadline) <= now_ms and key in self._deadlines:\n",
        ("tests/test_kv_store.py::test_purge_when_the_deadline_is_exactly_the_named_one_deletes",),
    ),
    Mutant(
        "hash-without-deadline",
        "the state's hash does not see deadlines",
        "kv_store.py",
        "    header = _pack_hash_header(len(key), version, deadline_ms)\n",
        "    header = _pack_hash_header(len(key), version, 0)\n",
        ("tests/test_kv_store.py::test_state_hash_when_any_part_differs_is_another",),
    ),
    Mutant(
        "hash-keeps-the-dropped",
        "a key that is deleted stays in the state's hash",
        "kv_store.py",
        "        self.state_hash = (self.state_hash - change) & _HASH_MASK\n",
        "",
        (
            SIMULATION,
            "tests/test_kv_store.py::test_command_when_said_is_answered_as_redis_does",
        ),
    ),
    Mutant(
        "audit-is-lenient",
        "a node whose state differs from the majority's serves on",
        "raft_audit.py",
        "        if self._own[0] == index and self._own[1] != state_hash:\n",
        "        if self._own[0] == index and not state_hash:\n",
        (
            SIMULATION,
            "tests/test_raft_node.py::test_audit_when_a_secondarys_state_differs_then_it_stops_serving_and_says_so",
        ),
    ),
    Mutant(
        "wire-checksum-unchecked",
        "a peer's frame is believed without its checksum",
        "raft_frames.py",
        "    if zlib.crc32(frame) != checksum:\n",
        "    if checksum < 0:\n",
        (
            "tests/test_raft_frames.py::test_decoder_fed_a_frame_with_a_changed_byte_never_gives_a_message",
        ),
    ),
    Mutant(
        "wire-any-cluster",
        "a frame of another cluster, or for another member, is believed",
        "raft_frames.py",
        "        if frame[_IDS] != self._raw_ids:\n",
        "        if not frame:\n",
        (
            "tests/test_raft_frames.py::test_decoder_fed_a_well_formed_frame_that_is_wrong_says_what",
        ),
    ),
    Mutant(
        "wire-short-way",
        "the parser's short way does not look at the lengths",
        "kv_protocol.py",
        "        if parts[begin + 1 : end : 2] != list(map(_BULK_HEADER.get, map(len, argv))):\n"
        "            break\n",
        "",
        ("tests/test_kv_protocol.py::test_resp_when_well_formed_then_argv_is_what_was_sent",),
    ),
    Mutant(
        "unknown-told-as-not-done",
        "a write whose leader was deposed is told to be certainly not done",
        "raft_node.py",
        '            error = OutcomeUnknownError("this node lost the leadership")\n',
        '            error = NoPrimaryError("this node lost the leadership")\n',
        (
            "tests/test_raft_node.py::test_propose_when_the_leader_is_cut_off_then_the_outcome_is_unknown",
        ),
    ),
    Mutant(
        "lease-not-waited-for",
        "a new leader answers while the old one's lease may still run",
        "raft_watch.py",
        "        return self._enabled and self._clock() < self._wait_until_s\n",
        "        return False\n",
        (
            SIMULATION,
            "tests/test_raft_node.py::test_lease_when_a_new_leader_is_elected_then_it_waits_until_the_old_lease_has_run_out",
        ),
    ),
    Mutant(
        "log-name-not-synced",
        "the directory is not synced when a segment is begun",
        "replication_log.py",
        "        self._disk.fdatasync(fd)\n        self._sync_directory(self._directory)\n"
        "        self._segments[sequence]",
        "        self._disk.fdatasync(fd)\n        self._segments[sequence]",
        (
            "tests/test_replication_log.py::test_append_when_a_segment_is_begun_then_it_is_durable_before_its_first_record",
        ),
    ),
    Mutant(
        "log-tear-not-synced",
        "a torn tail is cut, but the cut is not synced",
        "replication_log.py",
        "        self._disk.ftruncate(fd, offset)\n        self._disk.fsync(fd)\n",
        "        self._disk.ftruncate(fd, offset)\n",
        (
            "tests/test_replication_log_damage.py::test_open_when_a_torn_tail_is_cut_then_nothing_of_it_stays_behind_later_records",
        ),
    ),
    Mutant(
        "all-stand-at-once",
        "all who hear of the primary's death stand at one time",
        "raft_core.py",
        "            wait += self._dead_leader_rank * apart\n",
        "",
        (
            "tests/test_raft_core_thesis.py::test_followers_campaign_one_after_the_other_soon_after_the_leaders_death",
        ),
    ),
    Mutant(
        "loss-not-noticed",
        "nobody is told that a follower lacks what it acknowledged",
        "raft_core.py",
        "            self._followers.note_loss(message.sender, self.membership)\n",
        "            pass\n",
        (
            "tests/test_raft_core.py::test_follower_that_lacks_what_it_acknowledged_is_named_and_counted_on_no_more",
        ),
    ),
    Mutant(
        "loss-believed-too-early",
        "an old refusal is taken for a loss",
        "raft_core.py",
        " and message.round > progress.matched_round:",
        ":",
        (
            SIMULATION,
            "tests/test_raft_core.py::test_follower_that_lacks_what_it_acknowledged_is_named_and_counted_on_no_more",
        ),
    ),
    Mutant(
        "later-memberships-kept",
        "a state that replaces the log leaves that log's memberships",
        "raft_core.py",
        "            self._memberships.truncate_from(index + 1)\n"
        "            self._memberships.restore(snapshot, self.commit_index)\n",
        "            self._memberships.restore(snapshot, self.commit_index)\n",
        (
            "tests/test_raft_core_snapshot.py::test_membership_in_a_log_that_differs_from_the_state_goes_with_it",
        ),
    ),
    Mutant(
        "any-log-fits",
        "a restart takes any log that is long enough for the one behind the state",
        "raft_snapshots.py",
        "    if index <= disk.last_index and disk.term_at(index) == snapshot.term:\n",
        "    if index <= disk.last_index:\n",
        (
            "tests/test_raft_order.py::test_log_when_it_differs_from_the_state_then_it_begins_anew_behind_it",
        ),
    ),
    Mutant(
        "states-mixed",
        "chunks of two transfers become one state",
        "raft_snapshots.py",
        "        if incoming is None or incoming.last_chunk.snapshot_id != chunk.snapshot_id:\n",
        "        if incoming is None:\n",
        (
            "tests/test_raft_order.py::test_chunk_of_another_transfer_begins_anew_and_the_old_one_is_refused",
        ),
    ),
    Mutant(
        "chunk-of-anyone",
        "a chunk of a leader of before is taken",
        "raft_node.py",
        "                    if message.sender == core.leader_id and message.term == core.term:\n"
        "                        effects.append(partial(self._keeper.on_chunk, message))\n",
        "                    effects.append(partial(self._keeper.on_chunk, message))\n",
        ("tests/test_raft_node.py::test_messages_of_an_old_term_are_not_believed",),
    ),
    Mutant(
        "hash-of-before-believed",
        "a hash that was reported to a leader of before is counted",
        "raft_node.py",
        "        if report.term != core.term:\n            return []\n",
        "",
        ("tests/test_raft_node.py::test_messages_of_an_old_term_are_not_believed",),
    ),
    Mutant(
        "lease-too-long",
        "a lease is longer than an election timeout",
        "raft_watch.py",
        "    FRACTION = 0.8\n",
        "    FRACTION = 3.0\n",
        (
            SIMULATION,
            "tests/test_raft_watch.py::test_lease_runs_from_the_begin_of_the_round_that_a_majority_answered",
        ),
    ),
    Mutant(
        "lease-from-the-answer",
        "a lease runs from the answer of a majority, not from the question",
        "raft_watch.py",
        "            _, began_s = self._started.popleft()\n"
        "            self._valid_until_s = began_s +",
        "            self._started.popleft()\n            self._valid_until_s = self._clock() +",
        (
            SIMULATION,
            "tests/test_raft_watch.py::test_lease_runs_from_the_begin_of_the_round_that_a_majority_answered",
        ),
    ),
    Mutant(
        "lease-renewed-by-looking",
        "a lease is renewed without a new round",
        "raft_watch.py",
        "        if self._noted_round < core.round:\n            self._noted_round = core.round\n",
        "        if not self._started or self._started[-1][0] < core.round:\n"
        "            self._noted_round = core.round\n",
        (
            "tests/test_raft_watch.py::test_lease_is_not_renewed_by_a_round_that_was_answered_before",
        ),
    ),
    Mutant(
        "stop-says-not-done",
        "a node that stops calls a write that may be in the log not done",
        "raft_node.py",
        '            effects = self._fail_waiting_locked(0, OutcomeUnknownError("the node is stopping"))\n',
        '            effects = self._fail_waiting_locked(0, NoPrimaryError("the node is stopping"))\n',
        ("tests/test_raft_node.py::test_stop_when_a_write_waits_then_its_outcome_is_unknown",),
    ),
    Mutant(
        "state-with-later-members",
        "a state is saved with the members of later",
        "raft_node.py",
        "                membership_index, membership = self._core.membership_at(index)\n",
        "                membership_index, membership = self._core.membership_at(2**62)\n",
        ("tests/test_raft_node.py::test_state_that_is_saved_has_the_membership_of_its_index",),
    ),
    Mutant(
        "replaced-entries-applied",
        "what is replaced in memory is applied from the disk",
        "raft_node.py",
        "                last = min(self._core.commit_index, self._core.log.stable_index)\n",
        "                last = self._core.commit_index\n",
        (
            "tests/test_raft_node_disk.py::test_follower_when_it_applies_from_disk_then_only_what_its_disk_holds",
        ),
    ),
    Mutant(
        "sessions-by-number",
        "a state that is loaded forgets which session was used last",
        "kv_client_sessions.py",
        'key=attrgetter("used_index")',
        'key=attrgetter("id")',
        (
            "tests/test_kv_store_flush.py::test_load_gives_sessions_back_in_the_order_of_their_last_use",
        ),
    ),
    Mutant(
        "deadlines-forgotten",
        "deadlines are tidied up and forgotten",
        "kv_store.py",
        "            self._heap = [(deadline_ms, key) for key, deadline_ms in self._deadlines.items()]\n",
        "            self._heap = []\n",
        ("tests/test_kv_store.py::test_due_when_deadlines_were_tidied_up_still_names_the_rest",),
    ),
    Mutant(
        "transfers-outlive-leadership",
        "a state is sent on after the leadership has ended",
        "raft_snapshots.py",
        "                self._over += self._outgoing.values()\n"
        "                self._outgoing.clear()\n",
        "",
        ("tests/test_state_keeper.py::test_sending_when_the_leadership_ends_then_it_is_over",),
    ),
    Mutant(
        "back-to-the-old-address",
        "a member is looked for where the log's last change still has it",
        "raft_types.py",
        "        return [m for m in self.members if (m.member_id, m.host, m.peer_port) not in known]\n",
        "        return [m for m in self.members if m not in former.members or not known]\n",
        (
            "tests/test_raft_node.py::test_learner_when_promoted_before_the_log_knows_its_new_address_then_it_is_still_reached",
        ),
    ),
    Mutant(
        "lease-outlives-leadership",
        "a lease goes on when the leadership has ended",
        "raft_watch.py",
        "        if not self._enabled or core.role is not Role.LEADER:\n"
        "            self._valid_until_s = 0.0\n",
        "        if not self._enabled or core.role is not Role.LEADER:\n",
        ("tests/test_raft_watch.py::test_lease_ends_with_the_leadership",),
    ),
    Mutant(
        "transfer-forgets-own-disk",
        "a transfer does not go on when the leader's own disk completes the majority",
        "raft_core.py",
        "            if self.role is Role.LEADER:\n"
        "                self._advance_commit()\n"
        "                self._go_on_with_transfer()\n",
        "            if self.role is Role.LEADER:\n                self._advance_commit()\n",
        (
            "tests/test_raft_core_transfer.py::test_target_is_told_when_the_leaders_own_disk_completes_the_majority",
        ),
    ),
    Mutant(
        "record-checksum-unchecked",
        "a record of the log is believed without its checksum",
        "replication_log_format.py",
        "            if crc32(payload) != payload_crc:\n                raise _judge_payload",
        "            if len(payload) != length:\n                raise _judge_payload",
        (
            SIMULATION,
            "tests/test_replication_log_damage.py::test_open_when_a_torn_tail_is_cut_then_nothing_of_it_stays_behind_later_records",
        ),
    ),
    Mutant(
        "error-of-the-disk-tried-again",
        "a write whose disk failed is written and synced once more, and believed",
        "replication_log.py",
        "            with suppress(DiskRefusesError):\n",
        "            with suppress(OSError):\n",
        (
            "tests/test_replication_log.py::test_append_when_the_call_that_writes_and_syncs_meets_a_broken_disk_then_nothing_is_done_anew",
        ),
    ),
    Mutant(
        "torn-taken-for-damage",
        "a last record that lacks a sector stops the node",
        "replication_log_format.py",
        "            if _is_zero(payload[at : at + SECTOR_BYTES]):\n"
        "                return TornRecordError",
        "            if not payload:\n                return TornRecordError",
        (
            SIMULATION,
            "tests/test_replication_log_damage.py::test_open_when_a_sector_of_the_last_record_is_unwritten_then_it_is_cut",
        ),
    ),
    Mutant(
        "audit-mixes-questions",
        "a state hash counts for whichever index is asked about now",
        "raft_audit.py",
        "        if report.applied_index != index:\n"
        "            return []  # to an older question\n",
        "",
        (SIMULATION,),
    ),
    Mutant(
        "audit-finds-no-majority",
        "a leader stops as soon as one answer differs",
        "raft_audit.py",
        "        if all(voter in self._answers for voter in membership.voters):\n",
        "        if self._answers:\n",
        (SIMULATION,),
    ),
    Mutant(
        "audit-stops-the-leader-too",
        "a leader that finds another's state to differ stops serving as well",
        "raft_audit.py",
        "                self._judge(index, value)\n                names",
        '                self._stop_serving("mistrust", "")\n                names',
        (SIMULATION,),
    ),
    Mutant(
        "verdict-at-any-index",
        "a verdict is held against the last hash, of whatever index it was",
        "raft_audit.py",
        "        if self._own[0] == index and self._own[1] != state_hash:\n",
        "        if self._own[1] != state_hash:\n",
        (SIMULATION,),
    ),
)

MUTANTS: Final[tuple[Mutant, ...]] = (*_FAULT_MODEL, *_OWN)
