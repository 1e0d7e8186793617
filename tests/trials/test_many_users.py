"""The cost of many users with an adapter each, SmolLM2-135M and rank 16: disk, startup, reload, push, batch speed."""

import asyncio
import shutil
import sqlite3
import statistics
import time
from contextlib import closing

import pytest

from durable import checkpoint
from durable.model import model_folder
from tests.conftest import Program
from tests.talking import client, user
from tests.test_users import Talker

USERS, STREAMS, TOKENS = 100, 16, 64


def start(out):
    keys = ",".join(f"u{i}:key-u{i}" for i in range(USERS))
    options = {"adapters": "user", "lora_rank": 16, "batch_size": 1, "judge_style": "chat", "key": keys}
    begun = time.monotonic()
    program = Program(model_folder(""), out, **options).wait_ready()
    return program, time.monotonic() - begun


async def tokens_per_second(program, users):
    """With STREAMS answers at once, spread over this many users."""

    async def answer(i):
        c = client(program, f"key-u{i % users}").chat.completions
        options = {"max_tokens": TOKENS, "extra_body": {"ignore_eos": True}}
        await c.create(model="policy", messages=[user(f"Tell me about {i}.")], **options)

    await asyncio.gather(*map(answer, range(STREAMS)))  # warm-up: adapters are loaded from disk
    begun = time.monotonic()
    await asyncio.gather(*map(answer, range(STREAMS)))
    return STREAMS * TOKENS / (time.monotonic() - begun)


@pytest.mark.timeout(1800)
async def test_startup_and_reloading_are_fast_with_many_users(tmp_path):
    out = tmp_path / "out"
    program, alone = start(out)
    await Talker(program, "u0").learn(3)
    push = statistics.median(m["push_s"] for m in program.metrics())
    program.stop()
    saved = checkpoint.folder_of(out, "u0", 3)
    size = sum(file.stat().st_size for file in saved.iterdir())
    with closing(sqlite3.connect(out / "journal.db")) as db, db:
        for i in range(1, USERS):
            shutil.copytree(saved, checkpoint.folder_of(out, f"u{i}", 3))
            db.execute("INSERT INTO checkpoints VALUES (?, 3)", (f"u{i}",))
    program, many = start(out)
    begun = time.monotonic()
    logp = Talker(program, "u50").logp()
    back, begun = time.monotonic() - begun, time.monotonic()
    assert Talker(program, "u50").logp() == logp
    there = time.monotonic() - begun
    speeds = {users: await tokens_per_second(program, users) for users in (1, 3, 16, 1)}
    program.stop()
    print(
        f"\na checkpoint {size / 2**20:.0f} MiB; start with 1 user {alone:.1f} s, with {USERS} on disk {many:.1f} s\n"
        f"first answer of one token to a user who was away {back:.2f} s, the next one {there:.2f} s\n"
        f"a push with its check {push:.2f} s; {STREAMS} streams of {', '.join(map(str, speeds))} users: "
        f"{', '.join(f'{v:.0f}' for v in speeds.values())} tokens/s"
    )
    assert many < 2 * alone + 10 and back < 5
