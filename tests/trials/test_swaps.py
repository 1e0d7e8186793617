"""A thousand streams across fifty swaps: no errors, none cut off, all recorded as the client received them."""

import asyncio
import time

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.talking import ask, client, rated, rows, user

REQUESTS, SWAPS, AT_ONCE, TOKENS = 1000, 50, 32, 60


@pytest.mark.timeout(3600)
async def test_streams_across_swaps_are_complete_and_recorded_as_received(fresh, tiny_model):
    program = fresh(batch_size=2, max_staleness=10**6).wait_ready()
    seen, errors, longest, c = {}, [], 0.0, client(program, "none")
    done = asyncio.Event()

    async def stream(i):
        nonlocal longest
        text, finish, last = "", None, time.monotonic()
        try:
            async for part in await ask(c, [user(f"stream {i}")], TOKENS, stream=True, extra_body={"ignore_eos": True}):
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
                for choice in part.choices:
                    text, finish = text + (choice.delta.content or ""), choice.finish_reason or finish
            seen[part.id] = text
            assert finish == "length", finish
        except Exception as e:  # counts any error that a client can get
            errors.append((i, repr(e)))

    async def feed():
        i = 0
        while not done.is_set():
            await rated(program, f"feed {i}", (1, -1)[i % 2])
            i += 1

    feeding, limit, i = asyncio.create_task(feed()), asyncio.Semaphore(AT_ONCE), 0
    streams = set()

    async def limited(n):
        async with limit:
            await stream(n)

    while i < REQUESTS or program.status()["step"] < SWAPS:
        assert not feeding.done() and not errors, errors[:3]
        streams |= {asyncio.create_task(limited(i + k)) for k in range(AT_ONCE)}
        i += AT_ONCE
        while len(streams) > 2 * AT_ONCE:
            finished, streams = await asyncio.wait(streams, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.gather(*streams)
    done.set()
    await feeding

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    found = {r["id"]: r for r in rows(program)}
    differ = [
        turn_id
        for turn_id, text in seen.items()
        if tokenizer.decode(
            np.frombuffer(found[turn_id]["response_ids"], np.int32).tolist(), skip_special_tokens=True
        ).rstrip("\ufffd")
        != text.rstrip("\ufffd")
        or found[turn_id]["text"] != text
    ]
    across = sum(len(found[turn_id]["versions"].split("[")) > 3 for turn_id in seen)
    print(
        f"{len(seen)} streams whole, {len(errors)} errors, {len(differ)} recorded otherwise, {across} across a swap, "
        f"{program.status()['step']} swaps; longest wait for a token {longest:.2f} s"
    )
    assert len(seen) >= REQUESTS and not errors and not differ and across > 50
