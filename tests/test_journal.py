"""The journal: the states of a turn, checkpoints, rollback, and what is refused."""

import json
import os
import resource
import signal
import stat
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from durable import atomic, checkpoint, journal, upkeep
from durable.errors import UsageError
from durable.journal import Verdict
from tests.records import BAD, GOOD, turn


@pytest.fixture
def db(tmp_path):
    db = journal.open_journal(tmp_path / "j.db")
    yield db
    db.close()


def state(db, turn_id="t1"):
    return tuple(db.execute("SELECT state, reason, step, score FROM turns WHERE id = ?", (turn_id,)).fetchone())


def test_a_turn_goes_from_waiting_to_trained(db):
    journal.record_turn(db, turn())
    assert state(db) == ("waiting", None, None, None)
    assert journal.record_next(db, "t1", [{"role": "user", "content": "thanks"}])
    assert state(db)[0] == "judging"
    assert not journal.record_verdict(db, "t1", GOOD, [{"role": "user", "content": "other words"}])
    assert journal.record_verdict(db, "t1", GOOD) == "queued"
    assert state(db) == ("queued", None, None, 1)
    sample = journal.load_sample(db, "t1")
    assert sample.turn == turn(created=sample.turn.created) and sample.verdict == GOOD
    journal.mark_trained(db, ["t1"], 7)
    assert state(db) == ("trained", None, 7, 1)
    assert journal.counts(db) == {"trained": 1}
    assert not journal.record_next(db, "t1", [{"role": "user", "content": "again"}])


def test_feedback_overrides_the_judge_in_either_order(db):
    for first, second in ((GOOD, BAD), (BAD, GOOD)):
        turn_id = first.source
        journal.record_turn(db, turn(turn_id))
        assert journal.record_verdict(db, turn_id, first)
        assert journal.record_verdict(db, turn_id, second) == ("queued" if second == BAD else "")
        assert state(db, turn_id)[3] == -1


def test_a_bad_rating_without_words_keeps_the_judges_hint(db):
    journal.record_turn(db, turn())
    journal.record_next(db, "t1", [{"role": "user", "content": "no"}])
    assert journal.record_verdict(db, "t1", Verdict(-1, [-1], 1.0, ["Be brief, please."], "judge", "policy", "judge"))
    journal.record_verdict(db, "t1", Verdict(-1, [-1], 1.0, [], "", "alice", "feedback"))
    verdict = journal.load_sample(db, "t1").verdict
    assert (verdict.source, verdict.hints, verdict.hinted_by) == ("feedback", ["Be brief, please."], "judge")
    journal.record_verdict(db, "t1", Verdict(1, [1], 1.0, [], "", "alice", "feedback"))
    assert journal.load_sample(db, "t1").verdict.hints == []


def test_the_hint_that_was_used_comes_first(db):
    journal.record_turn(db, turn("t1"))
    journal.record_verdict(db, "t1", replace(BAD, hints=["too long", "one sentence", "be brief"]))
    journal.put_first(db, "t1", "one sentence")
    (sample,) = journal.begin_step(db, ["t1"])
    assert sample.verdict.hints == ["one sentence", "too long", "be brief"]


def test_a_journal_of_another_format_is_refused(tmp_path):
    db = journal.open_journal(tmp_path / "j.db")
    db.execute("PRAGMA user_version = 1")
    db.close()
    with pytest.raises(UsageError, match="format 1"):
        journal.open_journal(tmp_path / "j.db")


def test_a_neutral_turn_is_dropped_and_feedback_can_still_queue_it(db):
    journal.record_turn(db, turn())
    assert journal.record_verdict(db, "t1", Verdict(0, [0, 0, 1], 1.0, [], "", "policy", "judge")) == "dropped"
    assert state(db)[:2] == ("dropped", journal.NEUTRAL)
    assert journal.record_verdict(db, "t1", BAD)
    journal.mark_trained(db, ["t1"], 1)
    with pytest.raises(ValueError, match="t1 is trained"):
        journal.record_verdict(db, "t1", BAD)


def test_an_expired_turn_is_dropped_and_can_still_be_rated(db):
    journal.record_turn(db, turn("old", created=1.0))
    journal.record_turn(db, turn("new"))
    assert journal.expire(db, 60) == 1 and state(db, "old")[:2] == ("dropped", journal.NO_REPLY)
    assert state(db, "new")[0] == "waiting"
    assert journal.record_verdict(db, "old", BAD), "a person may still rate what nobody went on from"


def test_a_turn_in_training_takes_no_verdict_until_it_is_queued_again(db):
    journal.record_turn(db, turn())
    journal.record_verdict(db, "t1", BAD)
    (sample,) = journal.begin_step(db, ["t1"])
    assert sample.verdict == BAD and state(db)[0] == "training"
    with pytest.raises(ValueError, match="t1 is training"):
        journal.record_verdict(db, "t1", BAD)
    assert recover(db) == 0
    assert journal.in_state(db, "queued") == ["t1"]


def recover(db):
    journal.recover(db)
    return journal.saved_step(db, "")


def train(db, turn_id, step):
    journal.record_turn(db, turn(turn_id))
    journal.record_verdict(db, turn_id, BAD)
    journal.begin_step(db, [turn_id])
    journal.mark_trained(db, [turn_id], step)


def test_turns_trained_on_after_the_current_checkpoint_are_queued_again(db):
    for step in (1, 2, 3):
        train(db, f"t{step}", step)
        if step == 2:
            journal.add_checkpoint(db, "", 2, keep=3)
    assert recover(db) == 2
    assert state(db, "t1") == ("trained", None, 1, -1) and state(db, "t2") == ("trained", None, 2, -1)
    assert state(db, "t3") == ("queued", None, None, -1)
    journal.mark_trained(db, ["t3"], 3)
    journal.add_checkpoint(db, "", 3, keep=3)
    assert recover(db) == 3 and state(db, "t3")[0] == "trained"


def test_the_last_checkpoints_are_kept(db):
    for step in (10, 20, 30, 30):
        journal.add_checkpoint(db, "", step, keep=2)
    assert journal.checkpoints(db, "") == [20, 30]


def test_rollback_after_a_kill_drops_answers_of_later_weights(db):
    for step in (1, 2, 3):
        train(db, f"t{step}", step)  # answered by weights 0 and 1
    journal.add_checkpoint(db, "", 1, keep=3)
    for name, version in (("old", 1), ("new", 2), ("newest", 3)):
        journal.record_turn(db, turn(name, versions=[(0, 0, 1), (version, 1, 3)]))
    journal.record_verdict(db, "newest", BAD)
    journal.record_turn(db, turn("last", versions=[(2, 0, 3)]), journal.SESSION_OVER)
    assert upkeep.rollback(db, "", 1) == 5
    with pytest.raises(ValueError, match="undone by"):
        journal.record_verdict(db, "last", BAD)
    assert {state(db, i)[1] for i in ("t2", "t3", "new", "newest")} == {"undone by a rollback to step 1"}
    assert state(db, "t1")[0] == "trained" and state(db, "old")[0] == "waiting"


def test_answers_of_undone_weights_are_dropped(db):
    """Those that ended between a push and the check that failed."""
    for name, version in (("old", 1), ("new", 2)):
        journal.record_turn(db, turn(name, versions=[(1, 0, 1), (version, 1, 3)]))
    journal.record_turn(db, turn("bobs", user="bob", versions=[(2, 0, 3)]))
    journal.record_turn(db, turn("before a kill", versions=[(2, 0, 3)], created=time.time() - 60))
    started = time.time() - 30
    journal.drop_newer(db, "bob", 1, started)
    assert state(db, "bobs")[:2] == ("dropped", journal.UNDONE) and state(db, "new")[0] == "waiting"
    journal.drop_newer(db, "", 1, started)
    assert state(db, "new")[:2] == ("dropped", journal.UNDONE) and state(db, "old")[0] == "waiting"
    assert state(db, "before a kill")[0] == "waiting", "a kill lost those weights, and no undo"


def test_rollback_drops_turns_that_later_steps_were_trained_on(db):
    for step in (1, 2, 3):
        train(db, f"t{step}", step)
        journal.add_checkpoint(db, "", step, keep=2)
    with pytest.raises(UsageError, match="--step=1: there are checkpoints of the steps 0, 2, 3"):
        upkeep.rollback(db, "", 1)
    assert upkeep.rollback(db, "", 2) == 1 and journal.checkpoints(db, "") == [2]
    assert state(db, "t3")[:2] == ("dropped", "undone by a rollback to step 2") and state(db, "t2")[0] == "trained"
    assert recover(db) == 2 and journal.in_state(db, "queued") == []
    assert upkeep.rollback(db, "", 0) == 2 and recover(db) == 0


def test_an_out_folder_is_locked_by_one_program(tmp_path):
    held = upkeep.lock_out_dir(tmp_path / "out")
    with pytest.raises(UsageError, match=f"in use by process {os.getpid()}: stop it first"):
        upkeep.lock_out_dir(tmp_path / "out")
    held.close()
    upkeep.lock_out_dir(tmp_path / "out").close()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--out=.*Not a directory"):
        upkeep.lock_out_dir(tmp_path / "file" / "out")


def test_a_journal_is_bound_to_one_model(db, tmp_path):
    upkeep.bind_model(db, tmp_path / "model", "abc", "shared")
    journal.record_turn(db, turn("t1"))
    upkeep.bind_model(db, tmp_path / "moved", "abc", "shared")
    with pytest.raises(UsageError, match="belongs to the model in .*/model, not .*/another: use that model"):
        upkeep.bind_model(db, tmp_path / "another", "def", "shared")


def test_a_refused_start_does_not_bind_the_journal(db, tmp_path):
    """Its model may be too large: the advice is to use another one."""
    upkeep.bind_model(db, tmp_path / "large", "abc", "user")
    upkeep.bind_model(db, tmp_path / "small", "def", "shared")
    assert db.execute("SELECT fingerprint, adapters FROM model").fetchall()[0][:] == ("def", "shared")


def test_a_journal_whose_creation_failed_is_created_at_the_next_start(tmp_path, monkeypatch):
    whole = journal.SCHEMA
    monkeypatch.setattr(journal, "SCHEMA", f"{whole} CREATE TABLE turns (id);")
    with pytest.raises(UsageError, match="already exists"):
        journal.open_journal(tmp_path / "new.db")
    monkeypatch.setattr(journal, "SCHEMA", whole)
    with closing(journal.open_journal(tmp_path / "new.db")) as new:
        journal.record_turn(new, turn("t1"))


def test_a_line_that_does_not_fit_on_the_disk_is_not_written_at_all(tmp_path):
    file = tmp_path / "metrics.jsonl"
    atomic.append(file, b"first\n")
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        with pytest.raises(OSError, match="No space"):
            atomic.append(file, b"second\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    atomic.append(file, b"third\n")
    assert file.read_text() == "first\nthird\n"


def test_a_damaged_line_of_the_metrics_prevents_no_start(tmp_path):
    """A power cut may leave zeros in the file."""
    file, good = tmp_path / "metrics.jsonl", b'{"step": 1}\n'
    file.write_bytes(good + b"\0" * 20 + b"\n" + b'{"step": 2}\n' + b'\xff{"step": 1}\n' + b'{"step": 1}')
    checkpoint.trim_metrics(file, {"": 1})
    assert file.read_bytes() == good


def test_a_new_journal_is_refused_beside_existing_checkpoints(db, tmp_path):
    (tmp_path / "checkpoints" / "step-000050").mkdir(parents=True)
    with pytest.raises(UsageError, match="no journal that knows them"):
        upkeep.bind_model(db, tmp_path / "model", "abc", "shared")


def test_a_file_that_is_not_a_journal_is_refused(tmp_path):
    (tmp_path / "j.db").write_bytes(b"not a database" * 100)
    with pytest.raises(UsageError, match="j.db: file is not a database"):
        journal.open_journal(tmp_path / "j.db")


def test_a_turn_whose_lengths_do_not_match_is_refused():
    for wrong in ({"logprobs": [-1.0]}, {"versions": [(0, 0, 2)]}, {"response_ids": [3]}):
        with pytest.raises(ValueError, match="t1"):
            turn(**wrong)


def test_the_journal_survives_a_kill_and_only_its_owner_can_read_it(tmp_path):
    db = journal.open_journal(tmp_path / "j.db")
    journal.record_turn(db, turn())
    again = journal.open_journal(tmp_path / "j.db")  # as after kill -9: nothing was closed
    assert journal.load_turn(again, "t1")[0].response_ids == [3, 4, 5]
    for path in tmp_path.glob("j.db*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_late_feedback_is_kept(db):
    journal.record_turn(db, turn())
    for score in (1, -1):
        journal.keep_late_feedback(db, "t1", {"score": score, "text": "it's late", "time": 1.0})
    kept = json.loads(journal.row_of(db, "t1")["late_feedback"])
    assert [(k["score"], k["text"]) for k in kept] == [(1, "it's late"), (-1, "it's late")]


def test_the_counts_are_right_after_every_change(db):
    truth = lambda: dict(db.execute("SELECT state, COUNT(*) FROM turns GROUP BY state").fetchall())  # noqa: E731
    for k in range(6):
        journal.record_turn(db, turn(f"t{k}", user=("alice", "bob")[k % 2]), journal.SESSION_OVER if k == 5 else None)
    journal.record_next(db, "t0", [{"role": "user", "content": "no"}])
    for k in range(3):
        journal.record_verdict(db, f"t{k}", BAD)
        assert journal.counts(db) == truth()
    journal.begin_step(db, ["t0", "t1"])
    journal.mark_trained(db, ["t0"], 1)
    journal.requeue(db, "an error")
    journal.expire(db, -1)
    assert journal.counts(db) == truth()
    assert journal.counts(db, "bob") == {"queued": 1, "dropped": 2}
    assert journal.drop_reasons(db, "bob") == {journal.NO_REPLY: 1, journal.SESSION_OVER: 1}
    db.execute("DELETE FROM turns WHERE user = 'bob'")
    assert journal.counts(db) == truth() and journal.counts(db, "bob") == {}
    assert "bob" not in str([tuple(r) for r in db.execute("SELECT * FROM counters")])


def test_drop_reasons_are_counted_by_kind(db):
    for k in range(40):
        journal.record_turn(db, turn(f"t{k}"))
        journal.drop(db, [f"t{k}"], f"step {k % 10} reverted: loss {k}" if k % 2 else f"the judge failed: error {k}")
    assert journal.drop_reasons(db) == {"step # reverted": 20, "the judge failed": 20}


def test_a_start_reads_only_the_turns_that_it_changes(db):
    """Counted in steps of SQLite's virtual machine, with 5,000 turns that need no change."""
    for k in range(5000):
        journal.record_turn(db, turn(f"t{k}"))
    journal.mark_trained(db, [f"t{k}" for k in range(5000)], 1)
    journal.add_checkpoint(db, "", 1, keep=1)
    steps = []
    db.set_progress_handler(lambda: steps.append(1), 100)
    journal.recover(db)
    journal.expire(db, 60)
    assert len(steps) < 10


def test_an_existing_out_folder_is_made_private_or_refused(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir(mode=0o755)
    upkeep.lock_out_dir(out).close()
    assert stat.S_IMODE(out.stat().st_mode) == 0o700 and "mode is now 0700" in capsys.readouterr().out
    out.chmod(0o1777)  # as /tmp
    with pytest.raises(UsageError, match="not yours alone"):
        upkeep.lock_out_dir(out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o1777
    if os.geteuid() == 0:
        out.chmod(0o700)
        os.chown(out, 12345, 12345)
        with pytest.raises(UsageError, match="not yours alone"):
            upkeep.lock_out_dir(out)


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []

    def synced(descriptor):
        folder = checkpoint.folder_of(tmp_path, "", 1)
        done.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), folder.exists()))

    def save(folder):
        (folder / "deep").mkdir(parents=True)
        for name in ("a", "deep/b"):
            (folder / name).write_text("weights")

    monkeypatch.setattr(os, "fsync", synced)
    checkpoint.write(checkpoint.folder_of(tmp_path, "", 1), 0, save)
    before = {path.name.partition(".")[0] for path, named in done if not named}
    assert before == {"a", "b", "deep", "step-000001"} and done[-1] == (tmp_path / "checkpoints", True)
