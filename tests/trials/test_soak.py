"""Over 50,000 short requests, memory levels off. The size of the journal is printed."""

import asyncio
import os
from pathlib import Path

import httpx
import pytest

from tests.conftest import descendants

REQUESTS, AT_ONCE, EVERY = 50_000, 64, 5_000


def resident_mib(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.timeout(7200)
async def test_memory_levels_off_over_many_requests(fresh):
    program = fresh(
        max_waiting=500, judge_url="http://127.0.0.1:9/v1", judge_model="m"
    ).wait_ready()  # the judge is down all the time
    pids = [program.process.pid, *[pid for pid, _ in descendants(program.process.pid)]]
    talks, answered, curve = iter(range(REQUESTS // 2)), 0, []

    async def talk(http):
        nonlocal answered
        for i in talks:
            messages = [{"role": "user", "content": f"question {i}"}]
            for _ in range(2):
                body = {"model": "policy", "messages": messages, "max_tokens": 1}
                reply = (await http.post("/v1/chat/completions", json=body)).raise_for_status().json()
                said = {"role": "assistant", "content": reply["choices"][0]["message"]["content"]}
                messages += [said, {"role": "user", "content": "go on"}]
                answered += 1
            if answered // EVERY > len(curve):
                size = sum(p.stat().st_size for p in program.out.glob("journal.db*")) / 2**20
                curve.append([size, *map(resident_mib, pids)])
                print(answered, "requests: journal, then each process, MiB:", *map(round, curve[-1]), flush=True)

    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=program.url, timeout=120, limits=limits) as http:
        await asyncio.gather(*[talk(http) for _ in range(AT_ONCE)])
    turns = program.status()["turns"]
    print(turns, program.status()["dropped"])
    assert turns["judging"] <= 501 and sum(turns.values()) >= REQUESTS * 0.99
    # The engine's heap grows by a fifth in the first half, more and more slowly, and then levels off.
    for a, b in zip(curve[len(curve) // 2][1:], curve[-1][1:], strict=True):
        assert b < a * 1.1 + 30, f"a process grew from {a:.0f} to {b:.0f} MiB"
