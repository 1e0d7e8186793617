"""How long the page takes to fill, and how much it slows down chats, when the journal has many turns."""

import asyncio
import statistics
import time

import pytest
from playwright.async_api import async_playwright, expect

from durable import journal
from tests.conftest import Program
from tests.records import BAD, turn
from tests.talking import ask, client, user
from tests.test_page import CHROMIUM, needs_browser
from tests.trials.test_size import fill

BLOCKS, EACH = 5, 25  # alternately without and with the page open; requests per block


async def milliseconds(c, count):
    """The durations of small requests."""
    times = []
    for k in range(count):
        begun = time.perf_counter()
        await ask(c, [user(f"hello {k}")], 4)
        times.append((time.perf_counter() - begun) * 1e3)
        await asyncio.sleep(0.1)
    return times


@needs_browser
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [10_000, 1_000_000])
async def test_the_page_fills_quickly_with_many_turns(tiny_model, tmp_path, size):
    db = journal.open_journal(tmp_path / "journal.db")
    journal.record_turn(
        db, turn("t1", text="x" * 300, response_ids=[3] * 100, logprobs=[-0.5] * 100, versions=[(0, 0, 100)])
    )
    journal.record_verdict(db, "t1", BAD)
    db.close()
    begun = time.time() - size
    fill(tmp_path / "journal.db", size, step="0", created=f"{begun} + k", score="1 - k % 3")
    program = Program(tiny_model, tmp_path, batch_size=1000).wait_ready()
    opened, chats = [], {"no page": [], "an open page": []}
    try:
        c = client(program, "none")
        await milliseconds(c, 5)
        async with async_playwright() as playwright:
            chromium = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            for _ in range(BLOCKS):
                chats["no page"] += await milliseconds(c, EACH)
                page = await chromium.new_page()
                begun = time.perf_counter()
                await page.goto(program.url)
                await page.locator(".turn").nth(29).wait_for()
                await page.locator("#pleased canvas").wait_for()
                opened.append(time.perf_counter() - begun)
                await expect(page.locator("#total")).to_contain_text(f"{size:,}"[:-3])
                chats["an open page"] += await milliseconds(c, EACH)
                await page.close()
            await chromium.close()
    finally:
        program.stop()
    print(f"\n{size:,} turns: filled after {', '.join(f'{s:.2f}' for s in opened)} s")
    for name, times in chats.items():
        of_20 = statistics.quantiles(times, n=20)
        print(f"  a small chat request, {name}: median {of_20[9]:.0f} ms, 95 % below {of_20[18]:.0f} ms")
    assert max(opened) < (1 if size == 10_000 else 2)
