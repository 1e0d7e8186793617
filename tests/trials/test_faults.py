"""Faults around the program, caused on purpose: each gives a message, nothing hangs or is lost, and it continues."""

import asyncio
import itertools
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import openai
import pytest

from durable import journal
from tests.conftest import ROOT, Program, alive, descendants, engine_processes, free_port, make_tiny_model
from tests.talking import ask, client, glance, query, rated, rows, until, user


async def wait_until_served(program, seconds=180):
    """Wait until a request gets an answer, and return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            return await ask(client(program, "none"), [user("are you there?")])
        except openai.APIError:
            assert program.process.poll() is None, program.log()[-3000:]
            await asyncio.sleep(1)
    raise TimeoutError(program.log()[-3000:])


@pytest.mark.timeout(1200)
async def test_the_program_restarts_after_the_engine_is_killed(fresh):
    program = fresh(batch_size=2, save_every=1)
    program.wait_ready()
    started = time.monotonic()
    trained = [await rated(program, f"q{i}") for i in range(2)]
    await until(lambda: program.status()["step"] == 1)
    await asyncio.sleep(max(0, 65 - (time.monotonic() - started)))  # a crash within 60 s counts as permanent
    options = dict(n=32, extra_body={"ignore_eos": True})
    long = asyncio.create_task(ask(client(program, "none"), [user("go on")], 1900, **options))
    await asyncio.sleep(1)
    (engine,) = engine_processes(program)
    admin = {"Authorization": f"Bearer {(program.out / 'admin_key').read_text().strip()}"}
    httpx.post(f"{program.url}/admin/pause", json={}, headers=admin).raise_for_status()
    killed = time.monotonic()
    os.kill(engine, signal.SIGKILL)
    with pytest.raises(openai.APIError):  # an error within 30 s, not a hang
        await asyncio.wait_for(long, 30)
    await until(lambda: "starting again from the last checkpoint" in program.log())
    await wait_until_served(program)
    assert program.status()["step"] == 1 and {r["id"] for r in rows(program, "step = 1")} == set(trained)
    assert program.status()["training"] == "paused by the admin"
    print(f"the engine killed: served again {time.monotonic() - killed:.0f} s later")


@pytest.mark.timeout(600)
async def test_the_program_restarts_after_an_engine_dies_during_a_swap(fresh):
    """The engine is stopped, so that the push waits for it; then it is killed."""
    program = fresh(batch_size=2).wait_ready()
    ready = time.monotonic()
    turns = [await ask(client(program, "none"), [user(f"q{i}")]) for i in range(2)]
    await asyncio.sleep(max(0, 65 - (time.monotonic() - ready)))
    (engine,) = engine_processes(program)
    os.kill(engine, signal.SIGSTOP)
    for reply in turns:
        httpx.post(f"{program.url}/v1/feedback", json={"completion_id": reply.id, "score": 1}).raise_for_status()
    await asyncio.sleep(8)  # a step takes one second
    assert program.status()["turns"]["training"] == 2 and program.status()["step"] == 0, "the push waits"
    os.kill(engine, signal.SIGKILL)
    await until(lambda: "starting again from the last checkpoint" in program.log())
    await wait_until_served(program)
    await until(lambda: program.status()["step"] == 1)
    assert {r["id"] for r in rows(program, "step = 1")} == {reply.id for reply in turns}


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={(journal.RESERVE >> 20) + 40}m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.timeout(600)
async def test_a_full_disk_stops_answers_until_there_is_space(tiny_model, small_disk):
    program = Program(tiny_model, small_disk / "out", batch_size=2, save_every=1)
    try:
        program.wait_ready()
        first = [await rated(program, f"q{i}") for i in range(2)]
        await until(lambda: program.status()["step"] == 1)
        one = await ask(client(program, "none"), [user("one")])
        two = await ask(client(program, "none"), [user("two")])
        for share in (0.5, 1.0):  # first below the reserve, then completely full
            free = shutil.disk_usage(small_disk).free
            with open(small_disk / "ballast", "ab") as f:
                f.write(b"x" * int(free * share))
            with pytest.raises(openai.APIStatusError, match="disk is full") as error:
                await ask(client(program, "none"), [user("three")])
            assert error.value.status_code == 507
            assert glance(program)["why"].startswith("The disk is full: ")
            assert httpx.get(f"{program.url}/status").status_code == 200 and program.process.poll() is None
        (small_disk / "ballast").unlink()
        for reply in (one, two):
            body = {"completion_id": reply.id, "score": 1}
            httpx.post(f"{program.url}/v1/feedback", json=body).raise_for_status()
        await until(lambda: program.status()["step"] == 2)
        assert {r["id"] for r in rows(program, "state = 'trained'")} == {*first, one.id, two.id}

        # space for the journal but not for a checkpoint: training continues, and the checkpoint is written later
        free = shutil.disk_usage(small_disk).free
        (small_disk / "ballast").write_bytes(b"x" * (free - journal.RESERVE - (3 << 20)))
        for i in range(2):
            await rated(program, f"r{i}")
        await until(lambda: program.status()["step"] == 3)
        await until(lambda: "no checkpoint of step 3" in program.log())
        assert query(program, "SELECT MAX(step) FROM checkpoints")[0][0] == 2
        (small_disk / "ballast").unlink()
        assert program.stop() < 15 and program.process.returncode == 0
        assert query(program, "SELECT MAX(step) FROM checkpoints")[0][0] == 3
    finally:
        program.stop()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", [resource.RLIMIT_NOFILE, resource.RLIMIT_AS], ids=["files", "memory"])
async def test_training_waits_when_descriptors_or_memory_run_out(fresh, what):
    """No file descriptor is left, or no memory for a step: training says so and waits, answers continue."""
    program = fresh(batch_size=2).wait_ready()
    first = [await rated(program, f"q{i}") for i in range(2)]
    await until(lambda: program.status()["step"] == 1)
    pid = program.process.pid
    before = resource.prlimit(pid, what)
    with httpx.Client(base_url=program.url, timeout=30) as http:
        http.get("/status")
        free = min(set(range(1000)) - {int(fd) for fd in os.listdir(f"/proc/{pid}/fd")})
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        limit = free if what == resource.RLIMIT_NOFILE else pages * resource.getpagesize() + (3 << 20)
        resource.prlimit(pid, what, (limit, before[1]))
        with socket.create_connection(("127.0.0.1", program.port)):
            for _ in range(2):
                body = {"model": "policy", "messages": [user("x" * 1700)], "max_tokens": 12}
                reply = http.post("/v1/chat/completions", json=body).raise_for_status().json()
                http.post("/v1/feedback", json={"completion_id": reply["id"], "score": 1}).raise_for_status()
            stopped = await until(lambda: http.get("/status").json()["training"].partition("stopped: ")[2])
            print(stopped)
            await asyncio.sleep(3)
        assert http.get("/status").json()["turns"] == {"trained": 2, "queued": 2}
        resource.prlimit(pid, what, before)
    assert program.log().count("Traceback") < 20, "the log is not flooded"
    subprocess.run([sys.executable, "-m", "durable.admin", "resume", f"--out={program.out}"], check=True, cwd=ROOT)
    await until(lambda: program.status()["step"] == 2)
    assert not {r["id"] for r in rows(program, "step = 2")} & set(first)


def test_a_read_only_folder_gives_an_error_of_one_line(tiny_model, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    command = [sys.executable, str(ROOT / "run.py"), f"--model={tiny_model}", f"--out={small_disk}/out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert f"--out={small_disk}/out: " in done.stderr and "Read-only file system" in done.stderr


class Judge(BaseHTTPRequestHandler):
    mode = "refuses"

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if Judge.mode == "hangs":
            time.sleep(120)
        body = {
            "refuses": b'{"error": {"message": "no"}}',
            "no json": b"<html>",
            "no choices": b"{}",
            "lies": json.dumps({"choices": [{"message": {"role": "assistant", "content": "excellent"}}] * 3}).encode(),
            "huge": json.dumps({"choices": [{"message": {"content": "x" * (8 << 20)}}] * 3}).encode(),
            "good": json.dumps(
                {"choices": [{"message": {"role": "assistant", "content": "good"}, "index": i} for i in range(3)]}
            ).encode(),
        }.get(Judge.mode, b"")
        self.send_response(500 if Judge.mode == "refuses" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.timeout(1200)
async def test_a_failing_judge_only_delays_verdicts(fresh):
    server = ThreadingHTTPServer(("127.0.0.1", free_port()), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    program = fresh(judge_url=url, judge_model="j", batch_size=100).wait_ready()

    async def talk(text):
        reply = await ask(client(program, "none"), [user(text)])
        said = {"role": "assistant", "content": reply.choices[0].message.content}
        await ask(client(program, "none"), [user(text), said, user("No, that was wrong.")])
        return reply.id

    asked = []
    for Judge.mode in ("refuses", "no json", "no choices", "lies", "huge", "hangs"):
        asked.append(await talk(f"the judge {Judge.mode}"))
        await asyncio.sleep(8)
        started = time.monotonic()
        await ask(client(program, "none"), [user("quick")], 1)
        assert time.monotonic() - started < 5, f"serving waits for a judge that {Judge.mode}"
        assert all(r["state"] == "judging" and r["score"] is None for r in rows(program, "next_messages IS NOT NULL"))
    Judge.mode = "good"
    await until(lambda: len(rows(program, "score = 1")) == len(asked), 200)
    assert {r["id"] for r in rows(program, "state = 'queued'")} == set(asked)
    server.shutdown()


def test_a_damaged_or_missing_model_gives_an_error_of_one_line(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    for model, why in ((folder, "is damaged"), (tmp_path / "nowhere", "no config.json")):
        command = [sys.executable, str(ROOT / "run.py"), f"--model={model}", f"--out={tmp_path}/out"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and why in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.timeout(1800)
async def test_sigterm_or_ctrl_c_at_any_moment_is_a_clean_stop(fresh):
    """A step of the tiny model takes about a second here, and includes a swap and a checkpoint."""
    rng, steps = random.Random(1), 0
    for i in range(10):
        program = fresh(batch_size=2, save_every=1, max_staleness=10**6).wait_ready()
        assert program.status()["step"] >= steps, "a clean stop loses nothing"

        async def feed(program=program):
            for score in itertools.cycle((1, -1)):
                await rated(program, "q", score, "Answer in one word, please.")

        feeding = asyncio.create_task(feed())
        await asyncio.sleep(rng.uniform(2, 7))
        steps = program.status()["step"]
        children = [pid for pid, _ in descendants(program.process.pid)]
        if i % 2:
            os.killpg(program.process.pid, signal.SIGINT)  # Ctrl-C in a terminal: to the whole group
            seconds = await asyncio.to_thread(program.wait_end)
        else:
            seconds = await asyncio.to_thread(program.stop)
        assert program.process.returncode == 0 and seconds < 15, program.log()[-3000:]
        await asyncio.gather(feeding, return_exceptions=True)
        await until(lambda: not alive(children), 15)  # noqa: B023
        trained = [r["step"] for r in rows(program, "state = 'trained'")]
        last = query(program, "SELECT MAX(step) FROM checkpoints")[0][0] or 0
        assert {s: trained.count(s) for s in trained} == {s: 2 for s in range(1, last + 1)}
        assert not [r for r in rows(program, "reason LIKE 'hint not used%'")], "a stop must not discard a hint"
        print(f"stopped in {seconds:.1f} s after step {last}, asked at {steps}")
        steps = last
