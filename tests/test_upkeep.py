"""Prune, forget, show and export: what is removed from the journal, and what is shown of it."""

import json
import random
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from clients.sessions import answer_digest, keys_of
from durable import admin, journal, pieces, upkeep
from durable.errors import UsageError
from tests.conftest import ROOT
from tests.records import BAD, turn
from tests.talking import user

SECRET = "My dentist is called Doctor Xyzzy Plugh and lives in Porto."
REPLY = "I will remember that your dentist is Doctor Xyzzy Plugh."
COMMON = "Please check all my open tasks and tell me what is due."


@pytest.fixture
def db(tmp_path):
    db = upkeep.own_connection(tmp_path / "journal.db")
    yield db
    db.close()


def bot(text):
    return {"role": "assistant", "content": text}


def say(db, session, messages, answer, **more):
    """Record a turn of a session. Returns its id."""
    turn_id = f"{session}-{len(messages)}-{time.monotonic_ns()}"
    keys = keys_of(messages) | {"answer": answer_digest(bot(answer))}
    journal.record_turn(db, turn(turn_id, session=session, messages=messages, text=answer, **keys, **more))
    return turn_id


def on_disk(folder, text):
    return any(text.encode() in p.read_bytes() for p in folder.glob("journal.db*"))


def sessions_left(db):
    return {r[0] for r in db.execute("SELECT DISTINCT session FROM turns")}


def forget(folder, **what):
    """What `forget` tells the admin, and the sessions that it removed."""
    said = upkeep.forget(folder / "journal.db", **what)
    return said, {line.strip().split(": ")[0] for line in said.splitlines() if line.startswith("  ")}


def test_forget_also_removes_what_was_derived_from_a_conversation(db, tmp_path):
    first = say(db, "talk", [user(SECRET)], REPLY)
    journal.record_next(db, first, [user("Thanks.")])
    quoted = f"Make a title for this chat:\n<chat>\nuser: {SECRET}\nassistant: {REPLY}\n</chat>"
    say(db, "title", [user(quoted)], "Dentist")
    summary = "The person told the name of their dentist, a doctor in Porto."
    request = [user(SECRET), bot(REPLY), user("Your task is to create a detailed summary of the conversation so far")]
    say(db, "summary", request, summary)
    say(
        db, "compacted", [user(f"The conversation before was compacted:\n\n{summary}"), user("Go on.")], "Sure, gladly."
    )
    generator = "You are a title generator. You output ONLY a thread title. Nothing else."
    say(db, "client", [{"role": "system", "content": generator}, user(f"- {SECRET}")], "A dentist")
    say(db, "bobs", [user(quoted)], "Bob's", user="bob")
    for k in range(10):
        say(
            db,
            f"other {k}",
            [user("How tall is the tower in Paris?"), bot("330 m"), user("Thanks.")],
            "You are welcome.",
        )
    said, gone = forget(tmp_path, session="talk")
    assert gone == {"talk", "title", "summary", "compacted", "client"} and said.startswith("5 turns are removed")
    assert "talk: as asked" in said and "title: it quotes a text of" in said
    assert sessions_left(db) == {"bobs", *(f"other {k}" for k in range(10))}
    forget(tmp_path, user="bob")
    assert sessions_left(db) == {f"other {k}" for k in range(10)} and not on_disk(tmp_path, "Xyzzy")
    with pytest.raises(UsageError, match="--session=talk: there is no such session"):
        forget(tmp_path, session="talk")


def test_forget_keeps_other_conversations_that_share_only_common_texts(db, tmp_path):
    for k in range(6):
        talk = [user(f"Question number {k}, please answer it well."), bot(f"Answer number {k} to it, in full length.")]
        say(db, f"s{k}", [*talk, user(COMMON)], "Nothing is due.")
    for name in ("weather", "weather again"):
        say(db, name, [user("What is the weather like in Berlin?")], "I can't see the weather from here.")
    assert forget(tmp_path, session="s0")[1] == {"s0"}
    assert forget(tmp_path, session="weather")[1] == {"weather"}


def test_forget_leaves_no_copies_in_unused_parts_of_pages(db, tmp_path):
    """Rows that SQLite moves from page to page leave copies behind, which `secure_delete` does not overwrite."""
    letters, words = random.Random(0), {}
    for k in range(400):
        user_name = ("ann", "bob")[k % 2]
        words[k] = "".join(letters.choices("abcdefgh", k=letters.randrange(20, 400)))
        say(db, f"{user_name} {k}", [user(f"{user_name}s question {k}")], f"{user_name}s {words[k]}", user=user_name)
    forget(tmp_path, user="ann")
    assert sessions_left(db) == {f"bob {k}" for k in range(1, 400, 2)}
    assert not on_disk(tmp_path, "ann") and not any(on_disk(tmp_path, words[k][:16]) for k in range(0, 400, 2))
    assert on_disk(tmp_path, "bob 1")


def test_forget_reports_the_steps_and_checkpoints_that_remain(db, tmp_path):
    turn_id = say(db, "talk", [user(SECRET)], REPLY)
    journal.record_verdict(db, turn_id, BAD)
    journal.begin_step(db, [turn_id])
    journal.mark_trained(db, [turn_id], 12)
    for step in (10, 20):
        journal.add_checkpoint(db, "", step, keep=3)
    said, _ = forget(tmp_path, session="talk")
    assert "the steps from 12 on" in said and "did not see it: 10 (rollback --step); that did: 20" in said


def test_forget_reports_that_a_reader_holds_the_log(db, tmp_path, monkeypatch):
    monkeypatch.setattr(upkeep.empty_log, "__defaults__", (0.5,))
    say(db, "talk", [user(SECRET)], REPLY)
    reader = sqlite3.connect(tmp_path / "journal.db")
    reader.execute("BEGIN")
    reader.execute("SELECT COUNT(*) FROM turns").fetchone()
    assert "another program reads the journal" in forget(tmp_path, session="talk")[0]
    reader.close()
    with pytest.raises(UsageError, match="no such session"):
        forget(tmp_path, session="talk")
    assert not on_disk(tmp_path, "Xyzzy")


def test_a_piece_that_is_used_again_during_forget_is_kept(db, tmp_path, monkeypatch):
    """While `forget` looks for unused pieces, the program records a turn with the same text."""
    say(db, "talk", [user(SECRET)], REPLY)
    program, portions = journal.open_journal(tmp_path / "journal.db"), upkeep.in_portions

    def record_before_and_after(db, ids, *statements):
        if "hash = NULL" in statements[0]:
            say(program, "before", [user(SECRET)], "ok")
        portions(db, ids, *statements)
        if "hash = NULL" in statements[0]:
            say(program, "after", [user(SECRET)], "ok")

    monkeypatch.setattr(upkeep, "in_portions", record_before_and_after)
    forget(tmp_path, session="talk")
    for r in db.execute("SELECT id FROM turns").fetchall():
        assert journal.load_turn(db, r["id"])[0].messages == [user(SECRET)]
    assert sessions_left(db) == {"before", "after"}


def test_prune_removes_the_texts_of_old_finished_turns(db, tmp_path):
    old = {"created": time.time() - 40 * 86400}
    talk = [user(SECRET)]
    ids = {name: say(db, name, talk, f"{name} answer", **old) for name in ("kept", "later", "dropped", "waiting")}
    ids["new"] = say(db, "new", [user("fresh words")], "new answer")
    for name, step in (("kept", 5), ("later", 30)):
        journal.record_verdict(db, ids[name], BAD)
        journal.mark_trained(db, [ids[name]], step)
    for step in (10, 20):
        journal.add_checkpoint(db, "", step, keep=2)
    for name in ("dropped", "new"):
        journal.drop(db, [ids[name]], journal.NO_REPLY)
    before = journal.counts(db)
    assert upkeep.prune(tmp_path / "journal.db", 30) == 2
    texts = {r["session"]: r["text"] for r in db.execute("SELECT session, text FROM readable")}
    assert {name for name, text in texts.items() if not text} == {"kept", "dropped"}
    assert journal.load_turn(db, ids["later"])[0].messages == talk, "a piece that others still have stays"
    row = journal.row_of(db, ids["kept"])
    assert (row["score"], row["state"], row["step"]) == (-1, "trained", 5) and journal.counts(db) == before
    assert not journal.record_next(db, ids["dropped"], [user("hello again")])
    with pytest.raises(ValueError, match="is dropped"):
        journal.record_verdict(db, ids["dropped"], BAD)
    assert journal.load_turn(db, ids["kept"])[0].response_ids == []
    assert "removed, by --keep_days" in admin.describe(
        db.execute("SELECT * FROM readable WHERE id = ?", (ids["kept"],)).fetchone()
    )
    for name in ("later", "waiting"):
        journal.drop(db, [ids[name]], journal.NO_REPLY)
    upkeep.prune(tmp_path / "journal.db", 30)
    assert upkeep.empty_log(db) and not on_disk(tmp_path, "Xyzzy") and on_disk(tmp_path, "fresh words")


def run_admin(tmp_path, *words):
    command = [sys.executable, "-m", "durable.admin", *words, f"--out={tmp_path}"]
    return subprocess.run(command, capture_output=True, cwd=ROOT, check=True).stdout


def test_show_sends_no_control_sequences_to_the_terminal(db, tmp_path):
    bad = "a\x1b]52;c;cm0=\x07b\x9b31mc\u202ed\r"
    say(db, bad, [user(bad)], bad)
    out = run_admin(tmp_path, "show").decode()
    assert all(c.isprintable() or c == "\n" for c in out) and r"a\x1b]52;c;cm0=\x07b\x9b31mc\u202ed" in out


def test_learned_counts_the_users_own_words(db, tmp_path):
    """Each user's own words in their smallest parts, the most frequent first, without control sequences."""
    brief = ["Too long. Be brief.", "Too long.", "Be brief."]
    for name, hints in (("alice", brief), ("alice", ["be brief"]), ("bob\x1b[2J", ["Use\x1b[2J lists."])):
        judged = say(db, "a", [user("one")], "1", user=name)
        journal.record_verdict(db, judged, replace(BAD, hints=hints))
    say(db, "a", [user("nobody says anything about it")], "1")
    lines = run_admin(tmp_path, "learned").decode().splitlines()
    assert lines[0] == "    2 x  be brief  (alice)"
    assert set(lines[1:]) == {"    1 x  Too long.  (alice)", r"    1 x  Use\x1b[2J lists.  (bob\x1b[2J)"}
    assert len(run_admin(tmp_path, "learned", "--user=alice").splitlines()) == 2
    with pytest.raises(subprocess.CalledProcessError):
        run_admin(tmp_path, "learned", "--user=carol")


def test_turns_are_exported_as_json_lines(db, tmp_path):
    judged = say(db, "a", [user("one")], "1")
    journal.record_next(db, judged, [user("no")])
    journal.record_verdict(db, judged, BAD)
    say(db, "b", [user("two")], "2", created=1.0)
    found = [json.loads(line) for line in run_admin(tmp_path, "turns").splitlines()]
    assert [f["text"] for f in found] == ["2", "1"] and found[0]["verdict"] is None
    one = found[1]
    assert (one["messages"], one["prompt_ids"], one["response_ids"]) == ([user("one")], [1, 2], [3, 4, 5])
    assert one["logprobs"] == [-0.5, -1.0, -0.25] and one["versions"] == [[0, 0, 2], [1, 2, 3]]
    assert one["verdict"]["score"] == -1 and one["state"] == "queued" and one["next_messages"] == [user("no")]
    assert len(run_admin(tmp_path, "turns", "--since=2020-01-01").splitlines()) == 1


def test_a_sweep_removes_only_unused_pieces(db):
    say(db, "a", [user(f"message {k}") for k in range(100)], "1")
    before = db.execute("SELECT COUNT(*) FROM pieces").fetchone()[0]
    pieces.put(db, ["nobody's"])
    upkeep.sweep(db)
    assert db.execute("SELECT COUNT(*) FROM pieces WHERE hash NOT NULL").fetchone()[0] == before
