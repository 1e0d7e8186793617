"""Look at the journal, and change it, from the command line.

python -m durable.admin show --out=mine                      the last 20 answers and what became of each
python -m durable.admin show --out=mine --session=SESSION    one conversation, whole
python -m durable.admin learned --out=mine                   what users complained about, and how often
python -m durable.admin rollback --out=mine --step=50        make the checkpoint of step 50 current again
python -m durable.admin forget --out=mine --session=SESSION  delete a conversation, or with --user=NAME all of a user's
python -m durable.admin export --out=mine --folder=mymodel   the trained model, as a Hugging Face folder
python -m durable.admin turns --out=mine                     all answers with their tokens and verdicts, as JSON lines
python -m durable.admin pause --out=mine                     pause training; likewise resume, and train: take a step now
python -m durable.admin key --out=mine --add=USER            print a new API key, once; --revoke=USER deletes theirs
"""

import json
import os
import sqlite3
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import httpx
import tyro

from clients import keys
from clients.sessions import replied_to, with_calls, without_thinking
from durable import checkpoint, journal, look, upkeep
from durable.errors import InUse, UsageError


def one_line(text: str, width: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def said(message: dict) -> str:
    """A message as one line: its role, its words, and the tools that it calls."""
    return f"  {message.get('role', '?'):<9} {one_line(with_calls(message))}"


def describe(row: sqlite3.Row) -> str:
    """One answer, in a few lines."""
    pruned = row["template"] is None
    messages, following = json.loads(row["messages"]), json.loads(row["next_messages"] or "[]")
    lines = [
        f"{time.strftime('%F %T', time.localtime(row['created']))}  {row['session']}  ({row['user']})  "
        f"{row['prompt_tokens']} + {sum(e - b for _, b, e in json.loads(row['versions']))} tokens",
        *map(said, replied_to(messages)),
        f"  answer    {'(removed, by --keep_days)' if pruned else one_line(without_thinking(row['text']))}",
        *map(said, following),
    ]
    if row["score"] is not None:
        votes = " ".join(f"{v:+d}" for v in json.loads(row["votes"]))
        lines.append(f"  verdict   {row['score']:+d} by {row['source']} ({votes}; {row['confidence']:.0%} sure)")
        lines += [f"  hint      {one_line(hint)} ({row['hinted_by']})" for hint in json.loads(row["hints"] or "[]")]
    for late in json.loads(row["late_feedback"]):
        lines.append(f"  too late  {late['score']:+d} {one_line(late['text'])}")
    became = f"trained on in step {row['step']}" if row["state"] == "trained" else row["state"]
    return "\n".join([*lines, f"  became    {became}{': ' + row['reason'] if row['reason'] else ''}"])


def printable(text: str) -> str:
    """Escape control characters and characters that change the text direction."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


# ---- the commands ----


@dataclass(frozen=True, kw_only=True)
class OfRun:
    out: str = "out"  # the --out of run.py

    def journal_file(self) -> Path:
        """UsageError if there is none, or it can't be read."""
        file = Path(self.out).expanduser() / "journal.db"
        if not os.access(file, os.R_OK):
            raise UsageError(f"--out={file.parent}: there is no journal.db in it, or it belongs to another user")
        return file.resolve()


class Reading(OfRun):
    """A command whose `read` gets the journal; it can't write."""

    def run(self) -> None:
        with closing(sqlite3.connect(f"{self.journal_file().as_uri()}?mode=ro", uri=True)) as db:
            db.row_factory = sqlite3.Row
            self.read(db)


class Changing(OfRun):
    """A command that the running program carries out. `alone`: what happens if none runs."""

    def run(self) -> None:
        file = self.journal_file()
        said = ask_program(file.parent, self)
        print(printable(self.alone(file) if said is None else said))

    def alone(self, file: Path) -> str:
        raise UsageError(f"no program is running with --out={file.parent}")


@dataclass(frozen=True, kw_only=True)
class Show(Reading):
    """Print the last 20 answers, or one conversation. Safe while the program runs."""

    session: str = ""  # of one conversation, as printed here; all of it

    def read(self, db: sqlite3.Connection) -> None:
        if self.session:
            rows = db.execute("SELECT * FROM readable WHERE session = ? ORDER BY created", (self.session,)).fetchall()
        else:
            ids = "SELECT id FROM turns WHERE number IN (SELECT value FROM json_each(?))"
            newest = look.newest(db, 20)
            rows = db.execute(f"SELECT * FROM readable WHERE id IN ({ids}) ORDER BY created", (newest,)).fetchall()
        if not rows:
            raise UsageError(f"--session={self.session}: no such session" if self.session else "the journal is empty")
        print(printable("\n\n".join(map(describe, rows))))


@dataclass(frozen=True, kw_only=True)
class Learned(Reading):
    """Print what users complained about, and how often. Safe while the program runs."""

    user: str = ""  # only what this user said

    def read(self, db: sqlite3.Connection) -> None:
        if not (found := look.rules(db, self.user or None)):
            raise UsageError("nobody has said what is wrong with an answer")
        for rule in found:
            print(printable(f"{rule['times']:>5} x  {one_line(rule['hint'])}  ({rule['user']})"))


@dataclass(frozen=True, kw_only=True)
class Rollback(Changing):
    """Make the checkpoint of a step the current one. The program may run."""

    step: int  # 0: the weights that training began from
    user: str = ""  # whose adapter, with --adapters=user

    def alone(self, file: Path) -> str:
        with upkeep.lock_out_dir(file.parent), closing(journal.open_journal(file)) as db:
            undone = upkeep.rollback(db, upkeep.check_owner(db, self.user), self.step)
            checkpoint.remove_others(file.parent, journal.listed(db))
        return upkeep.rolled_back(self.step, undone)


@dataclass(frozen=True, kw_only=True)
class Forget(Changing):
    """Delete a conversation and everything derived from it, or all of a user, for good. The program may run."""

    session: str = ""  # as `show` prints it
    user: str = ""  # all their conversations instead

    def run(self) -> None:
        if bool(self.session) == bool(self.user):
            raise UsageError("forget: give --session or --user")
        super().run()

    def alone(self, file: Path) -> str:
        with upkeep.lock_out_dir(file.parent):
            return upkeep.forget(file, self.session, self.user)


@dataclass(frozen=True, kw_only=True)
class Pause(Changing):
    """Pause training in the running program; it continues to serve and judge."""

    user: str = ""  # of this user's adapter alone, with --adapters=user


@dataclass(frozen=True, kw_only=True)
class Resume(Changing):
    """Resume training in the running program, after a pause or after an error that stopped it."""

    user: str = ""  # of this user's adapter alone


class Train(Changing):
    """Have the running program train on the turns that are judged by now, without waiting for a full batch."""


@dataclass(frozen=True, kw_only=True)
class Export(Reading):
    """Write the model of the last checkpoint as a plain Hugging Face folder, an adapter merged into it."""

    folder: str  # to write
    step: int = -1  # another checkpoint's; -1: the last
    user: str = ""  # whose adapter, with --adapters=user

    def read(self, db: sqlite3.Connection) -> None:
        from durable import model  # here, since torch and transformers take seconds, which `show` should not

        out, owner = self.journal_file().parent, upkeep.check_owner(db, self.user)
        if not (known := journal.checkpoints(db, owner)):
            raise UsageError(f"--out={out}: there is no checkpoint{f' of {owner}' if owner else ''} yet")
        step = known[-1] if self.step < 0 else self.step
        if step not in known:
            raise UsageError(f"--step={step}: there are checkpoints of the steps {', '.join(map(str, known))}")
        model.export(checkpoint.folder_of(out, owner, step), Path(self.folder).expanduser())
        print(f"{self.folder} has the model of step {step}")


@dataclass(frozen=True, kw_only=True)
class Turns(Reading):
    """Print every answer as a line of JSON: its prompt, tokens and log-probs, its verdict and what became of it."""

    since: str = ""  # answers from this day on, as 2026-01-31

    def read(self, db: sqlite3.Connection) -> None:
        try:
            begin = datetime.fromisoformat(self.since).timestamp() if self.since else 0.0
        except ValueError as e:
            raise UsageError(f"--since={self.since}: expected a day, as 2026-01-31") from e
        ids = db.execute("SELECT id FROM turns WHERE created >= ? AND template NOT NULL ORDER BY created", (begin,))
        for (turn_id,) in ids.fetchall():
            row = journal.row_of(db, turn_id)
            turn = asdict(journal.turn_of(db, row)) | {name: row[name] for name in ("state", "step", "reason")}
            turn["next_messages"] = json.loads(row["next_messages"] or "[]")
            turn["verdict"] = asdict(journal.verdict_of(row)) if row["score"] is not None else None
            print(json.dumps(turn))


@dataclass(frozen=True, kw_only=True)
class Key(OfRun):
    """Add or revoke an API key. It takes effect with the next request to a running program."""

    add: str = ""  # the user who gets a new key
    revoke: str = ""  # the user whose keys are removed

    def run(self) -> None:
        file = Path(self.out).expanduser() / "keys"
        if bool(self.add) == bool(self.revoke):
            raise UsageError("key: give --add=USER or --revoke=USER")
        if self.add:
            if not file.with_name("journal.db").exists():
                print(f"no program has run with --out={file.parent} yet; the key is in {file}", file=sys.stderr)
            print(keys.add(file, self.add))
        else:
            print(f"{keys.revoke(file, self.revoke)} keys of {self.revoke} are revoked")


Command = Show | Learned | Rollback | Forget | Pause | Resume | Train | Export | Turns | Key


def ask_program(out: Path, command: Changing) -> str | None:
    """Have the program with this --out carry out a command. None if no program runs; UsageError if it refuses."""
    try:
        upkeep.lock_out_dir(out).close()
        return None
    except InUse as e:
        _, *url = (out / "lock").read_text().split()  # process id, and the address once the program listens
        if not url:
            raise UsageError("the program is still starting, try again") from e
    body = {k: v for k, v in vars(command).items() if k != "out"}
    headers = {"Authorization": f"Bearer {(out / keys.ADMIN).read_text().strip()}"}
    address = f"{url[0].removesuffix('/v1')}/admin/{type(command).__name__.lower()}"
    try:  # it is this machine: no proxy, and no certificate needs checking
        reply = httpx.post(address, json=body, headers=headers, timeout=600, trust_env=False, verify=False)
    except httpx.HTTPError as e:
        raise UsageError(f"the program that runs with --out={out} does not answer at {address}: {e!r}") from e
    if reply.is_error:
        raise UsageError(reply.json()["error"]["message"])
    return reply.json()["done"]


if __name__ == "__main__":
    try:
        tyro.cli(Command, description=__doc__, use_underscores=True).run()
    except UsageError as e:
        sys.exit(str(e))
