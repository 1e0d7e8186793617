"""How long recording a turn and starting take when the journal has 10, 100,000 and 1,000,000 turns."""

import os
import sqlite3
import time

import pytest

from durable import journal
from tests.records import turn
from tests.talking import user

SIZES = (10, 100_000, 1_000_000)


def fill(path, count, **more):
    """Insert turns as they are after weeks: each is trained on or dropped. `more`: other columns."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA synchronous=OFF")
    have = db.execute("SELECT MAX(number) FROM turns").fetchone()[0]
    db.row_factory = sqlite3.Row
    row = dict(db.execute("SELECT * FROM turns").fetchone())
    row |= dict.fromkeys(("number", "created", "step"), "k")
    columns = {name: value if value == "k" else f":{name}" for name, value in row.items()}
    columns |= {"id": "'t' || k", "session": "'s' || (k / 20)", "user": "'user ' || (k % 5)"}
    columns |= {name: "hex(randomblob(32))" for name in ("answer", "history")}
    columns |= {
        "state": "iif(k % 3, 'dropped', 'trained')",
        "reason": "'stale: more than ' || (k % 7) || ' steps old'",
    } | more
    source = f"WITH RECURSIVE n(k) AS (SELECT {have + 1} UNION ALL SELECT k + 1 FROM n WHERE k < {count})"
    db.execute("BEGIN")
    db.execute(f"INSERT INTO turns ({', '.join(columns)}) {source} SELECT {', '.join(columns.values())} FROM n", row)
    db.execute(f"INSERT INTO answers {source} SELECT k, text, response_ids, logprobs FROM n, answers WHERE number = 1")
    db.execute("COMMIT")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


def milliseconds(f, *args):
    begun = time.perf_counter()
    f(*args)
    return (time.perf_counter() - begun) * 1e3


@pytest.mark.timeout(1800)
def test_recording_a_turn_stays_fast_in_a_large_journal(tmp_path):
    path, results = tmp_path / "j.db", []
    db = journal.open_journal(path)
    journal.record_turn(
        db, turn("t1", text="x" * 300, response_ids=[3] * 100, logprobs=[-0.5] * 100, versions=[(0, 0, 100)])
    )
    journal.add_checkpoint(db, "", 10**7, keep=3)
    db.close()
    for size in SIZES:
        fill(path, size)
        with open(path, "rb") as f:  # cold: not in the page cache
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        db = journal.open_journal(path)
        start = milliseconds(journal.recover, db)
        times = {name: [] for name in ("record_turn", "candidates", "record_next", "counts")}
        for k in range(200):
            name = f"new {size} {k}"
            answered = turn(name, session=name, user="user 1", answer=name, history=name, messages=[user(name)])
            times["record_turn"].append(milliseconds(journal.record_turn, db, answered))
            times["candidates"].append(milliseconds(journal.candidates, db, "user 1", name, name))
            times["record_next"].append(milliseconds(journal.record_next, db, name, [user(f"{name} no")]))
            times["counts"].append(milliseconds(journal.counts, db) + milliseconds(journal.drop_reasons, db))
        results.append({"recover, cold": start} | {name: sorted(t)[100] for name, t in times.items()})
        results[-1]["a turn"] = sum(results[-1][name] for name in times)
        assert sum(journal.counts(db).values()) == db.execute("SELECT COUNT(*) FROM turns").fetchone()[0]
        db.close()
    print("\nmedian ms      " + "".join(f"{size:>12,}" for size in SIZES))
    for name in results[0]:
        print(f"{name:<15}" + "".join(f"{r[name]:>12.2f}" for r in results))
    assert results[-1]["a turn"] < 10 and results[-1]["counts"] < 5 and results[-1]["recover, cold"] < 100
