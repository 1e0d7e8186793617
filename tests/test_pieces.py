"""Each text and each block of token ids is stored once."""

import json
import random

import numpy as np
import pytest

from durable import journal, pieces
from tests.records import agent_turns, turn


@pytest.fixture
def db(tmp_path):
    db = journal.open_journal(tmp_path / "j.db")
    yield db
    db.close()


@pytest.mark.parametrize("clock", [False, True])
def test_the_journal_takes_less_than_3_times_its_text(db, tmp_path, clock):
    """200 turns of an agent, whose last prompt has 730 KiB of text."""
    texts, before = set(), None
    for t in agent_turns(clock=clock):
        if before:
            journal.record_next(db, before.id, t.messages[-1:])
        journal.record_turn(db, t)
        texts |= {m["content"] for m in t.messages} | {t.text, json.dumps(t.template)}
        before = t
    found, _ = journal.load_turn(db, before.id)
    assert (found.messages, found.template, found.prompt_ids) == (before.messages, before.template, before.prompt_ids)
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    size, text = (tmp_path / "j.db").stat().st_size, sum(len(t.encode()) for t in texts)
    print(f"{size >> 10} KiB for {text >> 10} KiB of text: {size / text:.2f}")
    assert text > 730 << 10 and size < 3 * text


def test_the_choices_of_a_request_store_their_prompt_once(db):
    body = {"messages": [{"role": "user", "content": "x" * 100_000}], "prompt_ids": list(range(5000))}
    for k in range(8):
        journal.record_turn(db, turn(f"t/{k}", **body))
    assert db.execute("SELECT SUM(LENGTH(data)) FROM pieces").fetchone()[0] < 130_000


def test_message_fields_that_the_prompt_does_not_need_are_not_stored(db):
    call = {"id": "i", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    kept = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm", "name": "n"}
    journal.record_turn(db, turn(messages=[kept | {"junk": "x" * 1000}]))
    journal.record_next(db, "t1", [{"role": "user", "content": "ok", "junk": 1}])
    found, following = journal.load_turn(db, "t1")
    assert found.messages == [kept] and following == [{"role": "user", "content": "ok"}]


@pytest.mark.parametrize("odd", ["\ud800", "é\ud83d", "\x00", "😀", '"]', "\u2028"])
def test_unusual_text_is_stored_and_loaded_unchanged(db, odd):
    journal.record_turn(db, turn(messages=[{"role": "user", "content": odd}], template={"tools": [odd]}))
    found, _ = journal.load_turn(db, "t1")
    assert found.messages[0]["content"] == odd and found.template["tools"] == [odd]


def test_messages_can_be_read_with_sqlite3(db):
    messages = [{"role": "user", "content": f"é {k}"} for k in range(50)]
    journal.record_turn(db, turn(messages=messages))
    assert json.loads(db.execute("SELECT messages FROM readable").fetchone()[0]) == messages


@pytest.mark.parametrize("ids", [[], [5], [7] * 5000, [1, 2] * 3000, list(range(100_000))])
def test_blocks_join_to_the_original_list(ids):
    blocks = pieces.cut(np.asarray(ids, np.int32), 256)
    assert [i for b in blocks for i in b.tolist()] == ids and len(blocks) <= len(ids) / 64 + 1
    assert all(len(b) <= 4 * 256 + 64 for b in blocks)


def test_an_insertion_moves_no_later_cut():
    rng = random.Random(0)
    ids = [rng.randrange(50_000) for _ in range(20_000)]
    before, after = ({b.tobytes() for b in pieces.cut(np.asarray(x, np.int32), 256)} for x in (ids, [1, 2, *ids]))
    assert len(after - before) <= 2
