"""Another program that writes to the journal causes delay, and no other harm."""

import asyncio
import contextlib
import sqlite3
import threading
import time

import httpx
import openai
import pytest

from durable import journal
from tests.records import turn
from tests.talking import ask, client, rated, rows, until, user


async def longest_stall(seconds):
    """The longest time that the event loop stalls, within this many seconds."""
    longest, end = 0.0, time.monotonic() + seconds
    while (before := time.monotonic()) < end:
        await asyncio.sleep(0.005)
        longest = max(longest, time.monotonic() - before - 0.005)
    return longest


@pytest.mark.timed
async def test_the_event_loop_keeps_running_while_another_program_writes(tmp_path, capsys):
    db, other = journal.open_journal(tmp_path / "j.db"), sqlite3.connect(tmp_path / "j.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writes = [asyncio.create_task(journal.patiently(journal.record_turn, db, turn(f"t{k}"))) for k in range(20)]
    writes += [asyncio.create_task(journal.patiently(journal.drop, db, ["t"], "why")) for _ in range(500)]
    assert await longest_stall(3) < 0.3 and not any(w.done() for w in writes), "with all writers waiting"
    assert capsys.readouterr().err.count("another program has the journal open") == 1
    other.execute("COMMIT")
    await asyncio.wait_for(asyncio.gather(*writes), 5)
    assert journal.counts(db) == {"waiting": 20}


async def test_a_write_that_had_to_wait_reads_the_row_again(tmp_path):
    """Feedback that arrives while the judge's verdict waits for the lock is not overwritten."""
    db, other = journal.open_journal(tmp_path / "j.db"), journal.open_journal(tmp_path / "j.db")
    journal.record_turn(db, turn())
    other.execute("BEGIN IMMEDIATE")
    judged = asyncio.create_task(journal.patiently(journal.record_verdict, db, "t1", journal.Verdict(
        0, [0], 1.0, [], "", "policy", "judge")))  # fmt: skip
    await asyncio.sleep(0.2)
    other.execute("UPDATE turns SET state = 'queued', score = -1, source = 'feedback'")
    other.execute("COMMIT")
    assert not await judged and journal.row_of(db, "t1")["score"] == -1


async def test_other_database_errors_are_raised(tmp_path):
    db = journal.open_journal(tmp_path / "j.db")
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        await journal.patiently(sqlite3.Connection.execute, db, "DELETE FROM missing")
    assert not db.in_transaction


@pytest.mark.timed
async def test_the_program_serves_and_trains_while_another_program_writes(program):
    done = program.status()["step"]
    waits, end, held = [], threading.Event(), []

    def poll_health():
        with httpx.Client(base_url=program.url, timeout=30) as http:
            while not end.is_set():
                begun = time.monotonic()
                assert http.get("/health").status_code == 200
                waits.append(time.monotonic() - begun)
                time.sleep(0.02)

    def hold_the_lock():
        other = sqlite3.connect(program.out / "journal.db", isolation_level=None, timeout=10)
        for _ in range(3):
            other.execute("BEGIN IMMEDIATE")
            held.append(time.monotonic())
            time.sleep(3)
            other.execute("COMMIT")
            time.sleep(0.5)
        other.close()

    threads = [threading.Thread(target=f) for f in (poll_health, hold_the_lock)]
    for t in threads:
        t.start()
    await asyncio.sleep(0.5)
    begun = time.monotonic()
    reply = await ask(client(program), [user("is anybody there?")])
    assert time.monotonic() - begun > 2, "recorded before its last token is sent"
    ids = await asyncio.gather(*[rated(program, f"patience {k}", (1, -1)[k % 2]) for k in range(8)])
    await asyncio.to_thread(threads[1].join)
    end.set()
    await asyncio.to_thread(threads[0].join)
    await until(lambda: program.status()["step"] > done, 120)
    assert len(rows(program, "id = ?", reply.id)) == 1
    assert all(len(rows(program, "id = ?", i)) == 1 for i in ids)
    waits.sort()
    print(f"health: {len(waits)} requests, median {waits[len(waits) // 2] * 1e3:.0f} ms, longest {waits[-1] * 1e3:.0f}")
    assert waits[int(len(waits) * 0.99)] < 0.1


async def test_a_stop_does_not_wait_for_another_program_that_writes(fresh):
    program = fresh(batch_size=2, save_every=100).wait_ready()
    trained = [await rated(program, f"q{k}") for k in range(2)]
    await until(lambda: program.status()["step"] == 1)
    other = sqlite3.connect(program.out / "journal.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    asking = asyncio.create_task(ask(client(program, "none"), [user("is anybody there?")]))
    await asyncio.sleep(2)
    assert not asking.done(), "it waits for the lock"
    assert await asyncio.to_thread(program.stop) < 20 and program.process.returncode == 0
    with pytest.raises(openai.APIError):
        await asking
    assert "no checkpoint of step 1: another program" in program.log()
    other.execute("ROLLBACK")
    with contextlib.closing(journal.open_journal(program.out / "journal.db")) as db:
        assert journal.recover(db) is None and set(journal.in_state(db, "queued")) == set(trained)
