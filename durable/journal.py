"""The durable log: one row for each answer that the server gave, with its state.

States: waiting (no next message yet) -> judging (it has one) -> queued (judged, waiting for the trainer) -> training ->
trained (at step N), or dropped (with a reason). Training uses the recorded token ids; text is only for people and the
judge, and is never tokenized again.

The program writes only from the event loop's thread, through `patiently` and one connection, so it needs no locks.
`prune` and `forget` (upkeep.py), which also write, and the page, which only reads, have their own connections.
"""

import asyncio
import json
import os
import shutil
import sqlite3
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from durable import pieces
from durable.errors import UsageError

NEXT = f"CASE WHEN next_messages NOT NULL THEN {pieces.as_list(pieces.ITEMS.format('next_messages'))} END"
# Turns are counted by user, state and kind: the reason of a drop, without the parts that vary from turn to turn.
KIND = "substr({0}.reason, 1, min(60, instr({0}.reason || ':', ':') - 1))"
for digit in "0123456789":
    KIND = f"replace({KIND}, '{digit}', '#')"
KIND = f"CASE {{0}}.state WHEN 'dropped' THEN {KIND} ELSE '' END"
OLD, NEW = KIND.format("old"), KIND.format("new")
COUNT_NEW = f"""INSERT INTO counters VALUES (new.user, new.state, {NEW}, 1)
  ON CONFLICT (user, state, kind) DO UPDATE SET n = n + 1;"""
COUNT_OLD = f"""UPDATE counters SET n = n - 1 WHERE (user, state, kind) = (old.user, old.state, {OLD});
  DELETE FROM counters WHERE (user, state, kind, n) = (old.user, old.state, {OLD}, 0);"""
SCHEMA = f"""{pieces.SCHEMA}
CREATE TABLE IF NOT EXISTS turns (
  number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, session TEXT NOT NULL, user TEXT NOT NULL, created REAL NOT NULL,
  state TEXT NOT NULL, step INTEGER, reason TEXT,  -- why it was dropped, or why its hint was not used
  answer TEXT NOT NULL, history TEXT NOT NULL, asked TEXT NOT NULL,  -- what it is found by, see Turn
  confirmed INTEGER NOT NULL DEFAULT 0,  -- the next message can't be replaced any more
  score INTEGER, votes TEXT, confidence REAL, hinted_by TEXT, judge TEXT, source TEXT,
  finish_reason TEXT, temperature REAL NOT NULL, no_rl TEXT NOT NULL, prompt_tokens INTEGER NOT NULL,
  template INTEGER,                  -- a piece: other fields in its prompt, such as tools, chat template arguments
  messages TEXT NOT NULL, prompt_ids TEXT NOT NULL,  -- lists of pieces, see pieces.py
  next_messages TEXT,                -- a list of pieces, not nested
  versions TEXT NOT NULL,            -- [[weight version, first token, end], ...]
  attempts INTEGER NOT NULL DEFAULT 0,  -- steps begun with it that were not finished
  hints TEXT, late_feedback TEXT NOT NULL DEFAULT '[]'  -- ratings that came too late to train on
);
-- The wide columns are in their own table, since each change of state rewrites a turn's row.
CREATE TABLE IF NOT EXISTS answers (
  number INTEGER PRIMARY KEY, text TEXT NOT NULL, response_ids BLOB NOT NULL, logprobs BLOB NOT NULL  -- packed
);
CREATE INDEX IF NOT EXISTS by_answer ON turns (user, answer, created);
CREATE INDEX IF NOT EXISTS by_history ON turns (user, answer, history, created);
CREATE INDEX IF NOT EXISTS by_state ON turns (state, created);
CREATE INDEX IF NOT EXISTS by_session ON turns (session);
CREATE INDEX IF NOT EXISTS by_user ON turns (user, state, created);  -- for the page
CREATE VIEW IF NOT EXISTS readable AS SELECT
  id, session, user, created, state, step, reason, answer, history, asked, confirmed,
  {pieces.as_list(pieces.NESTED.format("messages"))} AS messages, text, {NEXT} AS next_messages,
  score, votes, confidence, hints, hinted_by, judge, source, attempts, late_feedback,
  finish_reason, temperature, no_rl, versions,
  (SELECT data FROM pieces WHERE pieces.id = template) AS template, prompt_tokens, prompt_ids, response_ids, logprobs
  FROM turns JOIN answers USING (number);
CREATE INDEX IF NOT EXISTS by_step ON turns (user, step) WHERE state = 'trained';
CREATE TABLE IF NOT EXISTS counters (
  user TEXT, state TEXT, kind TEXT, n INTEGER, PRIMARY KEY (user, state, kind)
) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS came AFTER INSERT ON turns BEGIN {COUNT_NEW} END;
CREATE TRIGGER IF NOT EXISTS went AFTER DELETE ON turns BEGIN {COUNT_OLD} END;
CREATE TRIGGER IF NOT EXISTS changed AFTER UPDATE OF state, reason ON turns BEGIN {COUNT_OLD} {COUNT_NEW} END;
CREATE TABLE IF NOT EXISTS checkpoints (  -- an owner's highest step is their current one
  owner TEXT NOT NULL, step INTEGER NOT NULL, PRIMARY KEY (owner, step)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS model (  -- one row: the model that gave the answers; adapters: shared or user
  folder TEXT NOT NULL, fingerprint TEXT NOT NULL, adapters TEXT NOT NULL
);
"""

FORMAT = 8  # of the tables, in the file's user_version
AS_JSON = ("messages", "template", "versions")  # columns of `readable` to decode for a Turn
AS_BYTES = {"response_ids": np.int32, "logprobs": np.float32}
LOOKED_AT = 2000  # queued turns that are considered for a batch
ALONE_AFTER = 2  # failed steps after which a turn is trained on alone, and blamed for the next failure
DEATHS = 5  # steps in which the program may die before the turn is blamed: something else may have killed it
RESERVE = 64 << 20  # bytes of disk space kept for verdicts and SQLite's own work; see `has_disk_space`


@dataclass(frozen=True)
class Turn:
    """One answer from the engine. Later only `answer` may change, and `prune` removes the texts and token ids."""

    id: str  # the completion id the client sees; "/k" is added for choice k > 0
    session: str
    user: str  # whose API key
    messages: list[dict]
    template: dict
    answer: str  # sessions.answer_digest of the answer that the client was sent
    history: str  # digest of `messages`
    asked: str  # the beginning of the person's last message in them, letters and digits only
    text: str
    finish_reason: str | None
    prompt_ids: list[int]  # (P,) exactly as the engine got them
    response_ids: list[int]  # (T,) exactly as sampled, with the stop token
    logprobs: list[float]  # (T,) of the sampler, after temperature
    versions: list[tuple[int, int, int]]  # (weight version, first token, end), covering 0..T
    temperature: float
    no_rl: str = ""  # why its score can't be trained on (log-probs not of the plain policy); its hint still can
    created: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        ids, logprobs = len(self.response_ids), len(self.logprobs)
        spans = sum(end - start for _, start, end in self.versions)
        if not ids == logprobs == spans:
            raise ValueError(f"turn {self.id}: {ids} ids, {logprobs} logprobs, {spans} tokens in version spans")


@dataclass(frozen=True)
class Verdict:
    """What the next message, or a user's rating, says about an answer."""

    score: int  # +1 good, -1 bad, 0 neutral
    votes: list[int]
    confidence: float  # the judge's probability of this score, or the score's share of the votes
    hints: list[str]  # candidates: what should have been done; once trained on, the one that was used comes first
    hinted_by: str  # "judge"; "own words" (the user's, in feedback or with a small model's judge); "" without hints
    judge: str  # the judge's model name ("policy" for the small model's head); the user's name for explicit feedback
    source: str  # "judge" | "feedback"


@dataclass(frozen=True)
class Sample:
    """A judged turn, ready for the trainer."""

    turn: Turn
    verdict: Verdict
    from_tool: bool  # the next message was a tool's output


def open_journal(path: Path) -> sqlite3.Connection:
    """Open or create the log. Only its owner can read the file and the others that SQLite puts next to it.

    UsageError if it can't be used: no permission, another format, not a database.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite would create it with the umask's mode
        os.chmod(path, 0o600)
        db = sqlite3.connect(path, timeout=0, isolation_level=None)  # see `patiently`
        db.row_factory = sqlite3.Row
        # WAL with NORMAL: a commit survives kill -9 of this process; only a power cut may lose the last ones.
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("PRAGMA secure_delete=ON")  # overwrite deleted data
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] and found != FORMAT:
            raise UsageError(f"{path} has format {found}, this version reads and writes {FORMAT}: use another --out")
        if found != FORMAT:
            try:
                db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;")
            except sqlite3.Error:
                db.close()  # with its transaction
                raise
    except (OSError, sqlite3.Error) as e:
        raise UsageError(f"{path}: {e}") from e
    return db


told_at = 0.0  # when `patiently` last reported that the journal is locked, time.monotonic()


async def patiently(write: Callable, db: sqlite3.Connection, *args: Any) -> Any:
    """write(db, *args) in its own transaction. While another connection has the journal locked, this waits without
    blocking the event loop, so serving continues."""
    global told_at
    begun = time.monotonic()
    while True:
        try:
            db.execute("BEGIN IMMEDIATE")
            break
        except sqlite3.OperationalError as e:
            if e.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:  # the higher bits say which kind of busy
                raise
        if time.monotonic() - begun > 2 and time.monotonic() - told_at > 60:
            told_at = time.monotonic()
            print("another program has the journal open for writing: waiting for it to finish", file=sys.stderr)
        await asyncio.sleep(0.05)
    with db:
        return write(db, *args)


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All or nothing. Inside another transaction, the block is a part of that one."""
    if db.in_transaction:
        yield
    else:
        with db:
            db.execute("BEGIN")
            yield


def has_disk_space(db: sqlite3.Connection) -> bool:
    """Is there disk space for more turns? Checked before an answer is generated, as it must be recorded."""
    return shutil.disk_usage(db.execute("PRAGMA database_list").fetchone()["file"]).free > RESERVE


def record_turn(db: sqlite3.Connection, turn: Turn, dropped: str | None = None) -> None:
    """Record an answer, before its last byte is sent. `dropped`: why it can't be trained on, if that is known now."""
    row = vars(turn) | {"state": "dropped" if dropped else "waiting", "reason": dropped}
    row |= {"prompt_tokens": len(turn.prompt_ids), "versions": json.dumps(turn.versions)}
    row |= {name: pieces.packed(np.asarray(row[name], dtype).tobytes()) for name, dtype in AS_BYTES.items()}
    with transaction(db):
        row["messages"] = pieces.put_list(db, pieces.put_texts(db, turn.messages))
        row["prompt_ids"] = pieces.put_tokens(db, turn.prompt_ids)
        (row["template"],) = pieces.put(db, [pieces.as_json(turn.template)])
        answer = [row.pop(name) for name in ("text", "response_ids", "logprobs")]
        marks = ", ".join("?" * len(row))
        number = db.execute(f"INSERT INTO turns ({', '.join(row)}) VALUES ({marks})", list(row.values())).lastrowid
        db.execute("INSERT INTO answers VALUES (?, ?, ?, ?)", (number, *answer))


def record_answer(db: sqlite3.Connection, turn_id: str, answer: str) -> None:
    """Record the digest of the answer that the client is sent, if it differs from the digest of the text."""
    db.execute("UPDATE turns SET answer = ? WHERE id = ?", (answer, turn_id))


def candidates(
    db: sqlite3.Connection, user: str, answer: str, history: str, session: str | None = None
) -> list[sqlite3.Row]:
    """The newest turns of this user with this answer, newest first; only those of this session, if there are any, or
    else only those with this history, if there are any.

    Bounded: some answers ("OK.") occur thousands of times.
    """
    select = f"SELECT id, session, history, asked, state, {NEXT} AS next_messages, confirmed FROM turns WHERE"
    newest = "ORDER BY created DESC LIMIT"
    equal = f"SELECT number, session FROM turns WHERE user = ? AND answer = ? {newest} 256"
    own = f"{select} number IN (SELECT number FROM ({equal}) WHERE session = ?) {newest} 64"
    same = f"{select} user = ? AND answer = ? AND history = ? {newest} 8"
    return (
        (db.execute(own, (user, answer, session)).fetchall() if session else [])
        or db.execute(same, (user, answer, history)).fetchall()
        or db.execute(f"{select} user = ? AND answer = ? {newest} 64", (user, answer)).fetchall()
    )


def record_next(db: sqlite3.Connection, turn_id: str, next_messages: list[dict], confirmed: bool = False) -> bool:
    """The conversation continued from this turn: record the messages to judge it by, replacing any earlier ones.

    False if it is too late: a person rated the turn, it is in training or trained, dropped for good, or pruned (then it
    has no template)."""
    with transaction(db):
        done = db.execute(
            "UPDATE turns SET state = 'judging', reason = NULL, confirmed = ? WHERE id = ? AND "
            f"source IS NOT 'feedback' AND template NOT NULL AND {UNSETTLED}",
            (confirmed, turn_id),
        ).rowcount
        if done:
            following = pieces.as_json(pieces.put_texts(db, next_messages))
            db.execute("UPDATE turns SET next_messages = ? WHERE id = ?", (following, turn_id))
    return bool(done)


def confirm(db: sqlite3.Connection, turn_id: str) -> None:
    """Make the recorded next message final: no other one can replace it."""
    db.execute("UPDATE turns SET confirmed = 1 WHERE id = ?", (turn_id,))


def queued(db: sqlite3.Connection) -> list[sqlite3.Row]:
    """Judged turns that wait for the trainer, newest first, without texts and tokens. `newer`: how many newer ones the
    user has; `final`: no next message can replace the one that it was judged by.

    At most LOOKED_AT of them, which takes about 20 ms: the older ones come when these are trained on or dropped."""
    return db.execute(
        "SELECT id, user, session, attempts, hints, finish_reason, prompt_tokens, versions, confirmed OR "
        "source = 'feedback' AS final, row_number() OVER (PARTITION BY user ORDER BY created DESC) - 1 AS newer "
        "FROM (SELECT * FROM turns WHERE state = 'queued' ORDER BY created DESC LIMIT ?) ORDER BY created DESC",
        (LOOKED_AT,),
    ).fetchall()


NEUTRAL = "neutral: the next message says nothing about the answer"
NO_REPLY = "no next message came"
SESSION_OVER = "the session is over, by its header"
LEFT_OUT = "left out by hand"
UNTRAINED = "this key is not trained on"
UNREADABLE = "its row is damaged"
NOTHING_TO_LEARN = "nothing to learn from"
NO_HINT = NOTHING_TO_LEARN + ": there is no hint, and the score can't be trained on"
# SQL: the newest weight version in a turn's answer
ANSWERED_BY = "(SELECT MAX(json_extract(value, '$[0]')) FROM json_each(versions))"
UNDONE = "generated by weights that were undone"
REVIVABLE = (NEUTRAL, NO_REPLY, SESSION_OVER, NO_HINT)  # turns dropped for these reasons can still be judged or rated
# SQL: a turn that is not in training, trained on or dropped for good
UNSETTLED = "(state IN ('waiting', 'judging', 'queued') OR state = 'dropped' AND reason IN ({}))".format(
    ", ".join("'" + reason.replace("'", "''") + "'" for reason in REVIVABLE)
)


def record_verdict(db: sqlite3.Connection, turn_id: str, verdict: Verdict, following: list[dict] | None = None) -> str:
    """Record the verdict. Returns the turn's new state: queued or dropped; "" if the verdict is not recorded.

    A person's feedback overrides the judge, whichever comes first; the judge's hints stay if a bad rating comes without
    words. `following`: the messages that the judge read; nothing is recorded if others have replaced them meanwhile.
    ValueError if feedback comes too late: the turn is in training or trained, dropped for good, or pruned.
    """
    with transaction(db):
        select = f"SELECT *, {NEXT} AS following, {UNSETTLED} AS unsettled FROM turns WHERE id = ?"
        known = db.execute(select, (turn_id,)).fetchone()
        if known is None or verdict.source == "judge" and known["state"] not in ("waiting", "judging"):
            return ""
        if following is not None and json.loads(known["following"] or "[]") != following:
            return ""
        if not known["unsettled"] or known["template"] is None:
            raise ValueError(f"{turn_id} is {known['state']}" + (f" ({known['reason']})" if known["reason"] else ""))
        if verdict.source == "feedback" and verdict.score < 0 and not verdict.hints and known["hints"]:
            verdict = replace(verdict, hints=json.loads(known["hints"]), hinted_by=known["hinted_by"])
        why_not = None if verdict.hints else NEUTRAL if not verdict.score else NO_HINT if known["no_rl"] else None
        new = vars(verdict) | {"state": "dropped" if why_not else "queued", "reason": why_not}
        new |= {name: json.dumps(new[name]) for name in ("votes", "hints")}
        db.execute(
            f"UPDATE turns SET {', '.join(f'{name} = ?' for name in new)} WHERE id = ?", (*new.values(), turn_id)
        )
    return new["state"]


def keep_late_feedback(db: sqlite3.Connection, turn_id: str, feedback: dict) -> None:
    """Record a rating that came too late to train on."""
    db.execute(
        "UPDATE turns SET late_feedback = json_insert(late_feedback, '$[#]', json(?)) WHERE id = ?",
        (json.dumps(feedback), turn_id),
    )


THESE = "id IN (SELECT value FROM json_each(?))"  # one statement for a batch: all of it or nothing


def begin_step(db: sqlite3.Connection, turn_ids: list[str]) -> list[Sample]:
    """Put those turns that are still queued into training. Returns their samples, with their current verdicts: no
    feedback or next message can change them now. Turns whose rows are damaged are dropped."""
    with transaction(db):
        begin = "UPDATE turns SET state = 'training', attempts = attempts + 1 WHERE state = 'queued' AND id = ?"
        samples = []
        for turn_id in [i for i in turn_ids if db.execute(begin, (i,)).rowcount]:
            try:
                samples.append(load_sample(db, turn_id))
            except KeyError:
                drop(db, [turn_id], UNREADABLE)
        return samples


def requeue(db: sqlite3.Connection, error: str, most: int = ALONE_AFTER) -> None:
    """Requeue the turns in training, after their step failed or the program died in it. A turn with more than `most`
    unfinished steps is dropped as the likely cause."""
    with transaction(db):
        why_not = f"set aside, since training fails on it: {error}"
        drop_where(db, why_not, "state = 'training' AND attempts > ?", most)
        db.execute("UPDATE turns SET state = 'queued' WHERE state = 'training'")


def leave_step(db: sqlite3.Connection) -> None:
    """At a clean stop: queue turns in training again. This doesn't count as a failed attempt."""
    db.execute("UPDATE turns SET state = 'queued', attempts = attempts - 1 WHERE state = 'training'")


def mark_trained(db: sqlite3.Connection, turn_ids: list[str], step: int) -> None:
    """Provisional until there is a checkpoint of this step or a later one: see `recover`."""
    db.execute(
        f"UPDATE turns SET state = 'trained', step = ?, attempts = 0 WHERE {THESE}", (step, json.dumps(turn_ids))
    )


def drop_where(db: sqlite3.Connection, reason: str, where: str, *values: Any) -> int:
    """Drop the turns that fulfil a condition in SQL, with these values for its parameters. Returns how many."""
    return db.execute(f"UPDATE turns SET state = 'dropped', reason = ? WHERE {where}", (reason, *values)).rowcount


def drop(db: sqlite3.Connection, turn_ids: list[str], reason: str) -> None:
    drop_where(db, reason, THESE, json.dumps(turn_ids))


def drop_newer(db: sqlite3.Connection, owner: str, step: int, since: float) -> None:
    """Drop the answers that an owner's weights of later steps gave: those weights were undone. `since`: when the
    program started. Earlier answers by later steps are kept: a kill, not an undo, lost those weights."""
    newer = f"(? = '' OR user = ?) AND {UNSETTLED} AND created >= ? AND {ANSWERED_BY} > ?"
    drop_where(db, UNDONE, newer, owner, owner, since, step)


def leave_out(db: sqlite3.Connection, session: str, user: str | None) -> int:
    """Drop a conversation's turns that are not in training or trained. `user`: None for any. Returns how many."""
    theirs = f"session = ? AND (? IS NULL OR user = ?) AND {UNSETTLED}"
    return drop_where(db, LEFT_OUT, theirs, session, user, user)


def owner_of(db: sqlite3.Connection, user: str) -> str:
    """Whose weights answer this user: their own name with --adapters=user, otherwise "" for the shared ones."""
    return user if db.execute("SELECT 1 FROM model WHERE adapters = 'user'").fetchone() else ""


def checkpoints(db: sqlite3.Connection, owner: str) -> list[int]:
    """The steps of an owner's checkpoints, the current one last."""
    return [r["step"] for r in db.execute("SELECT step FROM checkpoints WHERE owner = ? ORDER BY step", (owner,))]


def saved_step(db: sqlite3.Connection, owner: str) -> int:
    """The step of an owner's current checkpoint; 0: the starting weights."""
    return max(checkpoints(db, owner), default=0)


def listed(db: sqlite3.Connection) -> list[tuple[str, int]]:
    """Owner and step of all checkpoints."""
    return [tuple(row) for row in db.execute("SELECT owner, step FROM checkpoints").fetchall()]


def owners(db: sqlite3.Connection) -> dict[str, int]:
    """Owners with checkpoints -> the step of their current one."""
    return dict(db.execute("SELECT owner, MAX(step) FROM checkpoints GROUP BY owner").fetchall())


def add_checkpoint(db: sqlite3.Connection, owner: str, step: int, keep: int) -> None:
    """List a checkpoint: turns trained on up to `step` are then trained for good. Only the newest `keep` checkpoints
    stay in the list.

    Call it when the folder is complete; folders that are not listed get removed."""
    with transaction(db):
        db.execute("INSERT OR IGNORE INTO checkpoints VALUES (?, ?)", (owner, step))
        for old in checkpoints(db, owner)[:-keep]:
            db.execute("DELETE FROM checkpoints WHERE owner = ? AND step = ?", (owner, old))


def recover(db: sqlite3.Connection) -> None:
    """At the start: queue the turns again that were trained on after the current checkpoints, since those weights are
    lost, and the turns that were in training."""
    with transaction(db):
        requeue(db, "the program died in the step", DEATHS)
        users = db.execute("SELECT DISTINCT user FROM counters WHERE state = 'trained'").fetchall()
        for (user,) in users:
            db.execute(
                # Otherwise SQLite would use by_state, and read every turn that was ever trained on.
                "UPDATE turns INDEXED BY by_step SET state = 'queued', step = NULL, reason = NULL "
                "WHERE state = 'trained' AND user = ? AND step > ?",
                (user, saved_step(db, owner_of(db, user))),
            )


def note(db: sqlite3.Connection, turn_id: str, reason: str) -> None:
    """Record in a turn's row why its hint is not used. Its score can still be trained on."""
    db.execute("UPDATE turns SET reason = ? WHERE id = ?", (reason, turn_id))


def put_first(db: sqlite3.Connection, turn_id: str, hint: str) -> None:
    """Put the hint that a turn was trained on before its other candidates."""
    hints = json.loads(row_of(db, turn_id)["hints"])
    db.execute("UPDATE turns SET hints = ? WHERE id = ?", (json.dumps(sorted(hints, key=hint.__ne__)), turn_id))


def expire(db: sqlite3.Connection, waited_s: float) -> int:
    """Drop turns that have waited for a next message for longer than this many seconds."""
    return drop_where(db, NO_REPLY, "state = 'waiting' AND created <= ?", time.time() - waited_s)


def in_state(db: sqlite3.Connection, state: str) -> list[str]:
    """Ids of the turns in a state, oldest first."""
    return [r["id"] for r in db.execute("SELECT id FROM turns WHERE state = ? ORDER BY created", (state,))]


def counts(db: sqlite3.Connection, user: str | None = None) -> dict[str, int]:
    """How many turns are in each state, of one user or of all."""
    return tally(db, "state", "?1 IS NULL OR user = ?1", user)


def drop_reasons(db: sqlite3.Connection, user: str | None = None) -> dict[str, int]:
    """How many turns were dropped for each kind of reason: its beginning, up to a colon, with # for digits."""
    return tally(db, "kind", "state = 'dropped' AND (?1 IS NULL OR user = ?1)", user)


def tally(db: sqlite3.Connection, what: str, where: str, user: str | None) -> dict[str, int]:
    return dict(db.execute(f"SELECT {what}, SUM(n) FROM counters WHERE {where} GROUP BY 1", (user,)).fetchall())


def load_turn(db: sqlite3.Connection, turn_id: str) -> tuple[Turn, list[dict]]:
    """The turn and the messages that followed it (empty while it waits). KeyError if there is no such turn."""
    return turn_of(db, r := row_of(db, turn_id)), json.loads(r["next_messages"] or "[]")


def load_sample(db: sqlite3.Connection, turn_id: str) -> Sample:
    """A judged turn with its verdict as it is now."""
    r = row_of(db, turn_id)
    from_tool = r["source"] == "judge" and json.loads(r["next_messages"])[-1]["role"] == "tool"
    return Sample(turn_of(db, r), verdict_of(r), from_tool)


def row_of(db: sqlite3.Connection, turn_id: str) -> sqlite3.Row:
    r = db.execute("SELECT * FROM readable WHERE id = ?", (turn_id,)).fetchone()
    if r is None:
        raise KeyError(turn_id)
    return r


def turn_of(db: sqlite3.Connection, r: sqlite3.Row) -> Turn:
    """The turn in a row of `readable`. KeyError if the stored data is damaged."""
    values = {f.name: r[f.name] for f in fields(Turn)}
    try:
        values |= {name: json.loads(r[name] or "{}") for name in AS_JSON}  # a pruned turn has no template
        values |= {name: np.frombuffer(pieces.unpacked(r[name]), dtype).tolist() for name, dtype in AS_BYTES.items()}
        values["prompt_ids"] = pieces.tokens_of(db, r["prompt_ids"])
        values["versions"] = [tuple(span) for span in values["versions"]]
        return Turn(**values)
    except (ValueError, TypeError, zlib.error) as e:
        raise KeyError(f"{r['id']} can't be read: {e}") from e


def verdict_of(r: sqlite3.Row) -> Verdict:
    """The verdict in the row of a judged turn."""
    values = {f.name: r[f.name] for f in fields(Verdict)}
    return Verdict(**values | {name: json.loads(r[name] or "[]") for name in ("votes", "hints")})
