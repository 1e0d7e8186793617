"""Deduplicated storage of texts and token ids: each turn of a conversation repeats everything before it.

A piece is found by the hash of its data. Texts are JSON (TEXT, readable with sqlite3), token ids are compressed int32
(BLOB). Long lists have two levels: a row has the ids of pieces which are themselves lists of piece ids, so that turns
share most of their lists, too.
"""

import json
import sqlite3
import zlib
from hashlib import blake2b
from typing import Any

import numpy as np

SCHEMA = "CREATE TABLE IF NOT EXISTS pieces (id INTEGER PRIMARY KEY, hash BLOB UNIQUE, data NOT NULL);"
# The fields of a message that vLLM 0.32.0 reads (`_parse_chat_message_content`) or writes.
KNOWN = ("role", "content", "name", "tool_call_id", "tool_calls", "reasoning", "reasoning_content", "tools", "task")
TOKENS, LIST = 256, 16  # numbers in a piece, on average


def as_json(value: Any) -> str:
    """JSON that a person can read. A lone surrogate, which SQLite can't store, stays escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def put(db: sqlite3.Connection, data: list[str | bytes]) -> list[int]:
    """The ids of these pieces; new ones are stored."""
    ids = []
    for d in data:
        h = blake2b(d.encode() if isinstance(d, str) else d, digest_size=16).digest()
        if found := db.execute("SELECT id FROM pieces WHERE hash = ?", (h,)).fetchone():
            ids.append(found[0])
        else:
            stored = d if isinstance(d, str) else packed(d)
            ids.append(db.execute("INSERT INTO pieces VALUES (NULL, ?, ?)", (h, stored)).lastrowid)
    return ids


def packed(numbers: bytes) -> bytes:
    """4-byte numbers, compressed: first the lowest byte of each, then the next. Token ids have a highest byte of 0."""
    return zlib.compress(np.frombuffer(numbers, np.uint8).reshape(-1, 4).T.tobytes(), 1)


def unpacked(data: bytes) -> bytes:
    return np.frombuffer(zlib.decompress(data), np.uint8).reshape(4, -1).T.tobytes()


def cut(numbers: np.ndarray, mean: int) -> list[np.ndarray]:
    """Blocks of mean / 4 to 4 mean numbers (the last may be shorter). The numbers themselves determine the cuts
    (content-defined chunking), so that an insertion or deletion moves no later cut (agents put the time in the first
    message)."""
    mixed = numbers.astype(np.uint32) * np.uint32(2654435761)
    mixed[1:] ^= (mixed[:-1] * np.uint32(40503)) >> 7
    cuts = [0]
    for at in [*np.flatnonzero((mixed >> 12) % mean == 0).tolist(), len(numbers)]:
        cuts += range(cuts[-1] + 4 * mean, at, 4 * mean)
        if at - cuts[-1] >= mean // 4:
            cuts.append(at)
    return [block for block in np.split(numbers, cuts) if len(block)]


def put_texts(db: sqlite3.Connection, messages: list[dict]) -> list[int]:
    """One piece for each message, with its KNOWN fields."""
    return put(db, [as_json({k: v for k, v in m.items() if k in KNOWN}) for m in messages])


def put_list(db: sqlite3.Connection, ids: list[int]) -> str:
    return as_json(put(db, [as_json(block.tolist()) for block in cut(np.asarray(ids, np.int64), LIST)]))


def put_tokens(db: sqlite3.Connection, tokens: list[int]) -> str:
    blocks = cut(np.asarray(tokens, np.int32), TOKENS)
    return put_list(db, put(db, [block.tobytes() for block in blocks]))


# SQL: the rows (data) of a column's list of pieces, and of a list in two levels.
ITEMS = "json_each({}) AS e CROSS JOIN pieces AS p ON p.id = e.value"
NESTED = "json_each({}) AS l CROSS JOIN pieces AS n ON n.id = l.value CROSS JOIN " + ITEMS.format("n.data")


def as_list(rows: str) -> str:
    """SQL: these rows as a JSON list, in order."""
    return f"(SELECT '[' || coalesce(group_concat(p.data, ','), '') || ']' FROM {rows})"


def tokens_of(db: sqlite3.Connection, column: str) -> list[int]:
    found = db.execute(f"SELECT p.data FROM {NESTED.format('?')} ORDER BY l.key, e.key", (column,)).fetchall()
    return np.frombuffer(b"".join(unpacked(r[0]) for r in found), np.int32).tolist()
