"""What the page reads from the journal: bounded work for each request, however many turns there are.

All of it runs in a thread, on a connection that can't write."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from clients.sessions import replied_to, with_calls, without_thinking
from durable import journal, pieces
from durable.look import NEWEST, newest, rows

AT_ONCE = 30  # turns in a response
POINTS, WINDOW = 100, 10  # points per curve; the smallest window for a share
LAST_MESSAGES, LONGEST = 6, 32 << 10  # how many of a request's last messages are read, and how many characters of each
SHOWN = 4000  # characters of a text
TOKENS = 2000  # of an answer
METRICS = 2 << 20  # bytes of metrics.jsonl, from its end
COLUMNS = """number, id, session, user, created, state, step, reason, score, votes, confidence, hints, hinted_by,
  source, no_rl, late_feedback, versions, prompt_tokens, messages, next_messages, template IS NULL AS pruned"""


def connect(path: Path) -> sqlite3.Connection:
    """For any thread, one at a time."""
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)
    db.row_factory = sqlite3.Row
    db.text_factory = lambda text: text.decode(errors="replace")  # substr may cut a surrogate pair
    return db


def listed(db: sqlite3.Connection, **where: Any) -> list[dict[str, Any]]:
    """The newest turns, newest first, as the page shows them."""
    found = []
    for row in rows(db, COLUMNS, newest(db, AT_ONCE, **where)):
        turn = dict(row)
        for name in ("votes", "hints", "late_feedback", "versions"):
            turn[name] = json.loads(row[name] or "[]")
        turn["tokens"] = sum(end - start for _, start, end in turn["versions"])
        lists = json.loads(turn.pop("messages"))[-2:]
        ids = [i for each in pieces_of(db, lists) for i in each]
        turn["request"] = [shown(m) for m in replied_to(pieces_of(db, ids[-LAST_MESSAGES:]))]
        turn["next"] = [shown(m) for m in pieces_of(db, json.loads(turn.pop("next_messages") or "[]")[-LAST_MESSAGES:])]
        ends = f"SELECT substr(text, 1, {LONGEST}), substr(text, -{LONGEST}) FROM answers WHERE number = ?"
        begin, end = db.execute(ends, (row["number"],)).fetchone() or ("", "")  # a damaged journal may have no row
        turn["answer"] = cut(without_thinking(end if "</think>" in end else begin).strip())
        found.append(turn)
    return found


def pieces_of(db: sqlite3.Connection, ids: list[int]) -> list[Any]:
    """The pieces with these ids, in this order; only the beginning of a very long message."""
    begins = f"'role', json_extract(data, '$.role'), 'content', substr(json_extract(data, '$.content'), 1, {SHOWN + 1})"
    one = f"SELECT iif(length(data) <= {LONGEST}, data, json_object({begins})) FROM pieces WHERE id = ?"
    return [json.loads(db.execute(one, (i,)).fetchone()[0]) for i in ids]


def shown(message: dict) -> dict[str, str]:
    return {"role": message["role"], "text": cut(with_calls(message))}


def cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def tokens(db: sqlite3.Connection, tokenizer: PreTrainedTokenizerBase, number: str, user: str | None) -> dict | None:
    """The tokens of an answer, their log-probs and weight versions; None if this user has no such turn. `number`: any
    text; SQLite compares it as a number."""
    row = db.execute(
        "SELECT versions, response_ids, logprobs FROM turns JOIN answers USING (number) "
        "WHERE number = ?1 AND (?2 IS NULL OR user = ?2)",
        (number, user),
    ).fetchone()
    if row is None:
        return None
    ids, logprobs = (
        np.frombuffer(pieces.unpacked(row[name]), dtype)[:TOKENS].tolist() for name, dtype in journal.AS_BYTES.items()
    )
    texts = [tokenizer.decode([i]) for i in ids]
    return {"tokens": texts, "logprobs": logprobs, "versions": json.loads(row["versions"])}


def pleased(db: sqlite3.Connection, user: str | None) -> dict[str, Any]:
    """For points in time, the share of good verdicts in a sliding window of ten or more good-or-bad verdicts, among the
    newest answers."""
    found = rows(db, "created, score", newest(db, NEWEST, user=user))
    scored = [(r["created"], r["score"] > 0) for r in reversed(found) if r["score"]]
    apart = -(-len(scored) // POINTS) or 1
    window = max(WINDOW, apart)
    lasts = {n: scored[max(0, n - window) : n] for n in range(len(scored), 0, -apart)}
    shares = [(last[-1][0], sum(good for _, good in last) / len(last)) for last in reversed(lasts.values())]
    return {"window": window, "shares": shares}


def steps(path: Path, everybodys: bool, owner: str) -> list[dict[str, float]]:
    """The last steps of metrics.jsonl, thinned out. One user doesn't get the values that come from other users' turns.
    `owner`: the user whose adapter's steps these are; "" for the shared weights."""
    names = ("step", "time", "probe_kl", "probe_length", "pause_s")
    names += ("reward", "length", "dlogp") if everybodys or owner else ()
    if not path.exists():
        return []
    with open(path, "rb") as f:
        f.seek(begin := max(0, path.stat().st_size - METRICS))
        lines = f.read().decode().splitlines()[1 if begin else 0 :]
    rows = [row for row in map(json.loads, lines) if not owner or row.get("owner") == owner]
    kept = rows[:: -(len(rows) // (5 * POINTS) + 1)][::-1]
    return [{name: row[name] for name in names} for row in kept]
