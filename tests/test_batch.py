"""Which judged turns form a batch, and what happens to them if a step fails. The journal, the choice of a batch and
the training loop are real; there is no engine and no trainer."""

import asyncio
import time

import pytest

import run
import swap
from batch import DROPS_AT_ONCE, next_batch
from durable import guard, journal, upkeep
from program import Program
from tests.bare import program as bare
from tests.records import BAD, GOOD, turn
from tests.talking import until

OWN = {"adapters": "user", "lora_rank": 4}  # each user has their own weights


@pytest.fixture
def start(tmp_path):
    db = journal.open_journal(tmp_path / "journal.db")
    yield lambda **config: bare(db, **{"batch_size": 2, "batch_wait": 0} | config)
    db.close()


def add_judged(p, *ids, confirmed=True, **changes):
    for i in ids:
        journal.record_turn(p.db, turn(i, **({"versions": [(0, 0, 3)]} | changes)))
        journal.record_next(p.db, i, [{"role": "user", "content": "Thanks!"}], confirmed)
        journal.record_verdict(p.db, i, GOOD)


async def begin_step(p, seconds=0.0):
    """Begin a step. Returns the ids of its turns, [] if no step could begin in this time."""
    deadline = time.monotonic() + seconds
    while not (turns := await next_batch(p)) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return [s.turn.id for s in journal.begin_step(p.db, [t["id"] for t in turns])]


def mark_owner_trained(p, owner):
    """Move an owner to the end of `p.states`, as `state_of` does in a step."""
    p.states[owner] = p.states.pop(owner, p.states[""])


async def test_the_newest_turns_come_first(start):
    p = start()
    add_judged(p, "t1", "t2", "t3")
    assert await begin_step(p) == ["t3", "t2"] and journal.in_state(p.db, "queued") == ["t1"]


async def test_a_user_gets_half_of_a_batch_or_all_of_it_if_nobody_else_waits(start):
    p = start()
    add_judged(p, "b1", user="bob")
    add_judged(p, "a1", "a2", "a3")
    assert await begin_step(p) == ["a3", "b1"]
    assert await begin_step(p) == ["a2", "a1"]
    add_judged(p, "a4")
    assert await begin_step(p) == []


async def test_train_now_takes_a_partial_batch(start):
    p = start(batch_size=4)
    add_judged(p, "a1", "a2", "a3")
    assert await begin_step(p) == []
    p.train_now = True
    assert await begin_step(p) == ["a3", "a2", "a1"], "a user's share is less, but nobody else waits"
    p.train_now = True
    assert await begin_step(p) == []
    add_judged(p, "a4")
    assert await begin_step(p) == [], "train now applies to one batch only"


async def test_a_thumb_waits_for_its_words(start):
    """Open WebUI sends the words in a second request: see web/feedback.py."""
    p = start(batch_size=1)
    journal.record_turn(p.db, turn("t1", versions=[(0, 0, 3)]))
    journal.record_verdict(p.db, "t1", BAD)
    p.judged_at["t1"] = asyncio.get_running_loop().time() + 0.4
    assert await begin_step(p) == [] and await begin_step(p, 3) == ["t1"]


async def test_train_now_waits_for_a_verdict_to_settle(start, monkeypatch):
    p = start(batch_size=4)
    monkeypatch.setattr("batch.SETTLE_S", 0.3)
    add_judged(p, "t1", confirmed=False)
    p.train_now = True
    assert await begin_step(p) == [] and await begin_step(p, 3) == ["t1"]
    add_judged(p, "t2")
    assert await begin_step(p) == [], "it applies to one batch only"


async def test_a_partial_batch_starts_after_batch_wait_without_new_turns(start):
    p = start(batch_size=3, batch_wait=0.5)
    add_judged(p, "t1", "t2")
    began = time.monotonic()
    assert await begin_step(p, 3) == ["t2", "t1"] and time.monotonic() - began > 0.4
    add_judged(p, "t3")
    assert await begin_step(p, 0.3) == []
    add_judged(p, "t4")
    assert await begin_step(p, 0.3) == [], "counted from the last turn"
    assert await begin_step(p, 3) == ["t4", "t3"]


async def test_a_user_with_few_turns_gets_a_step_while_another_fills_batches(start):
    p = start(batch_wait=0.4, **OWN)
    add_judged(p, "a1", user="ann")
    begun = []
    for i in range(8):
        add_judged(p, f"b{2 * i}", f"b{2 * i + 1}", user="bob")
        begun.append(ids := await begin_step(p))
        mark_owner_trained(p, "ann" if ids == ["a1"] else "bob")
        await asyncio.sleep(0.1)
    assert begun.count(["a1"]) == 1 and len(begun[0]) == 2
    add_judged(p, "c1", "c2", user="cid")  # both batches are full; bob's is the older one
    assert await begin_step(p) == ["c2", "c1"], "bob was trained just now"


async def test_a_paused_users_turns_are_trained_after_the_pause(start):
    p = start(batch_wait=0.3, **OWN)
    add_judged(p, "a1", user="ann")
    p.paused["ann"] = "paused by the admin"
    assert await begin_step(p, 0.5) == []
    del p.paused["ann"]
    assert await begin_step(p) == ["a1"], "it has waited long enough"


async def test_a_failed_step_does_not_end_the_admins_pause(start):
    p = start(**OWN)
    p.paused[""] = p.paused["ann"] = "paused by the admin"
    p.stop_training("no memory", 0.1)
    p.stop_training("no memory", owner="ann")
    await asyncio.sleep(0.3)
    assert p.paused == {"": "paused by the admin", "ann": "paused by the admin"}
    del p.paused[""]
    p.stop_training("no memory", 0.1)
    assert p.training.startswith("stopped: no memory")
    await asyncio.sleep(0.3)
    assert "" not in p.paused


async def test_a_turn_whose_next_message_may_change_waits_before_training(start, monkeypatch):
    p = start(batch_size=1)
    monkeypatch.setattr("batch.SETTLE_S", 0.3)
    add_judged(p, "t1", "t2", "t3", confirmed=False)
    assert await begin_step(p) == []
    journal.confirm(p.db, "t1")
    journal.record_verdict(p.db, "t2", BAD)  # a person's feedback
    assert await begin_step(p) == ["t2"] and await begin_step(p) == ["t1"] and await begin_step(p) == []
    assert await begin_step(p, 3) == ["t3"]


async def test_unfit_turns_are_dropped_with_a_reason_without_blocking_the_event_loop(start):
    p = start(batch_size=3, max_staleness=2)
    p.train_now = True
    add_judged(p, *[f"t{i}" for i in range(10 * DROPS_AT_ONCE)])
    p.states[""].step = 3
    add_judged(p, "damaged", "new", versions=[(3, 0, 3)])
    p.db.execute("UPDATE answers SET logprobs = X'00' WHERE number = (SELECT number FROM turns WHERE id = 'damaged')")
    task, loop_turns = asyncio.create_task(begin_step(p, 10)), 0
    while not task.done():
        await asyncio.sleep(0)
        loop_turns += 1
    assert loop_turns >= 10 and await task == ["new"] and journal.in_state(p.db, "queued") == []
    assert journal.drop_reasons(p.db) == {"stale": 10 * DROPS_AT_ONCE, journal.UNREADABLE: 1}


@pytest.mark.parametrize("event", ["pause", "rollback"])
async def test_a_pause_or_rollback_during_a_wait_takes_effect_before_the_next_step(start, event):
    """Both come while the loop waits for another command. A step would end the loop, since the state is missing."""
    p = start(**OWN)
    del p.states[""]
    loop = asyncio.create_task(run.train(p))
    await asyncio.sleep(0.1)
    async with p.stepping:
        add_judged(p, "t1", versions=[(0, 0, 3)])
        add_judged(p, "t2", versions=[(1, 0, 3)])
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
    with pytest.raises(KeyError):  # now it tries a step
        await asyncio.wait_for(loop, 5)


async def test_refused_and_failed_steps_are_counted_separately(start, monkeypatch):
    """Two steps run out of memory, and the guard refuses the third. That is not three refused steps in a row."""
    errors = [RuntimeError("no memory"), RuntimeError("no memory"), guard.Refused("the gradient is not finite")]

    async def step(*args):
        if errors:
            raise errors.pop(0)
        await asyncio.Event().wait()  # a step that runs for long

    async def state_of(p, owner):
        return p.states[owner]

    async def undo(*args):
        pass

    monkeypatch.setattr(run, "step", step)
    for name, replacement in {"state_of": state_of, "undo": undo, "new_trainer_thread": lambda p: None}.items():
        monkeypatch.setattr(Program, name, replacement)
    p = start(batch_size=1)
    add_judged(p, "t1", "t2", "t3")
    loop = asyncio.create_task(run.train(p))
    while errors:
        p.paused.clear()
        p.wake.set()
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.05)
    assert p.training == "on" and journal.counts(p.db) == {"training": 1, "queued": 1, "dropped": 1}
    loop.cancel()


@pytest.mark.parametrize(("config", "admitted"), [(OWN, True), ({}, False)], ids=["own weights", "shared weights"])
async def test_more_than_max_waiting_turns_for_the_same_weights_are_dropped(start, config, admitted):
    p = start(max_waiting=2, **config)
    add_judged(p, "a1", "a2", "a3", user="ann")
    add_judged(p, "b1", user="bob")
    assert await p.admit("b1", "bob") is admitted
    assert not await p.admit("a1", "ann") and "a1" not in journal.in_state(p.db, "queued")


async def test_an_undo_keeps_answers_by_later_steps_if_the_engine_got_no_new_weights(start, monkeypatch):
    """After a kill -9, these are answers by the steps that are being repeated."""

    async def on_trainer(*args):
        pass

    monkeypatch.setattr(Program, "on_trainer", on_trainer)
    p = start()
    monkeypatch.setattr(swap, "serving", {"": swap.Version(p.state.step)})
    add_judged(p, "t1", versions=[(p.state.step + 7, 0, 3)])
    await p.undo(p.state)
    assert journal.in_state(p.db, "queued") == ["t1"]


@pytest.mark.parametrize(("dies", "most"), [(False, 10), (True, 16)])
async def test_a_turn_that_makes_steps_fail_is_dropped_and_the_others_are_trained_on(start, dies, most):
    """One turn of four makes each of its steps fail, with an error or because the program dies."""
    p = start()
    add_judged(p, "t1", "poison", "t3", "t4")
    steps = 0
    while journal.in_state(p.db, "queued"):
        p.train_now = True
        ids = await begin_step(p)
        steps += 1
        if "poison" not in ids:
            journal.mark_trained(p.db, ids, steps)
        elif not dies:
            journal.requeue(p.db, "RuntimeError: no memory")
        else:  # a restart after a crash
            journal.recover(p.db)
            p.db.execute("UPDATE turns SET state = 'trained' WHERE step IS NOT NULL")
        assert steps < most
    found = {r["id"]: (r["state"], r["reason"]) for r in p.db.execute("SELECT * FROM turns")}
    assert {i for i, (state, _) in found.items() if state == "trained"} == {"t1", "t3", "t4"}
    assert found["poison"][0] == "dropped" and found["poison"][1].startswith("set aside, since training fails on it")


async def test_a_turn_is_dropped_only_after_many_kills_and_others_are_trained_first(start):
    p = start(batch_size=1)
    add_judged(p, "t1")
    for _ in range(journal.DEATHS):
        assert await begin_step(p) == ["t1"]
        journal.recover(p.db)
    add_judged(p, "t2")
    assert [await begin_step(p), await begin_step(p)] == [["t2"], ["t1"]]
    journal.recover(p.db)
    assert journal.in_state(p.db, "queued") == ["t2"]
    (row,) = p.db.execute("SELECT id, reason FROM turns WHERE state = 'dropped'")
    assert tuple(row) == ("t1", "set aside, since training fails on it: the program died in the step")


async def test_unrelated_crashes_and_clean_stops_lose_no_turn(start):
    """21 steps: in turn, the program is killed during the step, killed after it, or stopped during it."""
    p = start()
    add_judged(p, *[f"t{i}" for i in range(6)])
    for kill in range(21):
        ids = await begin_step(p)
        if kill % 3 == 2:
            journal.leave_step(p.db)  # a clean stop during the step
        elif kill % 3 == 1:
            journal.mark_trained(p.db, ids, kill)  # killed after the step, before its checkpoint
        journal.recover(p.db)
        assert journal.counts(p.db) == {"queued": 6}


async def test_after_a_rollback_training_continues_until_steps_is_reached_again(start):
    p = start(steps=1)
    p.state.step = 1
    training = asyncio.create_task(run.train(p))
    await until(lambda: p.training == "off", 5)
    p.state.step = 0  # as a rollback does
    await until(lambda: p.training == "on", 5)
    training.cancel()
