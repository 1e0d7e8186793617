"""Records for tests that need no program."""

import hashlib
import random

from durable.journal import Turn, Verdict

GOOD = Verdict(1, [1, 1, 0], 1.0, [], "", "policy", "judge")
BAD = Verdict(-1, [-1], 1.0, ["say less, please"], "own words", "alice", "feedback")


def turn(turn_id="t1", **changes):
    values = {
        "id": turn_id,
        "session": "s",
        "user": "alice",
        "messages": [{"role": "user", "content": "hi"}],
        "template": {"tools": [{"type": "function"}]},
        "answer": "a",
        "history": "h",
        "asked": "hi",
        "text": "hello",
        "finish_reason": "stop",
        "prompt_ids": [1, 2],
        "response_ids": [3, 4, 5],
        "logprobs": [-0.5, -1.0, -0.25],
        "versions": [(0, 0, 2), (1, 2, 3)],
        "temperature": 1.0,
    }
    return Turn(**values | changes)


def agent_turns(count=200, letters=730 << 10, clock=False):
    """The turns of one agent's conversation: each sends everything before again, with 30 KB of tools. About four
    letters are a token. `clock`: the first message has the time in it."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 9))) for _ in range(5000)]
    number = {word: k for k, word in enumerate(words)}
    tools = {
        "tools": [{"type": "function", "function": {"name": f"f{k}", "description": "x" * 1000}} for k in range(30)]
    }
    says = lambda length: " ".join(rng.choices(words, k=length // 6))  # noqa: E731
    talk, each = [{"role": "user", "content": says(400)}], letters // count
    for n in range(count):
        system = {"role": "system", "content": f"It is {n}. " + "Be helpful. " * 100 if clock else "Be helpful."}
        text, looked = (
            says(round(each * rng.uniform(0, 0.4))),
            {"role": "tool", "content": says(round(each * rng.uniform(0, 1.6))), "tool_call_id": f"i{n}"},
        )
        sent = [system, *talk]
        prompt = [number.get(w, sum(w.encode())) for m in sent for w in m["content"].split()]
        ids = [number[w] for w in text.split()]
        yield turn(
            f"chatcmpl-{n:032d}",
            session="0123456789ab",
            messages=sent,
            answer=hashlib.sha256(text.encode()).hexdigest(),
            history=hashlib.sha256(str(n).encode()).hexdigest(),
            template=tools,
            text=text,
            prompt_ids=[w * k % 49152 for w in prompt for k in (31, 97)][: sum(len(m["content"]) for m in sent) // 4],
            response_ids=ids,
            logprobs=[rng.uniform(-5, 0) for _ in ids],
            versions=[(0, 0, len(ids))],
        )
        talk = [*talk, {"role": "assistant", "content": text}, looked]
