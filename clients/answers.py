"""Reads the answers that a client was sent from a response body of any of the three APIs, streamed or whole.

vLLM's parsers extract thinking and tool calls from the raw text in a dozen formats. Clients send the parsed answer back
in later requests, so it is read from the body on its way out.
"""

import json
from collections import defaultdict
from typing import Any


def call(name: str, arguments: Any) -> dict:
    return {"function": {"name": name, "arguments": arguments}}


class AnswerReader:
    """Reads a body chunk by chunk; `feed` returns the answers, each as the assistant message that the client gets."""

    def __init__(self, streamed: bool) -> None:
        self.streamed, self.rest = streamed, b""
        self.texts: dict[int, list[str]] = defaultdict(list)
        self.calls: dict[int, dict[int, dict]] = defaultdict(dict)  # choice -> index of the call -> the call

    def feed(self, body: bytes, more: bool) -> dict[int, dict]:
        """The answers that this chunk completes, by choice."""
        # A stream has an event in each line; otherwise the whole body is one JSON text.
        unread = self.rest + body
        lines = unread.split(b"\n") if self.streamed else [unread]
        self.rest = lines.pop() if more else b""  # an incomplete line or body
        complete: list[int] = []
        for line in lines:
            data = line.removeprefix(b"data:").strip() if self.streamed else line
            if data.startswith(b"{"):
                complete += self.read(json.loads(data))
        return {k: self.message(k) for k in complete}

    def message(self, k: int) -> dict:
        return {"role": "assistant", "content": "".join(self.texts[k]), "tool_calls": list(self.calls[k].values())}

    def read(self, event: dict) -> list[int]:
        """Read one JSON event of the body. Returns the choices that it completes."""
        if "choices" in event:
            return [k for choice in event["choices"] if (k := self.read_choice(choice)) is not None]
        kind, block = event.get("type"), event.get("content_block") or {}
        # /v1/messages: a whole body, or the events of a stream, in which a call's arguments come in parts.
        if kind == "message":
            for number, part in enumerate(event["content"]):
                self.read_block(number, part)
            return [0]
        if kind == "content_block_start":
            self.read_block(event["index"], block | ({"input": ""} if block.get("type") == "tool_use" else {}))
        elif kind == "content_block_delta":
            delta = event["delta"]
            self.texts[0].append(delta.get("text", ""))
            if "partial_json" in delta:
                self.calls[0][event["index"]]["function"]["arguments"] += delta["partial_json"]
        elif kind == "message_delta":
            return [0]
        # /v1/responses: a whole body, or the last event of a stream, which has the whole answer again.
        response = event if event.get("object") == "response" else event.get("response") or {}
        if kind in (None, "response.completed", "response.incomplete") and "output" in response:
            for number, item in enumerate(response["output"]):
                if item["type"] == "function_call":  # named as vLLM renders it when the client sends it back
                    name = "__".join(filter(None, (item.get("namespace"), item["name"])))
                    self.calls[0][number] = call(name, item["arguments"])
                if item["type"] == "custom_tool_call":
                    self.calls[0][number] = call(item["name"], json.dumps({"input": item["input"]}))
                self.texts[0] += [
                    part.get("text", "") for part in item.get("content") or [] if item["type"] == "message"
                ]
            return [0]
        return []

    def read_choice(self, choice: dict) -> int | None:
        k, said = choice["index"], choice.get("delta") or choice.get("message") or {}
        self.texts[k].append(said.get("content") or "")
        for number, part in enumerate(said.get("tool_calls") or []):
            known = self.calls[k].setdefault(part.get("index", number), call("", ""))["function"]
            piece = part.get("function") or {}
            known["name"] += piece.get("name") or ""
            known["arguments"] += piece.get("arguments") or ""
        return k if choice.get("finish_reason") else None

    def read_block(self, number: int, block: dict) -> None:
        if block.get("type") == "tool_use":
            self.calls[0][number] = call(block["name"], block["input"])
        self.texts[0].append(block.get("text", ""))
