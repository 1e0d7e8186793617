"""Which judged turns come together in a batch, and what becomes of them when a step fails. Without a program: the queue
and the journal are real."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from batch import TRAIN_NOW, next_batch
from config import Config
from durable import journal
from tests.records import GOOD, turn


@pytest.fixture
def program(tmp_path):
    async def wait_for_disk_space():
        pass

    db = journal.open_journal(tmp_path / "journal.db")
    yield SimpleNamespace(
        config=Config(batch_size=2),
        db=db,
        to_train=asyncio.LifoQueue(),
        wait_for_disk_space=wait_for_disk_space,
        owner_of=lambda user: "",
        step_of=lambda owner: 0,
        paused={},
    )
    db.close()


def judged(p, *ids, **changes):
    for i in ids:
        journal.record_turn(p.db, turn(i, **({"versions": [(0, 0, 3)]} | changes)))
        journal.record_next(p.db, i, [{"role": "user", "content": "Thanks!"}])
        journal.record_verdict(p.db, i, GOOD)
        p.to_train.put_nowait(i)


async def taken(p, seconds=5.0):
    return [s.turn.id for s in await asyncio.wait_for(next_batch(p), seconds)]


def waiting(p):
    return [p.to_train.get_nowait() for _ in range(p.to_train.qsize())]


async def test_the_newest_turns_come_first(program):
    judged(program, "t1", "t2", "t3")
    assert await taken(program) == ["t3", "t2"] and waiting(program) == ["t1"]


async def test_one_of_several_users_has_half_of_a_batch_and_a_single_user_all(program):
    judged(program, "b1", user="bob")
    judged(program, "a1", "a2", "a3")
    assert await taken(program) == ["a3", "b1"]
    assert await taken(program) == ["a1", "a2"], "put back in the order in which they were passed over"
    judged(program, "a4")
    with pytest.raises(TimeoutError):
        await taken(program, 0.2)


async def test_training_now_takes_what_there_is(program):
    judged(program, "t1")
    task = asyncio.create_task(taken(program))
    await asyncio.sleep(0.05)
    program.to_train.put_nowait(TRAIN_NOW)
    assert await task == ["t1"]
    judged(program, "t2")
    program.to_train.put_nowait(TRAIN_NOW)  # as during a step: nobody takes from the queue
    assert await taken(program) == ["t2"]
    program.to_train.put_nowait(TRAIN_NOW)
    with pytest.raises(TimeoutError):
        await taken(program, 0.2)


async def test_a_batch_that_grows_no_more_is_not_waited_for(program):
    program.config = Config(batch_size=3, batch_wait=0.5)
    judged(program, "t1", "t2")
    began = time.monotonic()
    assert await taken(program) == ["t2", "t1"] and 0.4 < time.monotonic() - began < 3
    judged(program, "t3")
    task = asyncio.create_task(taken(program))
    await asyncio.sleep(0.3)
    judged(program, "t4")
    await asyncio.sleep(0.3)
    assert not task.done(), "counted from the last turn"
    assert await task == ["t3", "t4"]


async def test_each_users_own_batch_is_waited_for_by_itself(program):
    program.config, program.owner_of = Config(batch_size=2, batch_wait=0.4), lambda user: user
    judged(program, "a1", user="ann")
    task = asyncio.create_task(taken(program))
    for i in range(3):  # others' turns don't put it off
        await asyncio.sleep(0.2)
        judged(program, f"b{i}", user=f"bob{i}")
        if task.done():
            break
    assert await task == ["a1"]
    assert {*waiting(program)} <= {"b0", "b1", "b2"}, "theirs are queued again"


async def test_a_long_queue_of_stale_turns_does_not_hold_up_serving(program):
    program.step_of = lambda owner: 100
    judged(program, *[f"t{i}" for i in range(300)])
    task, turns = asyncio.create_task(next_batch(program)), 0
    while not program.to_train.empty() and not task.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 300 and journal.counts(program.db) == {"dropped": 300}
    task.cancel()


async def test_a_turn_that_training_fails_on_is_found_and_set_aside_and_its_neighbours_are_trained(program):
    """Of four turns one makes each step fail, whether by an error or because the program dies."""
    judged(program, "t1", "poison", "t3", "t4")
    steps = 0
    while len(program.to_train._queue):
        ids = await taken(program)
        steps += 1
        assert [s.turn.id for s in journal.begin_step(program.db, ids)] == ids
        if "poison" not in ids:
            journal.mark_trained(program.db, ids, steps)
        elif steps % 2:
            journal.requeue(program.db, "RuntimeError: no memory")
            for turn_id in ids:
                if journal.is_queued(program.db, turn_id):
                    program.to_train.put_nowait(turn_id)
        else:  # a start after a crash
            waiting(program)
            journal.recover(program.db)
            program.db.execute("UPDATE turns SET state = 'trained' WHERE step IS NOT NULL")
            for turn_id in journal.in_state(program.db, "queued"):
                program.to_train.put_nowait(turn_id)
        assert steps < 10
    found = {r["id"]: (r["state"], r["reason"]) for r in program.db.execute("SELECT * FROM turns")}
    assert {i for i, (state, _) in found.items() if state == "trained"} == {"t1", "t3", "t4"}
    assert found["poison"][0] == "dropped" and found["poison"][1].startswith("set aside, since training fails on it")


async def test_crashes_and_stops_that_are_nobodys_fault_lose_no_turn(program):
    """Killed 21 times, each time in the step of another batch; and stopped 21 times in the step of the same one."""
    judged(program, *[f"t{i}" for i in range(6)])
    for kill in range(21):
        ids = await taken(program)
        journal.begin_step(program.db, ids)
        if kill % 3 == 2:
            journal.leave_step(program.db)  # a clean stop in the step
        elif kill % 3 == 1:
            journal.mark_trained(program.db, ids, kill)  # killed after the step, before its checkpoint
        waiting(program)
        journal.recover(program.db)
        assert journal.counts(program.db) == {"queued": 6}
        for turn_id in journal.in_state(program.db, "queued"):
            program.to_train.put_nowait(turn_id)
