"""Which answer does a request go on from? Read off its messages alone: clients need not help.

A client sends the whole conversation each time, so a request that continues an answer begins with the messages that
the answer was given to, then holds the answer, then what came next. What real clients change on the way (OpenClaw most
of all) is allowed for here, and only that.
"""

import hashlib
import json
import re
import sqlite3
from contextlib import suppress
from typing import Any

import journal

# OpenClaw appends this user message to each request and takes it away again before the next.
CARRIER = "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>"


def text_of(content: Any) -> str:
    """A message's content as text: a string, null, or a list of parts (one that is no text stands as its JSON)."""
    if isinstance(content, list):
        return "\n".join(
            p if isinstance(p, str) else str(p["text"]) if "text" in p else json.dumps(p, sort_keys=True)
            for p in content
        )
    return "" if content is None else str(content)


def without_thinking(text: str) -> str:
    """The text after its <think> block; clients strip it on the way back. Some templates open it in the prompt."""
    return re.sub(r"^.*</think>", "", text, flags=re.DOTALL)


def conversation(messages: list[dict]) -> list[dict]:
    """The messages that a client sends again unchanged: no system text (agents put the clock in it), no carrier."""
    return [
        m
        for m in messages
        if m.get("role") not in ("system", "developer") and not text_of(m.get("content")).startswith(CARRIER)
    ]


def last_request(messages: list[dict]) -> int | None:
    """Index of the last message in which the person speaks."""
    spoken = [m.get("role") == "user" and not text_of(m.get("content")).startswith(CARRIER) for m in messages]
    return max((i for i, by_person in enumerate(spoken) if by_person), default=None)


def calls_of(message: dict) -> list[tuple[str, Any]]:
    """(name, arguments) of a message's tool calls as they survive a client, which rewrites ids and re-serialises."""
    calls = []
    for call in message.get("tool_calls") or []:
        function = (call.get("function") if isinstance(call, dict) else None) or {}
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):  # not JSON: compare it as the text it is
                arguments = json.loads(arguments)
        calls.append((str(function.get("name")), arguments))
    return calls


def fingerprints(messages: list[dict]) -> list[str]:
    """Digest of each prefix: entry k stands for messages[:k]. (len(messages) + 1,) hex strings."""
    digest = hashlib.sha256()
    prefixes = [digest.hexdigest()]
    for m in messages:
        text = text_of(m.get("content"))
        if m.get("role") == "assistant":
            text = without_thinking(text)
        digest.update(json.dumps([m.get("role"), " ".join(text.split()), calls_of(m)], sort_keys=True).encode())
        prefixes.append(digest.hexdigest())
    return prefixes


def letters(text: str) -> str:
    return "".join(filter(str.isalnum, text)).lower()


def named_values(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """The scalars in a tool call's arguments, each with the key it stands under."""
    if isinstance(value, dict):
        return [pair for k, v in value.items() for pair in named_values(v, k)]
    if isinstance(value, list):
        return [pair for v in value for pair in named_values(v)]
    return [(name, value)]


def echoes(message: dict, answer: str) -> bool:
    """Is this assistant message what a client makes of our raw answer text?

    A plain answer comes back as it was, but for its thinking and its whitespace. vLLM's parsers take tool calls out
    of the text in a dozen formats and clients re-serialise them, so there the content, each name and each
    argument behind its key must be found in the raw text, by letters and digits alone.
    """
    answer, content = without_thinking(answer), without_thinking(text_of(message.get("content")))
    calls = calls_of(message)
    if not calls:
        return content.split() == answer.split()
    raw = letters(answer)

    def found(name: str, value: Any) -> bool:
        # A model may write é or \u00e9, and an escaped newline leaves an n: any of the spellings will do.
        plain = value if isinstance(value, str) else json.dumps(value)
        spellings = (plain, json.dumps(value), json.dumps(value, ensure_ascii=False))
        return any(letters(name) + letters(spelling) in raw for spelling in spellings)

    return letters(content) in raw and all(
        letters(name) in raw and all(found(*pair) for pair in named_values(arguments)) for name, arguments in calls
    )


def find_continued(
    db: sqlite3.Connection, user: str, messages: list[dict]
) -> tuple[sqlite3.Row, list[dict]] | tuple[None, None]:
    """The turn that these messages go on from, and what followed it; (None, None) for a new conversation.

    A turn is continued when its request is a prefix of this one, followed by our answer and by a next message. The
    longest such prefix wins; among equal requests (two people say "hello") the answer decides.
    """
    talk = conversation(messages)
    prefixes = fingerprints(talk)
    answered = [k for k, m in enumerate(talk[:-1]) if m.get("role") == "assistant"]
    rows = journal.candidates(db, user, [prefixes[k] for k in answered]) if answered else []
    for k in reversed(answered):
        fits = [r for r in rows if r["digest"] == prefixes[k] and echoes(talk[k], r["text"])]
        if fits:
            # Equal requests got equal answers: one that still waits, then the tightest fit, then the newest.
            turn = min(fits, key=lambda r: (r["state"] != "waiting", len(without_thinking(r["text"])), -r["created"]))
            following = []
            for m in talk[k + 1 :]:
                if m.get("role") == "assistant":
                    break
                following.append(m)
            return (turn, following) if following else (None, None)
    return None, None
