"""What clients notice of training: stream answers continuously from a running server, across its weight swaps.

    python -m evaluation.bench --url=http://127.0.0.1:8000 --swaps=10 [--key=KEY]

Run it during `make run` (with --key=one-sentence-key) or while your agent works. It streams one answer after the other
until there were --swaps swaps. Then it prints how many answers were complete, and the longest gap between two tokens,
with and without a swap in it.
"""

import asyncio
import time
from dataclasses import dataclass

import httpx
import tyro
from openai import AsyncOpenAI, OpenAIError


async def stream(url: str, key: str, swaps: int, tokens: int = 120) -> None:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=600)
    headers = {"Authorization": f"Bearer {key}"}
    seen: dict[int, tuple[float, float]] = {}  # step -> when its swap's pause began and ended
    gaps: list[tuple[float, float]] = []  # (when a token came, when the next one came)
    whole, short, errors = 0, 0, 0

    async def watch(http: httpx.AsyncClient) -> None:
        first = (await http.get("/status")).json()["step"]
        while len(seen) < swaps:
            status = (await http.get("/status")).json()
            if status["step"] > first:
                seen[status["step"]] = tuple(status["pause"])
            await asyncio.sleep(0.5)

    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as http:
        watching = asyncio.create_task(watch(http))
        while not watching.done():
            try:
                parts = await client.chat.completions.create(
                    model="policy",
                    messages=[{"role": "user", "content": "Tell me a long story about the sea."}],
                    max_tokens=tokens,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"ignore_eos": True},
                )
                last, count = 0.0, 0
                async for part in parts:
                    now = time.time()
                    if last and part.choices:
                        gaps.append((last, now))
                    last = now
                    count = part.usage.completion_tokens if part.usage else 0
                whole, short = whole + (count == tokens), short + (count != tokens)
            except OpenAIError as e:
                errors += 1
                print(f"error: {e}")
        await watching  # raises its errors

    def longest(with_swap: bool) -> float:
        hit = [b - a for a, b in gaps if any(a < end and began < b for began, end in seen.values()) == with_swap]
        return max(hit, default=float("nan"))

    pauses = [end - began for began, end in seen.values()]
    print(f"{whole} answers complete, {short} cut short, {errors} errors, over {len(seen)} swaps")
    print(f"longest gap between two tokens: {longest(False):.2f} s without a swap, {longest(True):.2f} s with one")
    print(f"the swap's own pause: longest {max(pauses):.2f} s, shortest {min(pauses):.2f} s")


@dataclass(frozen=True)
class Options:
    url: str = "http://127.0.0.1:8000"  # of run.py
    key: str = "none"
    swaps: int = 10  # how many to wait for


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    asyncio.run(stream(options.url, options.key, options.swaps))
