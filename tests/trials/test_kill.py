"""kill -9 at random moments under traffic, many times, with shared weights and with an adapter for each of three users.
After each kill, three promises are checked:

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

TALKERS, BATCH = 6, 4
IN_THE_LOOP = ("queued", "training", "trained")


class Talker:
    """Has one conversation after another, even if the server is killed."""

    def __init__(self, name, key):
        self.name, self.key, self.rng, self.talk, self.open = name, key, random.Random(name), [], None
        self.seen, self.continued = {}, []  # complete answers by id; (answer, the answer that it continued)

    async def send_next(self, program):
        if len(self.talk) > 7 or not self.talk:
            self.talk, self.open = [user(f"{self.name}: {self.rng.random()}")], None
        reply = await ask(client(program, self.key), self.talk, 8)
        text = reply.choices[0].message.content
        self.seen[reply.id] = text
        if self.open:
            self.continued.append((reply.id, self.open))
        self.talk += [{"role": "assistant", "content": text}, user(self.rng.choice(["No. Wrong!", "Thanks, great."]))]
        self.open = reply.id
        if self.rng.random() < 0.8:  # the random model's verdicts are mostly neutral
            body = {"completion_id": reply.id, "score": self.rng.choice([1, -1])}
            headers = {"Authorization": f"Bearer {self.key}"}
            async with httpx.AsyncClient(base_url=program.url, headers=headers, timeout=30) as http:
                assert (await http.post("/v1/feedback", json=body)).status_code in (200, 409)

    async def keep_talking(self, program):
        while True:
            try:
                await self.send_next(program)
            except (openai.APIError, httpx.HTTPError):
                return  # the server was killed; the conversation continues with the next one


def steps_of(program, keys):
    """By owner of the weights, the step that is served."""
    return {owner: get(program, key)["step"] for owner, key in keys.items()}


def get(program, key):
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{program.url}/status", headers=headers, timeout=30).raise_for_status().json()


def check(program, talkers, in_the_loop, alone, steps):
    found = {r["id"]: r for r in rows(program)}
    for talker in talkers:
        for turn_id, text in talker.seen.items():
            assert found[turn_id]["text"] == text
        for turn_id, before in talker.continued:
            assert found[before]["session"] == found[turn_id]["session"]
            assert found[before]["next_messages"] or found[before]["source"] == "feedback"
    for owner, step in steps.items():
        rows_of = [r for r in found.values() if r["state"] == "trained" and (not owner or r["user"] == owner)]
        trained = [r["step"] for r in rows_of]
        # A turn that was in two steps when the program was killed is trained on alone, all others in full batches.
        tried_alone = {r["step"] for r in rows_of if r["id"] in alone}
        sizes = {
            s: 1 if s in tried_alone and trained.count(s) == 1 else BATCH for s in range(1, max(trained, default=0) + 1)
        }
        assert {s: trained.count(s) for s in trained} == sizes
        assert step <= max(trained, default=0) <= step + 2  # training continues while we read
    for turn_id in in_the_loop:
        assert found[turn_id]["state"] in IN_THE_LOOP, dict(found[turn_id])


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills, users", [(20, []), (10, ["ann", "ben", "cem"])], ids=["shared", "adapters"])
async def test_kill_9_loses_no_turn_and_trains_on_none_twice(fresh, kills, users):
    settings = dict(batch_size=BATCH, save_every=3, keep=2, max_staleness=10**6)
    keys = {name: f"key-{name}" for name in users} or {"": "none"}  # by owner of the weights
    if users:
        settings |= dict(lora_rank=4, adapters="user", key=",".join(f"{name}:{key}" for name, key in keys.items()))
    rng, talkers = random.Random(0), [Talker(f"talker {i}", [*keys.values()][i % len(keys)]) for i in range(TALKERS)]
    at_kill, alone, undone = [], set(), 0  # alone: ids of turns that two kills met in a step
    for kill in range(kills + 1):
        program = fresh(**settings)
        if kill % 5 == 4:  # during startup
            await asyncio.sleep(rng.uniform(0, 25))
        else:
            program.wait_ready()
            steps = steps_of(program, keys)
            check(program, talkers, at_kill, alone, steps)
            traffic = [asyncio.create_task(t.keep_talking(program)) for t in talkers]
            await asyncio.sleep(rng.uniform(1, 12))
            if kill == kills:
                await until(lambda: len(program.metrics()) > sum(steps.values()) + 2)  # noqa: B023
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
        saved = query(program, "SELECT owner, MAX(step) AS step FROM checkpoints GROUP BY owner") if at_kill else []
        current = {row["owner"]: row["step"] for row in saved}
        undone += last - sum(current.values())
        print(f"kill {kill}: {last} steps, checkpoints {current}, {len(at_kill)} turns queued, training or trained")
    assert "no checkpoint of" not in program.log()
    assert undone > 0, "no kill undid a step, so the test shows nothing"
    seen, continued = (sum(len(getattr(t, what)) for t in talkers) for what in ("seen", "continued"))
    print(f"{seen} answers arrived whole, {continued} continued an earlier one, {undone} steps were undone")
