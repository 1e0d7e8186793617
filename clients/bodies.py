"""Requests and answers as bytes and JSON: what is read of a body, what is refused, and OpenAI's form of an error."""

import asyncio
import json
from typing import Any

import numpy as np
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Send

MAX_BODY_BYTES = 32 << 20
LONG_BODY = 1 << 20  # bytes; from here on it is parsed in a thread
BODY_S = 60.0  # without any progress in a request's body
MAX_ANSWERED_BYTES = 64 << 20  # n answers times the body
MAX_MESSAGES = 10_000  # with their parts and calls
MAX_VALUES, MAX_DEPTH = 200_000, 100  # of a body's JSON
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def openai_error(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


async def read_body(receive: Receive) -> bytes | JSONResponse | None:
    """A request's body, or an error; None where the client hung up."""
    body, more = bytearray(), True
    while more:
        try:
            message = await asyncio.wait_for(receive(), BODY_S)
        except TimeoutError:
            error = openai_error(408, f"nothing more of the body came for {BODY_S:g} s")
            error.headers["connection"] = "close"
            return error
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY_BYTES:
            return openai_error(413, f"the body is over {MAX_BODY_BYTES >> 20} MiB")
    return bytes(body)


def parse(body: bytes) -> Any:
    """A JSON text's value. ValueError where it is none, has too many values, or is too deep: what reads it later would
    stop everything for seconds, or raise a RecursionError.

    When this runs in a thread, the event loop gets the GIL only between the calls below, so several short calls are
    better than one long one."""
    text = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if text.count(b'"') > 4 * MAX_VALUES:  # a value and its key have four
        raise ValueError(f"more than {MAX_VALUES} values")
    marks = b"".join(text.split(b'"')[::2])  # what is outside of strings
    if (values := sum(map(marks.count, (b",", b"[", b"{")))) > MAX_VALUES:
        raise ValueError(f"{values} values, more than {MAX_VALUES}")
    brackets = np.frombuffer(marks.translate(None, NO_BRACKETS), np.uint8)
    steps = np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1)
    if (depth := steps.cumsum().max(initial=0)) > MAX_DEPTH:
        raise ValueError(f"nested {depth} levels deep, more than {MAX_DEPTH}")
    return json.loads(body.decode())  # as UTF-8 alone: in UTF-16 other bytes are quotes


def too_much(fields: dict, messages: Any, size: int) -> str | None:
    """Why a request of `size` bytes is more than can be served; None where it isn't, and for what vLLM refuses."""
    listed = messages if isinstance(messages, list) else []
    lists = [m.get(name) for m in listed if isinstance(m, dict) for name in ("content", "tool_calls")]
    if len(listed) + sum(len(found) for found in lists if isinstance(found, list)) > MAX_MESSAGES:
        return f"more than {MAX_MESSAGES} messages, parts of them and calls"
    try:
        n = int(fields.get("n") or 1)
    except (ValueError, TypeError, OverflowError):
        return None
    if n * size > MAX_ANSWERED_BYTES:
        return f"n={n} answers to a body of {size} bytes: more than {MAX_ANSWERED_BYTES} bytes together"
    return None


def with_reasoning_content(send: Send) -> Send:
    """vLLM 0.32.0 calls the thinking of a chat answer `reasoning`; OpenClaw sends it back with the history only if it
    came as `reasoning_content`. (Inside a JSON text the quotes would be escaped: these bytes are always the key.)"""

    start: Message | None = None  # held back where it tells the body's length

    async def renamed(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            if "content-length" in Headers(raw=message["headers"]):
                start = message
                return
        else:
            message["body"] = message.get("body", b"").replace(b'"reasoning":', b'"reasoning_content":')
            if start is not None:
                headers = MutableHeaders(raw=start["headers"])
                del headers["content-length"]
                if not message.get("more_body"):
                    headers["content-length"] = str(len(message["body"]))
                await send(start | {"headers": headers.raw})
                start = None
        await send(message)

    return renamed
