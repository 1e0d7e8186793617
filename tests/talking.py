"""Talk to a running program, and read its journal."""

import asyncio
import json
import sqlite3
import time
from contextlib import closing

import httpx
import numpy as np
import openai

from durable import pieces

ALICE, BOB = "key-a", "key-b"


opened: list[openai.AsyncOpenAI] = []


def client(program, key=ALICE):
    opened.append(openai.AsyncOpenAI(base_url=f"{program.url}/v1", api_key=key, max_retries=0, timeout=120))
    return opened[-1]


def query(program, sql, *values):
    db = sqlite3.connect(program.out / "journal.db")
    db.row_factory = sqlite3.Row
    found = db.execute(sql, values).fetchall()
    db.close()
    return found


def rows(program, where="1", *values):
    """The turns, with their token ids and log-probs as int32 and float32."""
    found = [dict(r) for r in query(program, f"SELECT * FROM readable WHERE {where} ORDER BY created", *values)]
    with closing(sqlite3.connect(program.out / "journal.db")) as db:
        for r in found:
            r |= {name: pieces.unpacked(r[name]) for name in ("response_ids", "logprobs")}
            r["prompt_ids"] = np.asarray(pieces.tokens_of(db, r["prompt_ids"]), np.int32).tobytes()
    return found


async def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.2)
    return value


def user(text):
    return {"role": "user", "content": text}


async def ask(c, messages, max_tokens=12, **kwargs):
    return await c.chat.completions.create(model="policy", messages=messages, max_tokens=max_tokens, **kwargs)


async def rated(program, question, score=1, text="", **options):
    """Ask a question and rate the answer: the shortest way to get a turn into a batch. Return the answer's id."""
    reply = await ask(client(program, program.key or "none"), [user(question)], **options)
    body = {"completion_id": reply.id, "score": score, "text": text}
    headers = {"Authorization": f"Bearer {program.key or 'none'}"}
    httpx.post(f"{program.url}/v1/feedback", json=body, headers=headers, timeout=30).raise_for_status()
    return reply.id


def glance(program, key="none"):
    """What the page shows at a glance: the first event of its stream."""
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.stream("GET", f"{program.url}/web/events", headers=headers, timeout=30) as reply:
        reply.raise_for_status()
        return json.loads(next(line for line in reply.iter_lines() if line.startswith("data: "))[6:])
