"""Operations on a whole journal: lock, roll back, prune, forget.

`prune` and `forget` may run beside the program, on a connection of their own: they hold the lock for short writes only.
"""

import asyncio
import fcntl
import json
import os
import sqlite3
import stat
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from clients.sessions import asked_by_the_client, conversation, letters, text_of, without_thinking, words_of
from durable import checkpoint, journal, pieces
from durable.errors import InUse, UsageError
from durable.journal import THESE, checkpoints, owner_of, transaction

PORTION = 100  # rows in one write
MIN_LETTERS = 20  # a shorter text in another session is no evidence that it was copied from this one
LONG = 100  # two conversations that begin with the same message of this many letters are related
HEAD = 200  # letters of a text that are searched for: clients cut what they quote
COMMON = 3  # a text found in this many other sessions, as a whole message, is too common to be evidence

# SQL: the ids of all pieces that a turn refers to.
LIVE = """
WITH lists (id) AS (
  SELECT e.value FROM turns, json_each(messages) AS e UNION SELECT e.value FROM turns, json_each(prompt_ids) AS e
)
SELECT id FROM lists
UNION ALL SELECT e.value FROM lists JOIN pieces AS n USING (id), json_each(n.data) AS e
UNION ALL SELECT e.value FROM turns, json_each(next_messages) AS e
UNION ALL SELECT template FROM turns WHERE template NOT NULL
"""


def lock_out_dir(out: Path) -> TextIO:
    """Make the folder and lock it for this process, until the returned file is closed.

    UsageError if that can't be done, InUse if another run.py has it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (found := out.stat()).st_uid != os.geteuid() or found.st_mode & stat.S_ISVTX:
            raise UsageError(f"--out={out} is not yours alone, and others could read what is in it: use another --out")
        if stat.S_IMODE(found.st_mode) & 0o077:
            out.chmod(0o700)
            print(f"--out={out}: other users could read it; its mode is now 0700", flush=True)
        lock = open(out / "lock", "a+")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        print(os.getpid(), file=lock, flush=True)
    except BlockingIOError:
        lock.seek(0)
        raise InUse(
            f"--out={out} is in use by process {lock.readline().strip() or '?'}: stop it first, or use another --out"
        ) from None
    except OSError as e:
        raise UsageError(f"--out={out}: {e}") from e
    return lock


def bind_model(db: sqlite3.Connection, folder: Path, fingerprint: str, adapters: str) -> None:
    """Bind the journal to one model. UsageError if it is bound to another model or other --adapters, or if it is new
    but there are checkpoints."""
    if not journal.listed(db) and not db.execute("SELECT 1 FROM turns").fetchone():
        db.execute("DELETE FROM model")  # of a start that was refused, for example since the model was too large
    begun = db.execute("SELECT * FROM model").fetchone()
    if begun is None:
        out = Path(db.execute("PRAGMA database_list").fetchone()["file"]).parent
        if list((out / "checkpoints").glob("**/step-*")):
            raise UsageError(
                f"{out} has checkpoints, but no journal that knows them: move them away, or use another --out"
            )
        db.execute("INSERT INTO model VALUES (?, ?, ?)", (str(folder.resolve()), fingerprint, adapters))
    elif begun["fingerprint"] != fingerprint:
        raise UsageError(
            f"this --out belongs to the model in {begun['folder']}, not {folder}: use that model, or another --out"
        )
    elif begun["adapters"] != adapters:
        raise UsageError(f"this --out was started with --adapters={begun['adapters']}: use that, or another --out")


def own_connection(path: Path) -> sqlite3.Connection:
    """For upkeep beside the program: it waits for the lock, and SQLite's temporary tables never reach the disk."""
    db = journal.open_journal(path)
    db.execute("PRAGMA busy_timeout = 60000")
    db.execute("PRAGMA temp_store = MEMORY")
    return db


def check_owner(db: sqlite3.Connection, user: str) -> str:
    """The owner of the weights that a command is about. UsageError if --user is missing or can't be used."""
    if bool(user) != bool(owner_of(db, "anybody")):
        missing = "give --user: this --out has one adapter per user"
        raise UsageError("--user can't be used: all users share one model" if user else missing)
    talked = db.execute("SELECT 1 FROM counters WHERE user = ?", (user,)).fetchone()
    if user and not talked and not checkpoints(db, user):
        raise UsageError(f"--user={user}: nobody of that name has talked here")
    return user


def check_step(db: sqlite3.Connection, owner: str, step: int) -> None:
    """UsageError if there is no checkpoint of this step (0: the starting weights)."""
    if step not in (known := [0, *checkpoints(db, owner)]):
        raise UsageError(f"--step={step}: there are checkpoints of the steps {', '.join(map(str, known))}")


def rollback(db: sqlite3.Connection, owner: str, step: int) -> int:
    """Make the checkpoint of `step` (0: the starting weights) the current one. Turns that later steps were trained on,
    and answers that later weights gave, are dropped; returns their number. UsageError if there is no such checkpoint.
    """
    check_step(db, owner, step)
    with transaction(db):
        db.execute("DELETE FROM checkpoints WHERE owner = ? AND step > ?", (owner, step))
        undone = (
            "(? = '' OR user = ?) AND (state = 'trained' AND step > ? OR "
            f"(state = 'training' OR {journal.UNSETTLED}) AND {journal.ANSWERED_BY} > ?)"
        )
        return journal.drop_where(db, f"undone by a rollback to step {step}", undone, owner, owner, step, step)


def rolled_back(step: int, undone: int) -> str:
    """What to tell the admin after a `rollback`."""
    return f"step {step} is now current; {undone} turns from after it were dropped"


# ---- pieces that nothing refers to ----


def in_portions(db: sqlite3.Connection, ids: list[str] | list[int], *statements: str) -> None:
    """Run statements with `IN (SELECT value FROM json_each(?))` for a few ids at a time, so that others can write."""
    for k in range(0, len(ids), PORTION):
        with transaction(db):
            for statement in statements:
                db.execute(statement, (pieces.as_json(ids[k : k + PORTION]),))
        time.sleep(0.01)


def sweep(db: sqlite3.Connection) -> None:
    """Delete the pieces that no turn refers to.

    A running program may use such a piece again for a new turn. So its hash, by which it is found, is removed first;
    then it is checked once more."""
    for dead, statement in (
        ("hash NOT NULL", f"UPDATE pieces SET hash = NULL WHERE {THESE}"),
        ("hash IS NULL", f"DELETE FROM pieces WHERE {THESE}"),
    ):
        found = db.execute(f"SELECT id FROM pieces WHERE {dead} AND id NOT IN ({LIVE})").fetchall()
        in_portions(db, [r["id"] for r in found], statement)


PRUNED = (
    "messages = '[]', prompt_ids = '[]', versions = '[]', template = NULL, next_messages = NULL, asked = '', "
    "hints = NULL, late_feedback = '[]'"
)
EMPTY = f"X'{pieces.packed(b'').hex()}'"
PRUNED_ANSWER = f"text = '', response_ids = {EMPTY}, logprobs = {EMPTY}"


def prune(path: Path, days: float) -> int:
    """Delete texts and token ids of finished turns older than `days`: dropped ones, and those trained on no later than
    the oldest checkpoint that is kept. Verdict, state and reason stay. Returns their number."""
    with closing(own_connection(path)) as db:
        found = db.execute(
            "SELECT id FROM turns WHERE created < ? AND template NOT NULL AND "
            "(state = 'dropped' OR state = 'trained' AND step <= (SELECT MIN(step) FROM checkpoints WHERE owner = "
            "(CASE (SELECT adapters FROM model) WHEN 'user' THEN user ELSE '' END)))",
            (time.time() - days * 86400,),
        ).fetchall()
        # A person may have rated one of them since, so that it is queued again.
        these = f"template NOT NULL AND state IN ('dropped', 'trained') AND {THESE}"
        in_portions(
            db,
            [r["id"] for r in found],
            f"UPDATE answers SET {PRUNED_ANSWER} WHERE number IN (SELECT number FROM turns WHERE {these})",
            f"UPDATE turns SET {PRUNED} WHERE {these}",
        )
        if found:
            sweep(db)
    return len(found)


# ---- background tasks of the running program ----


async def expire_turns(db: sqlite3.Connection, seconds: float) -> None:
    """Drop answers that got no next message for this time. Sleeps first, so downtime doesn't count."""
    await asyncio.sleep(seconds)
    while True:
        if journal.has_disk_space(db):
            await journal.patiently(journal.expire, db, seconds)
        await asyncio.sleep(min(60.0, seconds))


async def prune_turns(db: sqlite3.Connection, path: Path, days: float) -> None:
    """At the start and every hour, `prune`; if days is 0, never. In a thread, since it may take long."""
    while days:
        if journal.has_disk_space(db):
            try:
                await asyncio.to_thread(prune, path, days)
            except sqlite3.Error as e:
                print(f"pruning failed, next try in an hour: {e}", file=sys.stderr)
        await asyncio.sleep(3600)


# ---- forget ----


def said_in(messages: list[dict]) -> list[str]:
    """The messages of a person and the model, letters only, without a client's own requests and system messages."""
    talk = [m for m in conversation(messages) if m.get("role") in ("user", "assistant")]
    return [letters(words_of(m) if m["role"] == "user" else without_thinking(text_of(m.get("content")))) for m in talk]


@dataclass
class SessionTexts:
    """The texts of a session, as their letters."""

    answers: set[str]
    said: set[str]  # whole messages of the person and the model, and the answers
    openings: set[str]  # the first two messages and the first answer; empty if the client itself asked
    all: list[str]  # all its messages, also the client's own requests; interned, since many sessions share them


def texts_of(db: sqlite3.Connection, session: str) -> SessionTexts:
    def messages(rows: str, order: str) -> list[dict]:
        found = db.execute(
            f"SELECT p.data FROM turns, {rows} WHERE session = ? GROUP BY p.id ORDER BY MIN(number), {order}",
            (session,),
        )
        return [json.loads(r["data"]) for r in found]

    # In the conversation's order. Ids don't give it: a piece that another session stored first has too low an id.
    sent = messages(pieces.NESTED.format("messages"), "MIN(l.key), MIN(e.key)")
    sent += messages(pieces.ITEMS.format("next_messages"), "MIN(e.key)")
    texts = db.execute(
        "SELECT text FROM turns JOIN answers USING (number) WHERE session = ? ORDER BY created", (session,)
    )
    answers, talk = [letters(without_thinking(r["text"])) for r in texts], said_in(sent)
    every = [sys.intern(letters(text_of(m.get("content")))) for m in sent]
    openings = set() if asked_by_the_client(sent) else {*talk[:2], *answers[:1]}
    return SessionTexts(set(answers), {*talk, *answers}, openings, every)


def derived(db: sqlite3.Connection, session: str) -> dict[str, str]:
    """Other sessions of the same user that contain a text of this one (a title, a summary, the conversation after a
    compaction), and, transitively, sessions that contain answers of those. Returns the reason for each."""
    (user,) = db.execute("SELECT user FROM turns WHERE session = ? LIMIT 1", (session,)).fetchone()
    rows = db.execute("SELECT DISTINCT session FROM turns WHERE user = ? AND session != ?", (user, session))
    others = {r["session"]: texts_of(db, r["session"]) for r in rows.fetchall()}
    new, found = texts_of(db, session).said, {}
    while texts := {t for t in new if len(t) >= MIN_LETTERS}:
        rare = [t for t in texts if sum(t in other.said for other in others.values()) < COMMON]
        reasons = {name: why for name, other in others.items() if (why := why_derived(other, rare))}
        new = {answer for name in reasons for answer in others.pop(name).answers}
        found |= reasons
    return found


def why_derived(other: SessionTexts, texts: list[str]) -> str | None:
    for text in texts:
        if text in other.said:
            if len(text) >= LONG or text not in other.openings:
                return f"it has a message of {len(text)} letters in common"
        elif any(text[:HEAD] in said for said in other.all):
            return f"it quotes a text of {len(text)} letters"
    return None


def forget(path: Path, session: str = "", user: str = "") -> str:
    """Remove a conversation with everything derived from it, or all of a user with their adapter, for good. Returns
    what to tell the person."""
    column, value = ("session", session) if session else ("user", user)
    with closing(own_connection(path)) as db:
        found = db.execute(f"SELECT DISTINCT session, user FROM turns WHERE {column} = ?", (value,)).fetchall()
        owner = owner_of(db, user or (found[0]["user"] if found else ""))
        if not found and not (user and owner and checkpoints(db, owner)):
            if not empty_log(db):  # the log may be left from an earlier `forget`
                raise UsageError(STILL_READ)
            raise UsageError(f"--{column}={value}: there is no such {column} in the journal")
        why = {r["session"]: "as asked" for r in found} | (derived(db, session) if session else {})
        lines = [f"  {name}: {reason}" for name, reason in why.items()]
        if user and owner:
            db.execute("DELETE FROM checkpoints WHERE owner = ?", (owner,))
            checkpoint.remove_others(path.parent, journal.listed(db))
            checkpoint.forget_metrics(path.parent / "metrics.jsonl", owner)
            lines.append("the user's adapter is removed with all its checkpoints: nothing of them is left in weights")
        mine = "session IN (SELECT value FROM json_each(?))" + (" AND user = ?" if user else "")
        given = (pieces.as_json(list(why)), *([user] if user else []))
        turns = db.execute(f"SELECT id, state, step FROM turns WHERE {mine}", given).fetchall()
        trained = [r["step"] for r in turns if r["state"] == "trained"]
        if trained and not (user and owner):
            lines += what_remains(min(trained), checkpoints(db, owner))
        in_portions(
            db,
            [r["id"] for r in turns],
            f"DELETE FROM answers WHERE number IN (SELECT number FROM turns WHERE {THESE})",
            f"DELETE FROM turns WHERE {THESE}",
        )
        sweep(db)
        try:  # moved rows leave copies in unused parts of pages, which `secure_delete` does not overwrite
            db.execute("PRAGMA temp_store = FILE")  # the copy of what is kept may not fit into memory
            db.execute("VACUUM")
        except sqlite3.OperationalError as e:
            lines.append(f"unused parts of the file may still have text, until `sqlite3 {path} VACUUM` succeeds: {e}")
        if not empty_log(db):
            lines.append(STILL_READ)
    return "\n".join([f"{len(turns)} turns are removed", *lines])


def what_remains(first: int, kept: list[int]) -> list[str]:
    """What to say of turns that were trained on in the step `first`, and maybe later. `kept`: checkpoints' steps."""
    clean = [str(step) for step in kept if step < first]
    touched = [str(step) for step in kept if step >= first]
    return [
        f"these turns were used in the steps from {first} on. Their effect on weights, Adam's moments and the running "
        "means of rewards remains.",
        f"checkpoints that did not see it: {', '.join(clean) or 'only the start, step 0'} (rollback --step); "
        f"that did: {', '.join(touched) or 'none'}",
    ]


STILL_READ = (
    "the text is still in SQLite's log because another program reads the journal: close that program and run this again"
)


def empty_log(db: sqlite3.Connection, seconds: float = 10) -> bool:
    """Truncate SQLite's write-ahead log, which still has the old pages; False if a reader prevents it for `seconds`."""
    db.execute("PRAGMA busy_timeout = 200")
    deadline = time.monotonic() + seconds
    while db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
