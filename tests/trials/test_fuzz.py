"""Random requests cause no server error and no crash, and the journal records only those that were answered."""

import contextlib
import gc
import json
import multiprocessing
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from durable import pieces
from tests.talking import ALICE, BOB, rows

REQUESTS = 10_000

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    scalars, lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(max_size=8), s, max_size=4), max_leaves=8
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "developer", "function", ""]) | st.text(max_size=6)
part = st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=20)}) | anything
call = st.fixed_dictionaries(
    {
        "id": st.text(max_size=8),
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": st.text(max_size=8), "arguments": st.text(max_size=20) | anything}),
    }
)
message = st.fixed_dictionaries(
    {"role": roles, "content": st.text(max_size=40) | st.lists(part, max_size=3) | anything},
    optional={
        "tool_calls": st.lists(call | anything, max_size=2) | anything,
        "tool_call_id": anything,
        "name": anything,
    },
)
options = {
    "n": st.integers(-1, 3) | anything,
    "temperature": st.floats(-1, 3) | anything,
    "top_p": st.floats(-1, 2) | anything,
    "stop": anything,
    "stream": st.booleans() | anything,
    "stream_options": anything,
    "logprobs": st.booleans() | anything,
    "top_logprobs": st.integers(-2, 30) | anything,
    "prompt_logprobs": st.integers(-2, 3) | anything,
    "tools": anything,
    "tool_choice": st.sampled_from(["auto", "none", "required"]) | anything,
    "response_format": anything,
    "chat_template": st.text(max_size=30) | anything,
    "chat_template_kwargs": anything,
    "use_beam_search": st.booleans() | anything,
    "ignore_eos": st.booleans(),
    "add_generation_prompt": anything,
    "continue_final_message": anything,
    "logit_bias": anything,
    "seed": anything,
    "user": anything,
    "cache_salt": anything,
    "priority": anything,
    "request_id": anything,
    "kv_transfer_params": anything,
}
spoken = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=40)}
)
messages = st.lists(spoken, min_size=1, max_size=4) | st.lists(message, max_size=4)
base = {"model": st.just("policy"), "messages": messages, "max_tokens": st.integers(1, 4)}
some_options = st.lists(st.sampled_from(sorted(options)), max_size=3, unique=True)
chat = some_options.flatmap(lambda names: st.fixed_dictionaries(base | {name: options[name] for name in names}))
feedback = st.fixed_dictionaries({}, optional={"completion_id": anything, "score": anything, "text": anything})
headers = st.dictionaries(
    st.sampled_from(["X-Session-Id", "X-Turn-Type", "X-Session-Done", "X-Request-Id", "Content-Type", "Origin"]),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30),
)
well_formed = st.fixed_dictionaries(base | {"messages": st.lists(spoken, min_size=1, max_size=4)})
bodies = chat.map(lambda b: ("/v1/chat/completions", json.dumps(b).encode()))
bodies |= well_formed.map(lambda b: ("/v1/chat/completions", json.dumps(b).encode()))
bodies |= anything.map(lambda b: ("/v1/chat/completions", json.dumps(b).encode()))
bodies |= feedback.map(lambda b: ("/v1/feedback", json.dumps(b).encode()))
bodies |= st.tuples(st.sampled_from(["/v1/chat/completions", "/v1/feedback"]), st.binary(max_size=60))
bodies |= st.sampled_from(
    [
        ("/v1/chat/completions", b"[" * 100_000),
        ("/v1/chat/completions", b'{"messages":' * 50_000),
        ("/v1/chat/completions", b'{"model":"policy","max_tokens":1,"messages":[{"role":"user","content":"\\ud83d"}]}'),
        (
            "/v1/chat/completions",
            b'{"model":"policy","max_tokens":1,"messages":[{"role":"user","content":"x"},{"role":"assistant","content":'
            b'"y","tool_calls":[{"id":"1","type":"function","function":{"name":"f","arguments":"'
            + b"[" * 900
            + b"]" * 900
            + b'"}}]},{"role":"user","content":"z"}]}',
        ),
        ("/v1/feedback", b"[" * 100_000),
    ]
)


def choices(body):
    """How many answers a served request has. None if they need not each have a row."""
    request = json.loads(body)
    return None if request.get("use_beam_search") else int(request.get("n") or 1)


def is_plain_sample(body):
    """Whether it was sampled from the unchanged policy, so that its log-probs are the policy's."""
    request = json.loads(body)
    changed = [request.get(name) for name in ("logit_bias", "response_format", "use_beam_search")]
    return request.get("top_p") in (None, 1) and request.get("temperature") != 0 and not any(changed)


EVERY_S = 0.005


def waited_for_a_core():
    """Seconds that this process has been ready to run while other processes had the cores."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


def poll_health(url, stop, control, results):
    """Send GET /health every EVERY_S, in a separate process. At the end, send how late each answer was: first those
    while `control` was set, then the others."""
    gc.freeze()  # no long pauses of our own
    late = [], []
    with httpx.Client(base_url=url, timeout=60) as http:
        due, waited = time.perf_counter(), waited_for_a_core()
        while not stop.is_set():
            http.get("/health").raise_for_status()
            now = time.perf_counter()
            # With five busy processes on two cores, this one waits up to 0.4 s for its turn: not the server's delay.
            late[0 if control.is_set() else 1].append(now - due - (waited_for_a_core() - waited))
            due, waited = max(due + EVERY_S, now), waited_for_a_core()
            time.sleep(max(0.0, due - now))
    results.send(late)


@contextlib.contextmanager
def stalls(url):
    """Measure how late answers to GET /health are: for 20 s with nothing else to do, then while the block runs.

    Weighted by time, not per answer: one that is 3 s late counts for all requests that could have been sent in 3 s."""
    spawn = multiprocessing.get_context("spawn")
    stop, control, (results, sender) = spawn.Event(), spawn.Event(), spawn.Pipe(duplex=False)
    control.set()
    polling = spawn.Process(target=poll_health, args=(url, stop, control, sender))
    polling.start()
    time.sleep(20)
    control.clear()
    yield
    stop.set()
    late = results.recv()
    polling.join()
    p999 = []
    for name, answers in zip(("idle", "under fuzz"), late, strict=True):
        ms = 1000 * np.concatenate([np.arange(seconds, 0, -EVERY_S) for seconds in answers])
        p999.append(np.percentile(ms, 99.9))
        print(f"GET /health {name}: {len(answers)} answers, p99.9 {p999[-1]:.0f} ms, worst {ms.max():.0f}")
    assert p999[1] < 50 + p999[0], "the event loop was blocked for too long"


@pytest.mark.timeout(3600)
def test_random_requests_cause_no_server_error_and_no_wrong_rows(program):
    seen, sent = {}, []

    with stalls(program.url), httpx.Client(base_url=program.url, timeout=60) as http:

        @settings(max_examples=REQUESTS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(request=bodies, more=headers, bobs=st.booleans())
        def send(request, more, bobs):
            path, body = request
            session = f"fuzz-{len(sent)}"
            key = {"Authorization": f"Bearer {BOB if bobs else ALICE}", "Content-Type": "application/json"}
            reply = http.post(path, content=body, headers=key | more | {"X-Session-Id": session})
            sent.append((f"{'bob' if bobs else 'alice'}/{session}", path, body, reply.status_code))
            seen[reply.status_code] = seen.get(reply.status_code, 0) + 1
            assert reply.status_code < 500, (reply.status_code, reply.text[:500], path, body[:2000], more)
            if reply.status_code >= 400 and path.startswith("/v1/chat"):
                assert reply.json()["error"]["message"], reply.text

        send()
        assert http.get("/health").status_code == 200
    print(seen)
    by_session = {}
    for row in rows(program):
        by_session.setdefault(row["session"], []).append(row)
    assert seen[200] > REQUESTS / 20, "too few requests were well-formed"
    for session, path, body, status in sent:
        found = by_session.pop(session, [])
        if path != "/v1/chat/completions" or status != 200:
            assert not found, (status, body)
            continue
        assert choices(body) in (None, len(found)), body
        for row in found:
            ids, logprobs = np.frombuffer(row["response_ids"], np.int32), np.frombuffer(row["logprobs"], np.float32)
            assert row["user"] == session.partition("/")[0] and len(ids) == len(logprobs) > 0
            sent_messages = json.loads(body)["messages"]
            kept = [{k: v for k, v in m.items() if k in pieces.KNOWN} for m in sent_messages]
            assert json.loads(row["messages"]) == kept
            assert row["state"] == "dropped" or row["no_rl"] or is_plain_sample(body), body
    assert not by_session, "rows without a request"
