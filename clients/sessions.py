"""Which turn does a request continue? Its messages show this. A session that the client names helps, but is not needed.

A client sends the whole conversation each time, often rewritten. But a turn is trained on with its own recorded prompt,
so it is enough to know which turn gave the last assistant message: turns are found by their answers.
"""

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise, takewhile
from typing import Any

from clients.quirks import (
    CARRIER,
    OWN_REQUESTS,
    SILENT,
    SPEAKING_TOOLS,
    is_automatic,
    is_filler,
    is_output,
    persons_words,
    without_marks,
)
from durable import journal

SHOWN = {"role": "user", "content": "[the client asked, and showed the answer]"}
RATES = {"role": "user", "content": "[rates the answer]"}
LATEST = 16  # how many of a request's last answers are looked up
MAX_ARGUMENTS, MAX_VALUES = 1 << 18, 4000  # characters and values in a call's arguments
NO_LETTERS = bytes(c for c in range(128) if not chr(c).isalnum())
SHORT = 8  # letters; a shorter answer is found only if the history, the session or the question also matches


def text_of(content: Any) -> str:
    """A message's content as text. It is a string, null, or a list of parts; a part without text becomes its JSON."""
    if isinstance(content, list):
        return "\n".join(
            p if isinstance(p, str) else str(p["text"]) if "text" in p else json.dumps(p, sort_keys=True)
            for p in content
        )
    return "" if content is None else str(content)


def role_of(message: dict) -> Any:
    """A message's role. A program's output that the client sends as a user message has the role of a tool's."""
    role = message.get("role")
    return "tool" if role == "user" and is_output(text_of(message.get("content"))) else role


def words_of(message: dict) -> str:
    """A message's text; of a user message only the person's words, without the text that the client put around them."""
    text = text_of(message.get("content"))
    return persons_words(text) if message.get("role") == "user" else text


def without_thinking(text: str) -> str:
    """The text after its <think> block, which clients don't send back. <think> itself may be in the prompt."""
    for mark in ("</think>", "[/THINK]"):
        text = text.rpartition(mark)[2]
    return text


def is_own_request(message: dict) -> bool:
    """Is this user or system message a request of the client's own?"""
    role = str(message.get("role"))
    if role == "user" and is_automatic(text_of(message.get("content"))):
        return True
    return role in OWN_REQUESTS and bool(OWN_REQUESTS[role].match(words_of(message)))


def was_shown(own: list[dict]) -> bool:
    """May the person have seen an answer to a client's own request? `own`: that request and the messages after it."""
    last = own[-1]
    said = last.get("role") == "assistant" and not SILENT.fullmatch(without_thinking(text_of(last.get("content"))))
    return said or any(name in SPEAKING_TOOLS for m in own for name, _ in calls_of(m))


def conversation(messages: list[dict]) -> list[dict]:
    """The messages that a client sends again unchanged: no system messages (agents put the time in them), no carrier,
    no user messages without a person's words, no filler. A program's output in a user message becomes a tool's.

    The client's own requests are left out with their answers. If the person was shown one, SHOWN replaces it, since
    their next message may be about that answer.
    """
    kept: list[dict] = []
    own: list[dict] = []  # the client's own request that we are in, and the messages after it
    filler = False  # was the message before this one Aider's?
    for m, following in pairwise([*messages, {}]):
        if filler or is_filler(m, following):
            filler = not filler
            continue
        text = text_of(m.get("content"))
        if m.get("role") in ("system", "developer") or text.startswith(CARRIER):
            continue
        if (role := role_of(m)) != m.get("role"):
            m = m | {"role": role}
        if m.get("role") == "user":
            if not words_of(m):  # empty, or all of it is the client's
                continue
            if text != (words := without_marks(text)):
                m = m | {"content": words}
            if own and was_shown(own):
                kept.append(SHOWN)
            own = []
        if own or is_own_request(m):
            own.append(m)
        else:
            kept.append(m)
    return kept


def last_request(messages: list[dict]) -> int | None:
    """Index of the last user message with words of a person, or of the last one if none has any. OpenClaw's carrier and
    programs' output don't count. None if there is none."""
    spoken = [
        i for i, m in enumerate(messages) if role_of(m) == "user" and not text_of(m.get("content")).startswith(CARRIER)
    ]
    return next((i for i in reversed(spoken) if words_of(messages[i])), spoken[-1] if spoken else None)


def request_of(messages: list[dict]) -> str:
    """The person's words in the last user message."""
    last = last_request(messages)
    return "" if last is None else words_of(messages[last])


def replied_to(messages: list[dict]) -> list[dict]:
    """A list with the one message that the answer replies to: a tool's output, or what the person said last; if there
    is neither, the last message. [] without messages."""
    last = last_request(messages)
    at = len(messages) - 1 if last is None or role_of(messages[-1]) == "tool" else last
    return messages[at : at + 1]


def asked_by_the_client(messages: list[dict]) -> bool:
    """Is this a request of the client's own (a title, a summary, a memory flush, a heartbeat)?"""
    last = last_request(messages)
    return any(is_own_request(m) for i, m in enumerate(messages) if i == last or m.get("role") == "system")


# ---- answers in a form that can be compared ----


def canonical(value: Any, budget: Iterator[int]) -> Any:
    """A tool call's arguments in a form that clients don't change: some write 1000 for 1e3 or "5" for 5, or leave out
    nulls. ValueError if there are more values than `budget` yields."""
    if next(budget, None) is None:
        raise ValueError("too many values")
    if isinstance(value, dict):
        return {k: canonical(v, budget) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [canonical(v, budget) for v in value]
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value)


def calls_of(message: dict) -> list[tuple[str, str]]:
    """(name, canonical arguments) of a message's tool calls."""
    calls: list[tuple[str, str]] = []
    for call in message.get("tool_calls") or [] if message.get("role") == "assistant" else []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            arguments = function.get("arguments") or {}
            with suppress(ValueError, RecursionError):  # not JSON, too deep or too large: compared as text
                if isinstance(arguments, str) and len(arguments) < MAX_ARGUMENTS:
                    arguments = json.loads(arguments)
                arguments = json.dumps(canonical(arguments, iter(range(MAX_VALUES))), sort_keys=True)
            calls.append((str(function.get("name")), str(arguments)))
    return calls


def with_calls(message: dict) -> str:
    """A message's words, and the names of the tools that it calls."""
    return " ".join([words_of(message), *[f"[calls {name}]" for name, _ in calls_of(message)]])


def letters(text: str) -> str:
    """Only letters and digits, in lower case: clients change the rest. A text without any of them is only stripped."""
    if text.isascii():  # the same, 50 times faster
        return text.encode().translate(None, NO_LETTERS).decode().lower() or text.strip()
    return re.sub(r"[\W_]+", "", text).casefold() or text.strip()


def asked_in(messages: list[dict]) -> str:
    """The beginning of the person's last message, letters and digits only."""
    return letters(request_of(messages)[:4000])[:200]


def answer_digest(*messages: dict) -> str:
    """The hash that an answer is found by: of its content without thinking, and its calls. `messages`: usually one."""
    content = letters("".join(without_thinking(text_of(m.get("content"))) for m in messages))
    calls = [call for m in messages for call in calls_of(m)]
    return hashlib.sha256(json.dumps([content, calls]).encode()).hexdigest()


def history_digests(talk: list[dict], at: set[int]) -> dict[int, str]:
    """Digest of talk[:k] for each k of `at`."""
    digest, found = hashlib.sha256(), {}
    for k, m in enumerate([*talk, {}]):
        if k in at:
            found[k] = digest.hexdigest()
        text = text_of(m.get("content"))
        text = without_thinking(text) if m.get("role") == "assistant" else text
        digest.update(json.dumps([m.get("role"), "".join(text.split()), calls_of(m)]).encode())
    return found


def unfinished(messages: list[dict]) -> list[dict]:
    """The assistant messages at the end: the text that the answer continues, after a "continue" button or with a
    prefill. Clients send both back as one answer, in one message or several, unless it is the beginning of thinking."""
    last = list(takewhile(lambda m: m.get("role") == "assistant", reversed(messages)))[::-1]
    text = "".join(text_of(m.get("content")) for m in last)
    return [] if "<think>" in text.rpartition("</think>")[2] else last


def keys_of(messages: list[dict]) -> dict[str, str]:
    """Fields by which a turn is found later, besides the digest of its answer: see `journal.Turn`."""
    talk = conversation(messages[: len(messages) - len(unfinished(messages))])
    return {"history": history_digests(talk, {len(talk)})[len(talk)], "asked": asked_in(talk)}


# ---- which turn a request continues ----


def find_turns(
    db: sqlite3.Connection, user: str, messages: list[dict], session: str | None = None
) -> list[tuple[sqlite3.Row, list[dict]]]:
    """The last two turns whose answers are in these messages, the later one first, each with the messages after it. Of
    [q1, a1, q2, a2, q3] these are the turn that answered a2, with [q3], and the turn that answered a1, with [q2].

    [] for a new conversation. If several turns have the same answer, the history before it decides, then the session
    (`session`, if the client names it; it contains a slash), then the person's question. If none of them does, that
    answer is left out.
    """
    talk = conversation(messages)
    # An answer is a run of assistant messages: some clients split text and calls into several.
    runs: list[tuple[int, int]] = []
    for k, m in enumerate(talk):
        if m.get("role") == "assistant":
            runs.append((runs.pop()[0] if runs and runs[-1][1] == k else k, k + 1))
    runs = runs[-LATEST:]
    history = history_digests(talk, {k for begin, end in runs for k in range(begin, end)})
    known = {session} if session else set()  # sessions that this conversation may belong to
    answered: list[tuple[int, list[sqlite3.Row], list[dict], bool]] = []
    for begin, end in reversed(runs):
        # The whole run, or one message of it.
        ways = [(begin, end), *[(k, k + 1) for k in reversed(range(max(begin, end - LATEST), end))]]
        for first, behind in ways:
            rows = journal.candidates(db, user, answer_digest(*talk[first:behind]), history[first], session)
            if session:  # no slash: a session that no client named
                rows = [r for r in rows if r["session"] == session or "/" not in r["session"]]
            if rows:
                following = talk[end : next((b for b, _ in runs if b >= end), len(talk))] if behind == end else []
                following = following[: following.index(SHOWN)] if SHOWN in following else following
                brief = is_brief(talk[first:behind])
                answered.append((first, rows, following, brief))
                if len(rows) == 1 and not brief:
                    known.add(rows[0]["session"])
                break
    found: list[tuple[sqlite3.Row, list[dict]]] = []
    for k, rows, following, brief in answered:
        rows = [r for r in rows if r["id"] not in [turn["id"] for turn, _ in found]]
        asked = asked_in(talk[:k])
        turn = decide(rows, history[k], known, asked, following)
        if turn is None and len(rows) == 1 and not brief:
            turn = rows[0]
        if turn is not None:
            found.append((turn, following))
            known.add(turn["session"])
        if len(found) == 2:
            break
    return found


def record_following(
    db: sqlite3.Connection, found: list[tuple[sqlite3.Row, list[dict]]], side: bool, done: bool
) -> list[str]:
    """Record a request as the next message of the turn that it continues. Returns the ids of turns that are to be
    judged. `found`: by `find_turns`; `side`: not a person's request; `done`: no other next message will come.

    For the turn before it, the next message is taken from this request's history, because what was recorded may have
    been the client's own request. Only the history shows what stayed in the conversation."""
    to_judge: list[str] = []
    for k, (turn, following) in enumerate(found):
        kept = k > 0
        if not following or (side and not kept):
            continue
        confirmed = kept or done
        if is_news(turn, following, kept):
            if journal.record_next(db, turn["id"], following, confirmed):
                to_judge.append(turn["id"])
        elif confirmed and not turn["confirmed"]:
            journal.confirm(db, turn["id"])
    return to_judge


def find_rated(db: sqlite3.Connection, user: str, messages: list[dict]) -> str | None:
    """Id of the turn whose answer is the last of these messages; None if there is none."""
    found = find_turns(db, user, [*messages, RATES])
    return next((turn["id"] for turn, following in found if following == [RATES]), None)


def spoken(messages: list[dict], roles: tuple[str, ...] = ("user", "tool")) -> str:
    """The words of the messages with these roles, in a form that can be compared."""
    return " ".join(re.findall(r"\w+", " ".join(words_of(m) for m in messages if m.get("role") in roles).casefold()))


def is_brief(answer: list[dict]) -> bool:
    said = letters("".join(without_thinking(text_of(m.get("content"))) for m in answer))
    return len(said) < SHORT and not any(map(calls_of, answer))


def decide(
    rows: list[sqlite3.Row], history: str, known: set[str], asked: str, following: list[dict]
) -> sqlite3.Row | None:
    """Which of several turns with the same answer belongs to a history? None if unknown. `rows`: newest first."""
    fits = [r for r in rows if r["history"] == history] or [r for r in rows if r["session"] in known]
    if not fits:
        fits = [r for r in rows if asked and r["asked"] and (asked in r["asked"] or r["asked"] in asked)]
        if len({r["history"] for r in fits}) > 1:
            return None
    # If equal requests got equal answers: prefer a turn of this session, then the newest that still waits or that has
    # this reply already (it is sent again), then the newest.
    fits = [r for r in fits if r["session"] in known] or fits
    reply = spoken(following) if len(fits) > 1 else ""

    def has_it(r: sqlite3.Row) -> bool:
        known = r["next_messages"] if reply and r["history"] == history else None
        return known is not None and spoken(json.loads(known)) == reply

    return next((r for r in fits if r["state"] == "waiting" or has_it(r)), fits[0] if fits else None)


def is_news(turn: sqlite3.Row, following: list[dict], kept: bool) -> bool:
    """Does this change the turn's recorded next message? `kept`: the conversation has continued since, and the message
    comes from the history, where it may have lost the text that a client put around it, and tools' outputs."""
    if not turn["next_messages"]:
        return True
    roles = ("user",) if kept else ("user", "tool")
    known, new = (spoken(messages, roles) for messages in (json.loads(turn["next_messages"]), following))
    return not turn["confirmed"] and known != new and not (kept and f" {new} " in f" {known} ")
