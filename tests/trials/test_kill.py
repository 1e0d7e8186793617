"""kill -9 at random moments under traffic, many times. After each kill, three promises are checked:

1. No recorded turn is lost: every answer that a client received completely is in the journal, word for word.
2. No turn is trained on twice in the history that remains, and the turns of undone steps are not lost.
3. Open conversations can be continued.
"""

import asyncio
import os
import random
import signal

import httpx
import openai
import pytest

from durable import journal
from tests.conftest import alive, descendants
from tests.talking import ask, client, query, rows, until, user

KILLS, TALKERS, BATCH = 20, 6, 4
IN_THE_LOOP = ("queued", "training", "trained")


class Talker:
    """Has one conversation after another, even if the server is killed."""

    def __init__(self, name):
        self.name, self.rng, self.talk, self.open = name, random.Random(name), [], None
        self.seen, self.continued = {}, []  # complete answers by id; (answer, the answer that it continued)

    async def send_next(self, program):
        if len(self.talk) > 7 or not self.talk:
            self.talk, self.open = [user(f"{self.name}: {self.rng.random()}")], None
        reply = await ask(client(program, "none"), self.talk, 8)
        text = reply.choices[0].message.content
        self.seen[reply.id] = text
        if self.open:
            self.continued.append((reply.id, self.open))
        self.talk += [{"role": "assistant", "content": text}, user(self.rng.choice(["No. Wrong!", "Thanks, great."]))]
        self.open = reply.id
        if self.rng.random() < 0.8:  # the random model's verdicts are mostly neutral
            body = {"completion_id": reply.id, "score": self.rng.choice([1, -1])}
            async with httpx.AsyncClient(base_url=program.url, timeout=30) as http:
                assert (await http.post("/v1/feedback", json=body)).status_code in (200, 409)

    async def keep_talking(self, program):
        while True:
            try:
                await self.send_next(program)
            except (openai.APIError, httpx.HTTPError):
                return  # the server was killed; the conversation continues with the next one


def check(program, talkers, in_the_loop, alone, step):
    found = {r["id"]: r for r in rows(program)}
    for talker in talkers:
        for turn_id, text in talker.seen.items():
            assert found[turn_id]["text"] == text
        for turn_id, before in talker.continued:
            assert found[before]["session"] == found[turn_id]["session"]
            assert found[before]["next_messages"] or found[before]["source"] == "feedback"
    trained = [r["step"] for r in found.values() if r["state"] == "trained"]
    # A turn that was in two steps when the program was killed is trained on alone, all others in full batches.
    tried_alone = {r["step"] for r in found.values() if r["state"] == "trained" and r["id"] in alone}
    sizes = {
        s: 1 if s in tried_alone and trained.count(s) == 1 else BATCH for s in range(1, max(trained, default=0) + 1)
    }
    assert {s: trained.count(s) for s in trained} == sizes
    assert step <= max(trained, default=0) <= step + 2  # training continues while we read
    for turn_id in in_the_loop:
        assert found[turn_id]["state"] in IN_THE_LOOP, dict(found[turn_id])


@pytest.mark.timeout(3600)
async def test_kill_9_loses_no_turn_and_trains_on_none_twice(fresh):
    rng, talkers = random.Random(0), [Talker(f"talker {i}") for i in range(TALKERS)]
    settings = dict(batch_size=BATCH, save_every=3, keep=2, max_staleness=10**6)
    at_kill, alone, undone = [], set(), 0  # alone: ids of turns that two kills met in a step
    for kill in range(KILLS + 1):
        program = fresh(**settings)
        if kill % 5 == 4:  # during startup
            await asyncio.sleep(rng.uniform(0, 25))
        else:
            program.wait_ready()
            step = program.status()["step"]
            check(program, talkers, at_kill, alone, step)
            traffic = [asyncio.create_task(t.keep_talking(program)) for t in talkers]
            await asyncio.sleep(rng.uniform(1, 12))
            if kill == KILLS:
                await until(lambda: len(program.metrics()) > step + 2)  # noqa: B023
                await asyncio.gather(*[asyncio.wait_for(t.send_next(program), 60) for t in talkers])
        children = [pid for pid, _ in descendants(program.process.pid)]
        last = len(program.metrics())
        os.kill(program.process.pid, signal.SIGKILL)
        program.process.wait()
        if kill % 5 != 4:
            await asyncio.gather(*traffic)
        await until(lambda: not alive(children), 20)  # noqa: B023
        if (program.out / "journal.db").exists():
            at_kill = [r["id"] for r in rows(program) if r["state"] in IN_THE_LOOP]
            alone |= {r["id"] for r in rows(program, "attempts >= ?", journal.ALONE_AFTER)}
        current = query(program, "SELECT MAX(step) FROM checkpoints")[0][0] or 0 if at_kill else 0
        undone += last - current
        print(f"kill {kill}: step {last}, checkpoint {current}, {len(at_kill)} turns queued, training or trained")
    assert "no checkpoint of" not in program.log()
    assert undone > 0, "no kill undid a step, so the test shows nothing"
    seen, continued = (sum(len(getattr(t, what)) for t in talkers) for what in ("seen", "continued"))
    print(f"{seen} answers arrived whole, {continued} continued an earlier one, {undone} steps were undone")
