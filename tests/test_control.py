"""Admin commands to the running program, and training that fails and continues."""

import json
import sqlite3
import subprocess
import sys

import httpx
import numpy as np
import pytest

from durable import journal, pieces
from tests.conftest import ROOT
from tests.talking import ask, client, query, rated, rows, until, user


@pytest.fixture
def program(fresh):
    return fresh(batch_size=2, save_every=1).wait_ready()


def admin(program, *words):
    command = [sys.executable, "-m", "durable.admin", *words, f"--out={program.out}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    return done.returncode, done.stdout + done.stderr


def training(program):
    return program.status()["training"]


def metrics(program):
    headers = {"Authorization": f"Bearer {(program.out / 'admin_key').read_text().strip()}"}
    lines = httpx.get(f"{program.url}/metrics", headers=headers, timeout=30).text.splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if line.startswith("openclaw_rl_"))


async def test_admin_commands_work_while_the_program_runs(program):
    assert admin(program, "pause")[0] == 0 and training(program) == "paused by the admin"
    first = [await rated(program, f"q{i}") for i in range(2)]
    reply = await ask(client(program, "none"), [user("do you still answer?")])
    assert reply.choices[0].finish_reason and program.status()["turns"]["queued"] == 2
    assert admin(program, "resume")[0] == 0
    await until(lambda: program.status()["step"] == 1)
    single = await rated(program, "q2", -1, "Answer in one short sentence, please.")
    assert admin(program, "train")[0] == 0
    await until(lambda: program.status()["step"] == 2)
    seen = await until(lambda: (f := metrics(program))["openclaw_rl_step"] == "2.0" and f)
    assert seen["openclaw_rl_training"] == "1.0" and seen['openclaw_rl_turns{state="trained"}'] == "3.0"
    assert float(seen['openclaw_rl_last_step{key="step"}']) == 2 and seen["openclaw_rl_judge_failures_total"] == "0.0"

    assert admin(program, "rollback", "--step=7")[0] == 1
    await until(lambda: (program.out / "checkpoints" / "step-000001").exists())
    code, said = admin(program, "rollback", "--step=1")
    assert code == 0 and "step 1 is now current" in said
    assert program.status()["step"] == 1 and [m["step"] for m in program.metrics()] == [1]
    assert rows(program, "id = ?", single)[0]["state"] == "dropped"
    more = [await rated(program, f"q{i}") for i in range(3, 5)]
    await until(lambda: program.status()["step"] == 2)  # training continues from there
    assert {r["id"] for r in rows(program, "state = 'trained'")} == {*first, *more}

    session = rows(program, "id = ?", first[0])[0]["session"]
    assert admin(program, "forget", f"--session={session}")[0] == 0 and not rows(program, "id = ?", first[0])
    stranger = httpx.post(f"{program.url}/admin/pause", json={})
    assert stranger.status_code == 403 and "admin_key" in stranger.json()["error"]["message"]
    assert training(program) == "on"


async def test_a_failing_step_stops_training_but_not_serving_and_its_turn_is_set_aside(program):
    """A token id outside the vocabulary, as a broken disk could leave in the journal, fails every step that has it."""
    assert admin(program, "pause")[0] == 0
    poison, other = [await rated(program, f"q{i}") for i in range(2)]
    db = sqlite3.connect(program.out / "journal.db")
    (number,) = db.execute("SELECT number FROM turns WHERE id = ?", (poison,)).fetchone()
    (kept,) = db.execute("SELECT response_ids FROM answers WHERE number = ?", (number,)).fetchone()
    broken = pieces.packed((np.frombuffer(pieces.unpacked(kept), np.int32) + 999_999).tobytes())
    db.execute("UPDATE answers SET response_ids = ? WHERE number = ?", (broken, number))
    db.commit()
    for _ in range(2):
        assert admin(program, "resume")[0] == 0
        await until(lambda: training(program).startswith("stopped: "))
        assert {r["state"] for r in rows(program, "id IN (?, ?)", poison, other)} == {"queued"}
        assert (await ask(client(program, "none"), [user("are you there?")])).choices
    assert admin(program, "resume")[0] == 0
    await until(lambda: rows(program, "id = ?", poison)[0]["state"] == "dropped")
    assert "set aside, since training fails on it" in rows(program, "id = ?", poison)[0]["reason"]
    admin(program, "resume")
    await until(lambda: rows(program, "id = ?", other)[0]["state"] == "trained")

    # A row is damaged while it waits for the trainer: it is dropped, and the other turns are trained on.
    lost = await rated(program, "q8")
    db.execute("UPDATE answers SET logprobs = X'00' WHERE number = (SELECT number FROM turns WHERE id = ?)", (lost,))
    db.commit()
    kept = [await rated(program, f"q{i}") for i in (9, 10, 11)]
    await until(lambda: {r["state"] for r in rows(program, "id IN (?, ?, ?)", *kept)} == {"trained"})
    assert query(program, "SELECT reason FROM turns WHERE id = ?", lost)[0]["reason"] == journal.UNREADABLE

    # A file can't be written: the step counts, training stops, gives the reason and retries by itself.
    (program.out / "metrics.jsonl").unlink()
    (program.out / "metrics.jsonl").mkdir()
    trained = [await rated(program, f"q{i}") for i in range(2, 4)]
    await until(lambda: "Is a directory" in training(program))
    assert {r["state"] for r in rows(program, "id IN (?, ?)", *trained)} == {"trained"}
    (program.out / "metrics.jsonl").rmdir()
    await until(lambda: training(program) == "on", 30)
    before = program.status()["step"]
    for i in range(4, 6):
        await rated(program, f"q{i}")
    await until(lambda: program.status()["step"] == before + 1)
    assert json.loads((program.out / "metrics.jsonl").read_text())["step"] == before + 1
