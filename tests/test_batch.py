"""Which judged turns come together in a batch, and what becomes of them when a step fails. Without engine and trainer:
the journal, the choice of a batch and the training loop's order are real."""

import asyncio
import time

import pytest

import run
from batch import DROPS_AT_ONCE, next_batch
from durable import journal, upkeep
from tests.bare import program as bare
from tests.records import BAD, GOOD, turn

OWN = {"adapters": "user", "lora_rank": 4}  # each user has their own weights


@pytest.fixture
def start(tmp_path):
    db = journal.open_journal(tmp_path / "journal.db")
    yield lambda **config: bare(db, **{"batch_size": 2, "batch_wait": 0} | config)
    db.close()


def judged(p, *ids, confirmed=True, **changes):
    for i in ids:
        journal.record_turn(p.db, turn(i, **({"versions": [(0, 0, 3)]} | changes)))
        journal.record_next(p.db, i, [{"role": "user", "content": "Thanks!"}], confirmed)
        journal.record_verdict(p.db, i, GOOD)


async def taken(p, seconds=0.0):
    """Begin a step. The ids of its turns, [] if none could begin in this time."""
    deadline = time.monotonic() + seconds
    while not (turns := await next_batch(p)) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return [s.turn.id for s in journal.begin_step(p.db, [t["id"] for t in turns])]


def trained(p, owner):
    """What `state_of` does in a step: the last trained is last."""
    p.states[owner] = p.states.pop(owner, p.states[""])


async def test_the_newest_turns_come_first(start):
    p = start()
    judged(p, "t1", "t2", "t3")
    assert await taken(p) == ["t3", "t2"] and journal.in_state(p.db, "queued") == ["t1"]


async def test_one_of_several_users_has_half_of_a_batch_and_a_single_user_all(start):
    p = start()
    judged(p, "b1", user="bob")
    judged(p, "a1", "a2", "a3")
    assert await taken(p) == ["a3", "b1"]
    assert await taken(p) == ["a2", "a1"]
    judged(p, "a4")
    assert await taken(p) == []


async def test_training_now_takes_what_there_is(start):
    p = start(batch_size=4)
    judged(p, "a1", "a2", "a3")
    assert await taken(p) == []
    p.train_now = True
    assert await taken(p) == ["a3", "a2", "a1"], "a user's share is less, but nobody else waits"
    p.train_now = True
    assert await taken(p) == []
    judged(p, "a4")
    assert await taken(p) == [], "it was for what was there"


async def test_a_batch_that_grows_no_more_is_not_waited_for(start):
    p = start(batch_size=3, batch_wait=0.5)
    judged(p, "t1", "t2")
    began = time.monotonic()
    assert await taken(p, 3) == ["t2", "t1"] and time.monotonic() - began > 0.4
    judged(p, "t3")
    assert await taken(p, 0.3) == []
    judged(p, "t4")
    assert await taken(p, 0.3) == [], "counted from the last turn"
    assert await taken(p, 3) == ["t4", "t3"]


async def test_a_user_with_few_turns_gets_a_step_while_another_fills_batches(start):
    p = start(batch_wait=0.4, **OWN)
    judged(p, "a1", user="ann")
    begun = []
    for i in range(8):
        judged(p, f"b{2 * i}", f"b{2 * i + 1}", user="bob")
        begun.append(ids := await taken(p))
        trained(p, "ann" if ids == ["a1"] else "bob")
        await asyncio.sleep(0.1)
    assert begun.count(["a1"]) == 1 and len(begun[0]) == 2
    judged(p, "c1", "c2", user="cid")  # both batches are full; bob's is the older one
    assert await taken(p) == ["c2", "c1"], "bob was trained just now"


async def test_a_paused_users_turns_are_trained_after_the_pause(start):
    p = start(batch_wait=0.3, **OWN)
    judged(p, "a1", user="ann")
    p.paused["ann"] = "paused by the admin"
    assert await taken(p, 0.5) == []
    del p.paused["ann"]
    assert await taken(p) == ["a1"], "it has waited long enough"


async def test_a_fresh_verdict_waits_for_the_reply_that_may_replace_it(start, monkeypatch):
    p = start(batch_size=1)
    monkeypatch.setattr("batch.SETTLE_S", 0.3)
    judged(p, "t1", "t2", "t3", confirmed=False)
    assert await taken(p) == []
    journal.confirm(p.db, "t1")
    journal.record_verdict(p.db, "t2", BAD)  # of a person
    assert await taken(p) == ["t2"] and await taken(p) == ["t1"] and await taken(p) == []
    assert await taken(p, 3) == ["t3"]


async def test_turns_that_cant_be_trained_on_are_dropped_with_the_reason_and_do_not_hold_up_serving(start):
    p = start(batch_size=3, max_staleness=2)
    p.train_now = True
    judged(p, *[f"t{i}" for i in range(10 * DROPS_AT_ONCE)])
    p.states[""].step = 3
    judged(p, "damaged", "new", versions=[(3, 0, 3)])
    p.db.execute("UPDATE answers SET logprobs = X'00' WHERE number = (SELECT number FROM turns WHERE id = 'damaged')")
    task, turns = asyncio.create_task(taken(p, 10)), 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 10 and await task == ["new"] and journal.in_state(p.db, "queued") == []
    assert journal.drop_reasons(p.db) == {"stale": 10 * DROPS_AT_ONCE, journal.UNREADABLE: 1}


@pytest.mark.parametrize("event", ["pause", "rollback"])
async def test_no_step_begins_that_was_chosen_before_a_pause_or_a_rollback(start, event):
    """Both come while the loop waits for another command. A step would end the loop: there is no engine."""
    p = start(**OWN)
    del p.states[""]
    loop = asyncio.create_task(run.train(p))
    await asyncio.sleep(0.1)
    async with p.stepping:
        judged(p, "t1", versions=[(0, 0, 3)])
        judged(p, "t2", versions=[(1, 0, 3)])
        p.wake.set()
        await asyncio.sleep(0.1)
        if event == "pause":
            p.paused[""] = "paused by the admin"
        else:
            upkeep.rollback(p.db, "alice", 0)
    await asyncio.sleep(0.1)
    left = {"queued": 2} if event == "pause" else {"queued": 1, "dropped": 1}
    assert journal.counts(p.db) == left and not loop.done()
    p.paused.clear()
    p.train_now = True
    p.wake.set()
    with pytest.raises(KeyError):  # it tried now
        await asyncio.wait_for(loop, 5)


@pytest.mark.parametrize(("dies", "most"), [(False, 10), (True, 16)])
async def test_a_turn_that_training_fails_on_is_found_and_set_aside_and_its_neighbours_are_trained(start, dies, most):
    """Of four turns one makes each step fail, by an error or because the program dies."""
    p = start()
    judged(p, "t1", "poison", "t3", "t4")
    steps = 0
    while journal.in_state(p.db, "queued"):
        p.train_now = True
        ids = await taken(p)
        steps += 1
        if "poison" not in ids:
            journal.mark_trained(p.db, ids, steps)
        elif not dies:
            journal.requeue(p.db, "RuntimeError: no memory")
        else:  # a start after a crash
            journal.recover(p.db)
            p.db.execute("UPDATE turns SET state = 'trained' WHERE step IS NOT NULL")
        assert steps < most
    found = {r["id"]: (r["state"], r["reason"]) for r in p.db.execute("SELECT * FROM turns")}
    assert {i for i, (state, _) in found.items() if state == "trained"} == {"t1", "t3", "t4"}
    assert found["poison"][0] == "dropped" and found["poison"][1].startswith("set aside, since training fails on it")


async def test_kills_in_the_same_step_lose_no_turn_and_others_come_first(start):
    p = start(batch_size=1)
    judged(p, "t1")
    for _ in range(journal.DEATHS):
        assert await taken(p) == ["t1"]
        journal.recover(p.db)
    judged(p, "t2")
    assert [await taken(p), await taken(p)] == [["t2"], ["t1"]]
    journal.recover(p.db)
    assert journal.in_state(p.db, "queued") == ["t2"]
    (row,) = p.db.execute("SELECT id, reason FROM turns WHERE state = 'dropped'")
    assert tuple(row) == ("t1", "set aside, since training fails on it: the program died in the step")


async def test_crashes_and_stops_that_are_nobodys_fault_lose_no_turn(start):
    """Killed 21 times, each time in the step of another batch; and stopped 21 times in the step of the same one."""
    p = start()
    judged(p, *[f"t{i}" for i in range(6)])
    for kill in range(21):
        ids = await taken(p)
        if kill % 3 == 2:
            journal.leave_step(p.db)  # a clean stop in the step
        elif kill % 3 == 1:
            journal.mark_trained(p.db, ids, kill)  # killed after the step, before its checkpoint
        journal.recover(p.db)
        assert journal.counts(p.db) == {"queued": 6}
