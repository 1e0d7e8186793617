"""Records for tests that need no program."""

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
