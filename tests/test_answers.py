"""The answers that a client is sent, read from the response body."""

import json

import pytest

from clients.answers import AnswerReader
from clients.sessions import answer_digest

WANTED = {
    "role": "assistant",
    "content": "One moment.",
    "tool_calls": [{"function": {"name": "read", "arguments": '{"path": "a"}'}}],
}


def event(data):
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def chat(delta, finish=None):
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def calls(index, **function):
    return {"tool_calls": [{"index": index, "function": function}]}


ITEMS = [
    {"type": "message", "content": [{"type": "output_text", "text": "One moment."}]},
    {"type": "function_call", "name": "read", "arguments": '{"path": "a"}'},
]
BLOCKS = [{"type": "text", "text": "One moment."}, {"type": "tool_use", "name": "read", "input": {"path": "a"}}]
STREAMS = {
    "chat": chat({"role": "assistant", "content": ""})
    + b": keep-alive\n\n"
    + chat({"content": "One mo"})
    + chat({"content": "ment."})
    + chat(calls(0, name="read", arguments=""))
    + chat(calls(0, arguments='{"path": '))
    + chat(calls(0, arguments='"a"}'), "tool_calls")
    + b"data: [DONE]\n\n",
    "messages": event({"type": "message_start", "message": {"content": []}})
    + event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
    + event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "One moment."}})
    + event({"type": "content_block_start", "index": 1, "content_block": BLOCKS[1] | {"input": {}}})
    + event({"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"pa'}})
    + event({"type": "content_block_delta", "index": 1, "delta": {"partial_json": 'th": "a"}'}})
    + event({"type": "message_delta", "delta": {"stop_reason": "tool_use"}}),
    "responses": event({"type": "response.created", "response": {"object": "response", "output": []}})
    + event({"type": "response.output_text.delta", "delta": "One"})
    + event({"type": "response.completed", "response": {"object": "response", "output": ITEMS}}),
}
WHOLE = {
    "chat": {"choices": [{"index": 0, "message": WANTED, "finish_reason": "tool_calls"}]},
    "messages": {"type": "message", "content": BLOCKS},
    "responses": {"object": "response", "output": ITEMS},
}


@pytest.mark.parametrize("api", STREAMS)
@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_a_streamed_answer_is_read_from_chunks_of_any_size(api, size):
    reader, found, body = AnswerReader(streamed=True), {}, STREAMS[api]
    for at in range(0, len(body), size):
        found |= reader.feed(body[at : at + size], True)
    assert answer_digest(found[0]) == answer_digest(WANTED) and list(found) == [0]


@pytest.mark.parametrize("api", WHOLE)
def test_an_answer_is_read_from_a_body_that_is_not_streamed(api):
    reader, body = AnswerReader(streamed=False), json.dumps(WHOLE[api]).encode()
    assert reader.feed(body[:20], True) == {}
    assert answer_digest(reader.feed(body[20:], False)[0]) == answer_digest(WANTED)


def test_an_answer_is_complete_before_its_last_bytes_are_sent():
    """A client may disconnect as soon as it has the finish reason."""
    reader, end = AnswerReader(streamed=True), STREAMS["chat"].index(b"data: [DONE]")
    assert 0 in reader.feed(STREAMS["chat"][:end], True)


def test_calls_of_namespace_and_custom_tools_are_named_as_vllm_renders_them():
    from openai.types.responses import ResponseFunctionToolCall
    from vllm.entrypoints.openai.responses.utils import construct_chat_messages_with_tool_call

    call = {"type": "function_call", "call_id": "c1", "name": "read", "namespace": "mcp__fs", "arguments": "{}"}
    patch = {"type": "custom_tool_call", "call_id": "c2", "name": "apply_patch", "input": "*** Begin"}
    body = json.dumps({"object": "response", "output": [call, patch]}).encode()
    (sent_back,) = construct_chat_messages_with_tool_call([ResponseFunctionToolCall(**call), patch])
    assert answer_digest(AnswerReader(streamed=False).feed(body, False)[0]) == answer_digest(sent_back)


def test_an_error_event_is_not_an_answer():
    assert AnswerReader(streamed=True).feed(event({"error": {"message": "gone", "code": 500}}), False) == {}
