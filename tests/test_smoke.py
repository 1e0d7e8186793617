"""A tutorial: one answer, from the HTTP request to the weights. Read this test first.

A real vLLM engine serves a tiny random model. Its answers are noise; what happens to them is real.
"""

import json
import sqlite3
import time

import openai

BAD, GOOD = "No, that is wrong. You should have said hello.", "Perfect, thanks!"


def test_an_answer_is_judged_and_trained_on(fresh):
    # Start the program as `make serve` does. It answers at once; training runs in the background.
    program = fresh(batch_size=2, lr=1e-4).wait_ready()
    client = openai.OpenAI(base_url=f"{program.url}/v1", api_key="none")
    assert program.status()["step"] == 0

    def ask(talk: list[dict]) -> openai.types.chat.ChatCompletion:
        return client.chat.completions.create(model="policy", messages=talk, max_tokens=16)

    def turn(completion_id: str) -> sqlite3.Row:
        """The row of the journal for one answer."""
        db = sqlite3.connect(program.out / "journal.db")
        db.row_factory = sqlite3.Row
        row = db.execute("SELECT * FROM readable WHERE id = ?", (completion_id,)).fetchone()
        db.close()
        return row

    # Ask something. The answer is recorded with its token ids and log-probs, and waits for your next message.
    talk = [{"role": "user", "content": "Say hello."}]
    first = ask(talk)
    assert turn(first.id)["state"] == "waiting" and turn(first.id)["versions"] == "[[0, 0, 16]]"  # from weights 0

    # Complain. The request continues the first turn, so your words are its next message, and the judge reads them.
    talk += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": BAD}]
    second = ask(talk)
    assert BAD in turn(first.id)["next_messages"]

    # Two judged turns make a batch. Other conversations fill it: the judge of a random model may call some of them
    # neutral, and those are not trained on.
    deadline = time.monotonic() + 120
    while program.status()["step"] == 0:
        assert time.monotonic() < deadline, program.log()[-2000:]
        for reaction in (BAD, GOOD):
            asked = [{"role": "user", "content": f"Say hello at {time.monotonic()}."}]
            answer = ask(asked).choices[0].message.content
            ask([*asked, {"role": "assistant", "content": answer}, {"role": "user", "content": reaction}])

    # The first answer has been judged. Where the score was bad, your complaint became the hint.
    row = turn(first.id)
    assert row["score"] in (-1, 0, 1) and row["state"] in ("queued", "training", "trained", "dropped")
    assert row["score"] != -1 or BAD in json.loads(row["hints"])

    # A step was taken, and the engine agrees with the trainer about the new weights.
    step = program.metrics()[0]
    assert step["step"] == 1 and step["push_gap"] < 0.15 and step["grad_norm"] > 0

    # The next answer comes from the new weights.
    talk += [{"role": "assistant", "content": second.choices[0].message.content}, {"role": "user", "content": GOOD}]
    third = ask(talk)
    versions = json.loads(turn(third.id)["versions"])  # [[weight version, first token, end], ...]
    assert versions[-1][0] >= 1
