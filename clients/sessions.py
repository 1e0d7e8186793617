"""Which answer does a request continue? Found from its messages alone: clients don't have to help.

A client sends the whole conversation each time. A request that continues an answer has the messages that the answer was
given to, then the answer, then what came next. Known changes that clients make (OpenClaw most of all) are accepted.
"""

import hashlib
import json
import re
import sqlite3
from collections.abc import Collection
from contextlib import suppress
from decimal import Decimal
from typing import Any

from durable import journal

# OpenClaw appends this user message to each request and takes it away again before the next.
CARRIER = "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>"
# How the last user message, or the system message, begins where OpenClaw itself asks, in a person's conversation or
# outside it. In the history of later requests a line in brackets replaces the words that it asked in.
OWN_REQUESTS = {
    "user": re.compile(
        r"\s*(\[[^\]\n]{0,40}\d\d:\d\d[^\]\n]{0,20}\] )?(Pre-compaction memory flush\.|Follow the heartbeat monitor|"
        r"Run the following periodic tasks \(only those due|A scheduled (reminder has been|cron event was) triggered|"
        r"An async command (you ran|completion event)|\[System\] |Refresh this session.s progress card now|"
        r"\[OpenClaw (heartbeat poll|exec completion|cron wake|session event)\])"
    ),
    "system": re.compile(r"\s*(Generate a concise session title|You are a context summarization assistant)"),
}
# Messages from a subagent, another session or a tool have this line in them.
ROUTED = re.compile(r"^\[Inter-session message\] .*isUser=false$", re.MULTILINE)
# Answers to those that no person is shown.
SILENT = re.compile(r"\W*(NO_REPLY\W*)*|\s*HEARTBEAT_OK.{0,300}|.{0,300}HEARTBEAT_OK\W*", re.DOTALL | re.IGNORECASE)
SPEAKING_TOOLS = ("message", "heartbeat_respond")  # with which it may have said something all the same
SHOWN = {"role": "user", "content": "[the client asked, and showed the answer]"}
# What OpenClaw writes around a person's words.
AROUND = re.compile(r"\A\[\w{3} \d{4}-\d\d-\d\d \d\d:\d\d [^\]\n]{1,40}\] |\n\nRuntime: agent=[^\n]*\Z")
NUMBER = r"(?<![\w.])-?\d{1,40}(?:\.\d{1,40})?(?:[eE][+-]?\d{1,3})?"


def text_of(content: Any) -> str:
    """A message's content as text: a string, null, or a list of parts (a part that is no text as its JSON)."""
    if isinstance(content, list):
        return "\n".join(
            p if isinstance(p, str) else str(p["text"]) if "text" in p else json.dumps(p, sort_keys=True)
            for p in content
        )
    return "" if content is None else str(content)


def words_of(message: dict) -> str:
    """A message's text; a person's own words, where an agent wrote the time and other things around them."""
    text = text_of(message.get("content"))
    return AROUND.sub("", text) if message.get("role") == "user" else text


def without_thinking(text: str) -> str:
    """The text after its <think> block; clients strip it on the way back. Some templates open it in the prompt."""
    return re.sub(r"^.*(</think>|\[/THINK\])", "", text, flags=re.DOTALL)


def is_own_request(message: dict) -> bool:
    role, text = str(message.get("role")), text_of(message.get("content"))
    return bool(role in OWN_REQUESTS and OWN_REQUESTS[role].match(text) or role == "user" and ROUTED.search(text))


def was_shown(own: list[dict]) -> bool:
    """Did a person perhaps see an answer to this request of the client's own? `own`: it, and what followed it."""
    said = own[-1].get("role") == "assistant" and not SILENT.fullmatch(
        without_thinking(text_of(own[-1].get("content")))
    )
    return said or any(name in SPEAKING_TOOLS for m in own for _, name, _ in calls_of(m))


def conversation(messages: list[dict]) -> list[dict]:
    """The messages that a client sends again unchanged: no system text (agents put the clock in it), no carrier.

    What the client itself asked in between is left out with its answers. Where the person was shown one, SHOWN replaces
    it, since the person's next message may be about that answer.
    """
    kept: list[dict] = []
    own: list[dict] = []  # a request of the client's own and what followed it, while we are in one
    for m in messages:
        if m.get("role") in ("system", "developer") or text_of(m.get("content")).startswith(CARRIER):
            continue
        if m.get("role") == "user":
            if own and was_shown(own):
                kept.append(SHOWN)
            own = []
        if own or is_own_request(m):
            own.append(m)
        else:
            kept.append(m)
    return kept


def last_request(messages: list[dict]) -> int | None:
    """Index of the last message in which the person speaks."""
    spoken = [m.get("role") == "user" and not text_of(m.get("content")).startswith(CARRIER) for m in messages]
    return max((i for i, by_person in enumerate(spoken) if by_person), default=None)


def request_of(messages: list[dict]) -> str:
    """What the person said last."""
    last = last_request(messages)
    return "" if last is None else words_of(messages[last])


def asked_by_the_client(messages: list[dict]) -> bool:
    """Is this a request of the client's own (a title, a summary, a memory flush, a heartbeat)?"""
    last = last_request(messages)
    return any(is_own_request(m) for i, m in enumerate(messages) if i == last or m.get("role") == "system")


def integral(number: str) -> int | float:
    value = float(number)
    return int(value) if value.is_integer() else value


def calls_of(message: dict) -> list[tuple[str, str, Any]]:
    """(id, name, arguments) of a message's tool calls; the arguments as they survive a client, which re-serialises."""
    calls: list[tuple[str, str, Any]] = []
    for call in message.get("tool_calls") or [] if message.get("role") == "assistant" else []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            arguments = function.get("arguments")
            if isinstance(arguments, str):
                with suppress(ValueError, RecursionError):  # not JSON: compare it as the text it is
                    arguments = json.loads(arguments, parse_float=integral)
            calls.append((str(call.get("id") or f"#{len(calls)}"), str(function.get("name")), arguments))
    return calls


def fingerprints(messages: list[dict], tools: Collection[str] = ()) -> list[str]:
    """Digest of each prefix: entry k stands for messages[:k]. (len(messages) + 1,) hex strings.

    `tools`: the names of those that the model was offered, if any. A call to another one, and its result, are left
    out: OpenClaw shows both to the model once and takes them out of the history then.
    """
    digest = hashlib.sha256()
    prefixes, unknown = [digest.hexdigest()], set()
    for m in messages:
        text, calls = text_of(m.get("content")), calls_of(m)
        if m.get("role") == "assistant":
            text = without_thinking(text)
            unknown = {i for i, name, _ in calls if tools and name not in tools}
        known = [call[1:] for call in calls if call[0] not in unknown]
        taken_out = bool(calls) and not known and not text.strip()
        if not taken_out and not (m.get("role") == "tool" and str(m.get("tool_call_id")) in unknown):
            digest.update(json.dumps([m.get("role"), " ".join(text.split()), known], sort_keys=True).encode())
        prefixes.append(digest.hexdigest())
    return prefixes


def letters(text: str) -> str:
    return "".join(filter(str.isalnum, text)).lower()


def named_values(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """The scalars in a tool call's arguments, each with its key."""
    if isinstance(value, dict):
        return [pair for k, v in value.items() for pair in named_values(v, k)]
    if isinstance(value, list):
        return [pair for v in value for pair in named_values(v)]
    return [(name, value)]


def said_in_order(content: str, raw: str) -> bool:
    """Does `raw` hold each word of `content`, in order? A tool call may stand between them."""
    at = 0
    for word in filter(None, map(letters, content.split())):
        if (found := raw.find(word, at)) < 0:
            return False
        at = found + len(word)
    return True


def matches_answer(message: dict, answer: str) -> bool:
    """Is this assistant message what a client makes of our raw answer text?

    A plain answer comes back as it was, but for its thinking and its whitespace. vLLM's parsers take tool calls out
    of the text in a dozen formats and clients re-serialise them, so there the words of the content, each name and each
    argument after its key must be found in the raw text, by letters and digits alone.
    """
    answer, content = without_thinking(answer), without_thinking(text_of(message.get("content")))
    calls = calls_of(message)
    if not calls:
        return content.split() == answer.split()
    raw = letters(answer)

    def found(name: str, value: Any) -> bool:
        if isinstance(value, int | float) and not isinstance(value, bool):  # 1000 for a model's 1e3
            after_its_key = rf"{re.escape(name)}\W{{0,8}}?({NUMBER})" if name else f"({NUMBER})"
            return any(Decimal(n) == Decimal(str(value)) for n in re.findall(after_its_key, answer))
        # A model may write é or \u00e9, and an escaped newline leaves an n: any of the spellings will do.
        plain = value if isinstance(value, str) else json.dumps(value)
        spellings = (plain, json.dumps(value), json.dumps(value, ensure_ascii=False))
        return any(letters(name) + letters(spelling) in raw for spelling in spellings)

    return said_in_order(content, raw) and all(
        letters(name) in raw and all(found(*pair) for pair in named_values(arguments)) for _, name, arguments in calls
    )


def find_parent(
    db: sqlite3.Connection, user: str, messages: list[dict], tools: Collection[str] = (), session: str | None = None
) -> tuple[sqlite3.Row | None, list[dict]]:
    """The turn that these messages continue (None for a new conversation), and the messages that followed it.

    A turn is continued when its request is a prefix of this one, followed by our answer. The longest such prefix wins;
    among equal requests (two people say "hello") the answer decides, and the `session` where the client names it.
    """
    talk = conversation(messages)
    answered = [k for k, m in enumerate(talk) if m.get("role") == "assistant"]
    # As it came, and without the calls to tools that there are none of: the tools may be others than before.
    ways = [fingerprints(talk, offered) for offered in ([(), tools] if tools else [()])]
    rows = journal.candidates(db, user, list({prefixes[k] for prefixes in ways for k in answered})) if answered else []
    for k in reversed(answered):
        digests = {prefixes[k] for prefixes in ways}
        fits = [r for r in rows if r["digest"] in digests and matches_answer(talk[k], r["text"])]
        if session:  # one that a client names has a slash in it
            fits = [r for r in fits if r["session"] == session or "/" not in r["session"]]
        if fits:
            # Equal requests got equal answers: one that still waits, then the tightest fit, then the newest.
            turn = min(fits, key=lambda r: (r["state"] != "waiting", len(without_thinking(r["text"])), -r["created"]))
            following = []
            for m in talk[k + 1 :]:
                if m.get("role") == "assistant":
                    break
                following.append(m)
            return turn, following[: following.index(SHOWN)] if SHOWN in following else following
    return None, []
