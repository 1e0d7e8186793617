"""Requests and answers as bytes and JSON: reading bodies, refusing those that are too large, OpenAI's error format."""

import asyncio
import json
from typing import Any

import numpy as np
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Send

MAX_BODY_BYTES = 32 << 20
LONG_BODY = 1 << 20  # bytes; longer bodies are parsed in a thread
BODY_S = 60.0  # timeout for the next chunk of a request's body
MAX_N = 128  # answers to a request, as in OpenAI's API
MAX_ANSWERED_BYTES = 64 << 20  # n times the body
MAX_MESSAGES = 10_000  # counting their parts and calls, too
MAX_VALUES, MAX_DEPTH = 200_000, 100  # of a body's JSON
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def openai_error(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


async def read_body(receive: Receive) -> bytes | JSONResponse | None:
    """A request's body, or an error response; None if the client disconnected."""
    body, more = bytearray(), True
    while more:
        try:
            message = await asyncio.wait_for(receive(), BODY_S)
        except TimeoutError:
            error = openai_error(408, f"the rest of the body did not arrive within {BODY_S:g} s")
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
    """The value of a JSON text. ValueError if it is invalid, has too many values, or is nested too deeply: later code
    would block the event loop for seconds, or raise RecursionError.

    When this runs in a thread, the event loop gets the GIL only between the calls below, so several short calls are
    better than one long one."""
    text = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if text.count(b'"') > 4 * MAX_VALUES:  # a value and its key have four quotes
        raise ValueError(f"more than {MAX_VALUES} values")
    marks = b"".join(text.split(b'"')[::2])  # everything outside of strings
    if (values := sum(map(marks.count, (b",", b"[", b"{")))) > MAX_VALUES:
        raise ValueError(f"{values} values, more than {MAX_VALUES}")
    brackets = np.frombuffer(marks.translate(None, NO_BRACKETS), np.uint8)
    steps = np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1)
    if (depth := steps.cumsum().max(initial=0)) > MAX_DEPTH:
        raise ValueError(f"nested {depth} levels deep, more than {MAX_DEPTH}")
    return json.loads(body.decode())  # only UTF-8: in UTF-16, the counts above would be wrong


def too_much(fields: dict, messages: Any, size: int) -> str | None:
    """Why a request of `size` bytes is too large to serve; None if it isn't, or if vLLM will refuse it."""
    listed = messages if isinstance(messages, list) else []
    lists = [m.get(name) for m in listed if isinstance(m, dict) for name in ("content", "tool_calls")]
    if len(listed) + sum(len(found) for found in lists if isinstance(found, list)) > MAX_MESSAGES:
        return f"more than {MAX_MESSAGES} messages, parts and tool calls"
    try:
        n = int(fields.get("n") or 1)
    except (ValueError, TypeError, OverflowError):
        return None
    if n > MAX_N:
        return f"n={n}: at most {MAX_N}"
    if n * size > MAX_ANSWERED_BYTES:
        return f"n={n} times a body of {size} bytes is more than {MAX_ANSWERED_BYTES} bytes"
    return None


def with_reasoning_content(send: Send) -> Send:
    """Rename the thinking of a chat answer: vLLM 0.32.0 calls it `reasoning`, but OpenClaw sends it back with the
    history only if it came as `reasoning_content`. (In a JSON string the quotes are escaped, so the replaced bytes are
    always the key.)"""

    start: Message | None = None  # held back if it has the body's length

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
