"""Summaries of the newest turns for people: bounded work, however many turns the journal holds."""

import json
import sqlite3
from typing import Any

from clients.sessions import letters

STATES = ("waiting", "judging", "queued", "training", "trained", "dropped")
NEWEST = 5000  # turns that are counted
TOP_RULES = 10  # the most frequent rules, which are listed
EXAMPLES = 3  # turns of each
LONGEST_PROMPT = 4096  # tokens, of a request that is asked again


def newest(db: sqlite3.Connection, limit: int, **where: Any) -> str:
    """The numbers of the newest turns, as a JSON list. `where`: user, session, state and before (a time), each may be
    None. Of each state the newest ones are read from an index, then the newest of these are taken."""
    user, session, state, before = (where.get(name) for name in ("user", "session", "state", "before"))
    values = {"user": user, "session": session, "before": before or 1e12, "limit": limit}
    if session:
        from_index = "INDEXED BY by_session WHERE session = :session AND (:user IS NULL OR user = :user)"
    else:
        from_index = "INDEXED BY by_state WHERE 1" if user is None else "INDEXED BY by_user WHERE user = :user"
    each = (
        f"SELECT * FROM (SELECT number, created FROM turns {from_index} AND state = '{name}' AND created < :before "
        "ORDER BY created DESC LIMIT :limit)"
        for name in STATES
        if state in (None, name)
    )
    found = db.execute(f"SELECT number FROM ({' UNION ALL '.join(each)}) ORDER BY created DESC LIMIT :limit", values)
    return json.dumps([r["number"] for r in found])


def rows(db: sqlite3.Connection, columns: str, numbers: str) -> list[sqlite3.Row]:
    where = "number IN (SELECT value FROM json_each(?)) ORDER BY created DESC"
    return db.execute(f"SELECT {columns} FROM turns WHERE {where}", (numbers,)).fetchall()


def rules(db: sqlite3.Connection, user: str | None) -> list[dict[str, Any]]:
    """The most frequent complaints about the newest answers: whose, which rule, how often, the newest turns with it."""
    numbers = newest(db, NEWEST, user=user)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows(db, "number, user, score, hints, hinted_by, prompt_tokens", numbers):
        hints = json.loads(row["hints"] or "[]") if row["score"] == -1 else []
        # If the hints are the user's own words, they are a complaint and its parts: count only the smallest parts. A
        # judge's hints are wordings of one rule: count only the first.
        smallest = [hint for hint in hints if not any(part != hint and part in hint for part in hints)]
        for hint in smallest if row["hinted_by"] == "own words" else hints[:1]:
            new = {"user": row["user"], "hint": hint, "times": 0, "numbers": []}
            rule = found.setdefault((row["user"], letters(hint)), new)
            rule["times"] += 1
            if row["prompt_tokens"] <= LONGEST_PROMPT:
                rule["numbers"] = [*rule["numbers"], row["number"]][:EXAMPLES]
    return sorted(found.values(), key=lambda rule: -rule["times"])[:TOP_RULES]
