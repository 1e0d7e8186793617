"""What became of each answer, read off the journal: the words, the verdict, the hint, the step.

python show.py --out=mine                    the last 20 answers; a running program is not disturbed
python show.py --out=mine --session=SESSION  one conversation, whole
"""

import argparse
import json
import sqlite3
import sys
import time
from pathlib import Path

from sessions import last_request, without_thinking, words_of

QUERY = "SELECT *, length(response_ids) / 4 AS tokens, length(prompt_ids) / 4 AS prompt FROM turns"


def one_line(text: str, width: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def said(message: dict) -> str:
    """A message as one line: its text, and the tools it calls."""
    calls = [f"[calls {c['function']['name']}]" for c in message.get("tool_calls") or []]
    return one_line(" ".join([words_of(message), *calls]))


def describe(row: sqlite3.Row) -> str:
    """One answer as five lines at most."""
    messages, following = json.loads(row["messages"]), json.loads(row["next_messages"] or "[]")
    last = last_request(messages)
    at = messages[-1] if messages and messages[-1].get("role") == "tool" else messages[last] if last is not None else {}
    lines = [
        f"{time.strftime('%F %T', time.localtime(row['created']))}  {row['session']}  ({row['user']})  "
        f"{row['prompt']} + {row['tokens']} tokens",
        f"  {at.get('role', '?'):<9} {said(at)}",
        f"  answer    {one_line(without_thinking(row['text']))}",
        *[f"  {m.get('role', '?'):<9} {said(m)}" for m in following],
    ]
    if row["score"] is not None:
        votes = " ".join(f"{v:+d}" for v in json.loads(row["votes"]))
        lines.append(f"  verdict   {row['score']:+d} by {row['source']} ({votes}; {row['confidence']:.0%} sure)")
        lines += [f"  hint      {one_line(hint)} ({row['hinted_by']})" for hint in json.loads(row["hints"])]
    became = f"trained on in step {row['step']}" if row["state"] == "trained" else row["state"]
    return "\n".join([*lines, f"  became    {became}{': ' + row['reason'] if row['reason'] else ''}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="the folder of the journal")
    parser.add_argument("--session", help="of one conversation, as printed here; all of it")
    args = parser.parse_args()
    path = Path(args.out) / "journal.db"
    if not path.exists():
        sys.exit(f"--out={args.out}: there is no journal.db in it")
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    db.row_factory = sqlite3.Row
    if args.session:
        rows = db.execute(f"{QUERY} WHERE session = ? ORDER BY created", (args.session,)).fetchall()
    else:
        rows = db.execute(f"{QUERY} ORDER BY created DESC LIMIT 20").fetchall()[::-1]
    if not rows:
        sys.exit(f"--session={args.session}: no such session" if args.session else "the journal is empty")
    print("\n\n".join(map(describe, rows)))


if __name__ == "__main__":
    main()
