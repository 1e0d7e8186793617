"""--adapters=user: each user has their own adapter on a shared base model."""

import asyncio
import json
import signal
import sqlite3
from contextlib import closing
from types import SimpleNamespace

import httpx
import pytest

import run
import swap
from clients.keys import write_private
from durable import checkpoint, journal, upkeep
from durable.errors import UsageError
from machine import memory
from program import Program
from tests.records import GOOD, turn
from tests.talking import rows, until, user

PEOPLE = ("alice", "bob", "carol")
OPTIONS = {"adapters": "user", "lora_rank": 4, "lr": 1e-2, "batch_size": 1, "max_staleness": 50}


# ---- the journal ----


@pytest.fixture
def db(tmp_path):
    with closing(journal.open_journal(tmp_path / "journal.db")) as db:
        upkeep.bind_model(db, tmp_path, "abc", "user")
        yield db


def trained(db, turn_id, name, step):
    journal.record_turn(db, turn(turn_id, user=name, versions=[(step - 1, 0, 3)]))
    journal.record_next(db, turn_id, [user("Thanks!")])
    journal.record_verdict(db, turn_id, GOOD)
    journal.begin_step(db, [turn_id])
    journal.mark_trained(db, [turn_id], step)


def states(db):
    return {r["id"]: r["state"] for r in db.execute("SELECT id, state FROM turns")}


def test_each_user_continues_from_their_own_checkpoint(db):
    for name in ("alice", "bob"):
        for step in (1, 2, 3):
            trained(db, f"{name}{step}", name, step)
    journal.add_checkpoint(db, "alice", 2, keep=3)
    journal.recover(db)
    queued = {"alice3", "bob1", "bob2", "bob3"}
    assert {i for i, state in states(db).items() if state == "queued"} == queued
    assert journal.owners(db) == {"alice": 2} and journal.saved_step(db, "bob") == 0


def test_a_rollback_affects_only_one_user(db):
    for name in ("alice", "bob"):
        for step in (1, 2):
            trained(db, f"{name}{step}", name, step)
            journal.add_checkpoint(db, name, step, keep=3)
    assert upkeep.rollback(db, "alice", 1) == 1
    assert states(db) == {"alice1": "trained", "alice2": "dropped", "bob1": "trained", "bob2": "trained"}
    assert journal.owners(db) == {"alice": 1, "bob": 2}
    with pytest.raises(UsageError, match="give --user"):
        upkeep.check_owner(db, "")


def test_pruning_depends_on_each_users_own_checkpoints(db, tmp_path):
    for name in ("alice", "bob"):
        trained(db, f"{name}1", name, 1)
    journal.add_checkpoint(db, "bob", 1, keep=3)
    db.execute("UPDATE turns SET created = 0")
    assert upkeep.prune(tmp_path / "journal.db", 1) == 1
    assert db.execute("SELECT template FROM turns WHERE id = 'alice1'").fetchone()[0] is not None


def test_a_journal_made_with_another_adapters_option_is_refused(db, tmp_path):
    journal.record_turn(db, turn("t1"))
    with pytest.raises(UsageError, match="--adapters=user"):
        upkeep.bind_model(db, tmp_path, "abc", "shared")


def test_each_user_has_a_separate_folder_inside_checkpoints(tmp_path):
    homes = [checkpoint.home(tmp_path, name) for name in ("", "a", "../b", "x" * 300, "step-000001", "ü")]
    assert len(set(homes)) == 6
    assert all(home.parent == tmp_path / "checkpoints" and len(home.name) < 110 for home in homes[1:])


# ---- the program ----


async def test_a_client_that_hangs_up_does_not_cancel_the_loading_of_an_adapter(monkeypatch):
    """Otherwise the engine would keep an adapter that is not tracked, and the worker could read the wrong file."""

    async def load_saved(owner):
        await asyncio.sleep(0.1)
        swap.serving[owner] = swap.Version(0)

    monkeypatch.setattr(swap, "serving", {"": swap.Version(0)})
    p = SimpleNamespace(owner_of=lambda name: name, states={}, engine=None, load_saved=load_saved)
    asking = asyncio.create_task(Program.load_adapter(p, "alice"))
    await asyncio.sleep(0.02)
    asking.cancel()
    await until(lambda: "alice" in swap.serving, 5)


async def test_a_step_that_kills_the_engine_asks_for_a_restart():
    async def work(p):
        raise swap.EngineDied("it did not take the old weights")

    p = SimpleNamespace(died=asyncio.Event())
    await run.keep_running(p, "train", work)
    assert p.died.is_set()


async def test_after_an_error_in_the_training_loop_the_last_step_is_undone_before_the_next_one(monkeypatch):
    done = []

    async def note(what, *_):
        done.append(what)

    async def failing(p):
        raise RuntimeError("an undo failed")

    monkeypatch.setattr(run, "train", lambda p: note("train"))
    waits = {"paused": {}, "stepping": asyncio.Lock(), "stop_training": lambda error, seconds: done.append(error)}
    p = SimpleNamespace(states={"": "the state"}, undo=note, write=note, **waits)
    await run.keep_running(p, "train", failing)
    assert done == ["RuntimeError: an undo failed", "the state", journal.requeue, "train"]


async def test_if_a_step_can_never_be_undone_the_program_starts_again(monkeypatch):
    """After a fatal error of a GPU, every later call on it fails."""

    async def failing(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    waits = {"paused": {}, "stepping": asyncio.Lock(), "stop_training": lambda *_: None, "died": asyncio.Event()}
    p = SimpleNamespace(states={"": "the state"}, undo=failing, **waits)
    await asyncio.wait_for(run.keep_running(p, "train", failing), 10)
    assert p.died.is_set()


class Talker:
    """A user of the program."""

    def __init__(self, program, name):
        self.program, self.name = program, name

    def post(self, path, body):
        headers = {"Authorization": f"Bearer key-{self.name}"}
        return httpx.post(f"{self.program.url}{path}", json=body, headers=headers, timeout=60).raise_for_status().json()

    def ask(self, text="q", **options):
        body = {"model": "policy", "messages": [user(text)], "max_tokens": 12} | options
        return self.post("/v1/chat/completions", body)

    def logp(self):
        found = self.ask(max_tokens=1, temperature=0, logprobs=True)
        return found["choices"][0]["logprobs"]["content"][0]["logprob"]

    def complain(self, text="q"):
        body = {"completion_id": self.ask(text)["id"], "score": -1, "text": f"{self.name} wants one short sentence."}
        return self.post("/v1/feedback", body)["completion_id"]

    def status(self):
        headers = {"Authorization": f"Bearer key-{self.name}"}
        return httpx.get(f"{self.program.url}/status", headers=headers, timeout=60).raise_for_status().json()

    async def learn(self, steps=1):
        for _ in range(steps):
            goal = self.status()["step"] + 1
            self.complain(f"q{goal}")
            await until(lambda goal=goal: self.status()["step"] == goal)


def admin_headers(program):
    return {"Authorization": f"Bearer {(program.out / 'admin_key').read_text().strip()}"}


def admin_command(program, command, **body):
    return httpx.post(f"{program.url}/admin/{command}", json=body, headers=admin_headers(program), timeout=60)


def started(fresh, names=PEOPLE, **options):
    program = fresh(key=",".join(f"{name}:key-{name}" for name in names), **OPTIONS | options)
    return program.wait_ready()


async def test_an_adapter_of_one_user_does_not_change_another_users_answers(fresh):
    program = started(fresh, save_every=1)
    alice, bob, carol = (Talker(program, name) for name in PEOPLE)
    first = alice.logp()
    assert bob.logp() == first, "all begin with the same weights"

    await alice.learn(2)
    assert alice.logp() != first and bob.logp() == first and carol.logp() == first, "compared bit for bit"
    saved = sorted(checkpoint.home(program.out, "alice").glob("*/adapter_model.safetensors"))
    alices = alice.logp(), [file.read_bytes() for file in saved]
    await bob.learn()
    assert bob.logp() not in (first, alices[0])
    assert (alice.logp(), [file.read_bytes() for file in saved]) == alices
    assert [who.status()["step"] for who in (alice, bob, carol)] == [2, 1, 0]
    assert [(m["owner"], m["step"]) for m in program.metrics()] == [("alice", 1), ("alice", 2), ("bob", 1)]
    figures = httpx.get(f"{program.url}/metrics", headers=admin_headers(program), timeout=60)
    assert figures.status_code == 200 and "openclaw_rl_step 3.0" in figures.text
    assert {r["user"] for r in rows(program, "state = 'trained'")} == {"alice", "bob"}

    # Pause and resume
    assert admin_command(program, "pause", user="alice").status_code == 200
    waiting = alice.complain("while paused")
    await bob.learn()
    assert alice.status()["training"] == "paused by the admin" and bob.status()["training"] == "on"
    assert rows(program, "id = ?", waiting)[0]["state"] == "queued" and alice.status()["step"] == 2
    assert admin_command(program, "resume", user="alice").status_code == 200
    await until(lambda: alice.status()["step"] == 3)

    admin_command(program, "pause")
    assert "when training as a whole does" in admin_command(program, "resume", user="alice").text
    assert admin_command(program, "resume").json()["done"] == "training is on"

    # Rollback and forget
    bobs = bob.logp()
    assert "give --user" in admin_command(program, "rollback", step=0).text
    assert "nobody of that name" in admin_command(program, "rollback", step=0, user="alicia").text
    admin_command(program, "rollback", step=2, user="alice").raise_for_status()
    assert (alice.logp(), alice.status()["step"], bob.logp()) == (alices[0], 2, bobs)
    await alice.learn()
    said = admin_command(program, "forget", user="alice").raise_for_status().json()["done"]
    assert "nothing of them is left in weights" in said
    assert alice.logp() == first and alice.status()["step"] == 0 and bob.logp() == bobs
    assert [folder.name for folder in (program.out / "checkpoints").iterdir()] == ["of-bob"]
    assert {m["owner"] for m in program.metrics()} == {"bob"}
    await alice.learn()
    assert alice.logp() != first and bob.logp() == bobs


async def test_after_a_kill_each_user_continues_from_their_own_adapter(fresh):
    """With three users talking: no recorded turn is lost, none is trained on twice, and each user continues from their
    own checkpoint."""
    program = started(fresh, save_every=2)
    people = [Talker(program, name) for name in PEOPLE]
    for k, who in enumerate(people):
        await who.learn(k)  # carol has a checkpoint of step 2, bob's step 1 is not saved
    carols = people[2].logp()
    ids = [who.complain(f"just before the end {k}") for k in range(3) for who in people]
    program.process.send_signal(signal.SIGKILL)
    program.wait_end()
    with closing(sqlite3.connect(program.out / "journal.db")) as db:
        saved = journal.owners(db)
        known = {turn_id for (turn_id,) in db.execute("SELECT id FROM turns")}
    assert set(ids) <= known and saved["carol"] >= 2

    program = started(fresh, save_every=2)
    people = [Talker(program, name) for name in PEOPLE]
    if saved["carol"] == people[2].status()["step"] == 2:
        assert people[2].logp() == carols
    await until(lambda: not rows(program, "state IN ('queued', 'training')"), 120)
    for k, name in enumerate(PEOPLE):
        theirs = rows(program, "user = ? AND source = 'feedback'", name)
        steps = list(range(1, 4 + k))
        assert sorted(r["step"] for r in theirs if r["state"] == "trained") == steps, "each turn in a step of its own"
        assert len(theirs) == len(steps) == people[k].status()["step"]
        assert [m["step"] for m in program.metrics() if m["owner"] == name] == steps


async def test_an_evicted_adapter_is_loaded_again_for_its_user(fresh):
    names = [f"user{i}" for i in range(memory.USERS + 2)]
    program = started(fresh, names)
    people = [Talker(program, name) for name in names]
    first = people[0].logp()
    for who in people:
        await who.learn()
    kept = checkpoint.home(program.out, "user0")
    await until(lambda: list(kept.glob("*/adapter_model.safetensors")))  # evicted to disk
    assert len(list((program.out / "checkpoints").iterdir())) == 2
    logps = [who.logp() for who in people]
    assert first not in logps and len(set(logps)) == len(people)
    texts = await asyncio.gather(*[asyncio.to_thread(who.ask, "all at once", temperature=0) for who in people])
    assert len({json.dumps(t["choices"][0]["message"]) for t in texts}) > 1
    assert [who.logp() for who in people] == logps
    await people[0].learn()
    assert people[0].status()["step"] == 2 and people[0].logp() != logps[0] and people[1].logp() == logps[1]
    program.stop()

    # Damaged files affect only their owner, and a rollback repairs them.
    (whole,) = checkpoint.home(program.out, "user1").glob("*/adapter_model.safetensors")
    whole.write_bytes(whole.read_bytes()[:-1000])
    (config,) = checkpoint.home(program.out, "user2").glob("*/adapter_config.json")
    config.unlink()
    (state,) = checkpoint.home(program.out, "user3").glob("*/trainer.pt")
    state.write_bytes(state.read_bytes()[:-1000])
    program = started(fresh, names)
    again = [Talker(program, name) for name in names]
    assert [who.logp() for who in again[3:]] == logps[3:]
    with pytest.raises(httpx.HTTPStatusError) as error:
        again[1].ask()
    assert "damaged" in error.value.response.text
    assert "damaged" in again[2].status()["training"] and again[4].status()["training"] == "on"
    again[3].complain()
    await until(lambda: "damaged" in again[3].status()["training"])
    await again[4].learn()
    for k in (1, 3):
        admin_command(program, "rollback", step=0, user=f"user{k}").raise_for_status()
        admin_command(program, "resume", user=f"user{k}").raise_for_status()
        assert again[k].logp() == first
        await again[k].learn()


def test_a_user_added_later_starts_from_the_starting_weights(fresh):
    """The key file is read again when it changes."""
    program = started(fresh, ("alice",))
    first = Talker(program, "alice").logp()
    write_private(program.out / "keys", "alice:key-alice\ndora:key-dora\n")
    assert Talker(program, "dora").logp() == first
