"""The life of a row."""

import stat

import pytest

import journal
from journal import Turn, Verdict


def turn(turn_id="t1", **changes):
    values = {
        "id": turn_id,
        "session": "s",
        "user": "alice",
        "messages": [{"role": "user", "content": "hi"}],
        "template": {"tools": [{"type": "function"}]},
        "digest": "d",
        "text": "hello",
        "finish_reason": "stop",
        "prompt_ids": [1, 2],
        "response_ids": [3, 4, 5],
        "logprobs": [-0.5, -1.0, -0.25],
        "versions": [(0, 0, 2), (1, 2, 3)],
        "temperature": 1.0,
    }
    return Turn(**values | changes)


@pytest.fixture
def db(tmp_path):
    db = journal.open_journal(tmp_path / "j.db")
    yield db
    db.close()


def state(db, turn_id="t1"):
    return tuple(db.execute("SELECT state, reason, step, score FROM turns WHERE id = ?", (turn_id,)).fetchone())


GOOD = Verdict(1, [1, 1, 0], [], "", "policy", "judge")
BAD = Verdict(-1, [-1], ["say less, please"], "own words", "alice", "feedback")


def test_from_waiting_to_trained(db):
    journal.record_turn(db, turn())
    assert state(db) == ("waiting", None, None, None)
    assert journal.record_next(db, "t1", [{"role": "user", "content": "thanks"}])
    assert not journal.record_next(db, "t1", [{"role": "user", "content": "again"}]), "a branch judges nothing twice"
    assert state(db)[0] == "judging"
    assert journal.record_verdict(db, "t1", GOOD)
    assert state(db) == ("queued", None, None, 1)
    sample = journal.load_sample(db, "t1")
    assert sample.turn == turn(created=sample.turn.created) and sample.verdict == GOOD
    journal.mark_trained(db, ["t1"], 7)
    assert state(db) == ("trained", None, 7, 1)
    assert journal.counts(db) == {"trained": 1}


def test_feedback_outranks_the_judge_before_and_after(db):
    for first, second in ((GOOD, BAD), (BAD, GOOD)):
        turn_id = first.source
        journal.record_turn(db, turn(turn_id))
        assert journal.record_verdict(db, turn_id, first)
        assert not journal.record_verdict(db, turn_id, second), "it is in the queue already, once"
        assert state(db, turn_id)[3] == -1


def test_a_bad_score_without_words_keeps_the_judges_hint(db):
    journal.record_turn(db, turn())
    journal.record_next(db, "t1", [{"role": "user", "content": "no"}])
    assert journal.record_verdict(db, "t1", Verdict(-1, [-1], ["Be brief, please."], "judge", "policy", "judge"))
    assert not journal.record_verdict(db, "t1", Verdict(-1, [-1], [], "", "alice", "feedback"))
    verdict = journal.load_sample(db, "t1").verdict
    assert (verdict.source, verdict.hints, verdict.hinted_by) == ("feedback", ["Be brief, please."], "judge")
    journal.record_verdict(db, "t1", Verdict(1, [1], [], "", "alice", "feedback"))
    assert journal.load_sample(db, "t1").verdict.hints == []


def test_a_file_of_another_format_is_refused(tmp_path):
    db = journal.open_journal(tmp_path / "j.db")
    db.execute("PRAGMA user_version = 1")
    db.close()
    with pytest.raises(SystemExit, match="format 1"):
        journal.open_journal(tmp_path / "j.db")


def test_neutral_is_dropped_and_feedback_may_still_queue_it(db):
    journal.record_turn(db, turn())
    assert not journal.record_verdict(db, "t1", Verdict(0, [0, 0, 1], [], "", "policy", "judge"))
    assert state(db)[:2] == ("dropped", journal.NEUTRAL)
    assert journal.record_verdict(db, "t1", BAD)
    journal.mark_trained(db, ["t1"], 1)
    with pytest.raises(ValueError, match="t1 is trained"):
        journal.record_verdict(db, "t1", BAD)


def test_expiry_and_late_feedback(db):
    journal.record_turn(db, turn("old", created=1.0))
    journal.record_turn(db, turn("new"))
    assert journal.expire(db, 60) == 1 and state(db, "old")[:2] == ("dropped", journal.ALONE)
    assert state(db, "new")[0] == "waiting"
    assert journal.record_verdict(db, "old", BAD), "a person may still rate what nobody went on from"


def test_a_batch_in_training_is_settled_until_it_is_undone(db):
    journal.record_turn(db, turn())
    journal.record_verdict(db, "t1", BAD)
    (sample,) = journal.begin_step(db, ["t1"])
    assert sample.verdict == BAD and state(db)[0] == "training"
    with pytest.raises(ValueError, match="t1 is training"):
        journal.record_verdict(db, "t1", BAD)
    journal.undo_step(db)
    assert journal.in_state(db, "queued") == ["t1"]


def test_what_does_not_join_is_refused():
    for wrong in ({"logprobs": [-1.0]}, {"versions": [(0, 0, 2)]}, {"response_ids": [3]}):
        with pytest.raises(ValueError, match="t1"):
            turn(**wrong)


def test_it_survives_and_is_private(tmp_path):
    db = journal.open_journal(tmp_path / "j.db")
    journal.record_turn(db, turn())
    again = journal.open_journal(tmp_path / "j.db")  # as after kill -9: nothing was closed
    assert journal.load_turn(again, "t1")[0].response_ids == [3, 4, 5]
    for path in tmp_path.glob("j.db*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
