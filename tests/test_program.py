"""The whole program over real HTTP: a tiny random model, vLLM's CPU engine, the openai package as the client."""

import asyncio
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest
import torch
from starlette.responses import PlainTextResponse
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

import chat_judge
import config
import distill
import server
from clients import keys
from durable import journal
from durable.errors import UsageError
from durable.model import model_folder
from tests.conftest import ROOT, Program, alive, descendants, engine_processes
from tests.records import turn
from tests.talking import ALICE, BOB, ask, client, glance, rated, rows, until, user

# ---- capture ----


@pytest.mark.parametrize("stream", [False, True])
async def test_the_journal_records_what_the_client_received(program, tiny_model, stream):
    c, question = client(program), [user(f"what is {stream}?")]
    if stream:
        options = {"stream": True, "extra_body": {"ignore_eos": True}}  # the random model may stop after a few tokens
        parts = [p async for p in await ask(c, question, 60, **options)]
        turn_id = parts[0].id
        text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
        assert len(parts) > 10, "a real stream has many parts"
    else:
        reply = await ask(c, question, 30)
        turn_id, text = reply.id, reply.choices[0].message.content
        assert reply.choices[0].logprobs is None, "the client must not see the log-probs that are recorded"
    (row,) = rows(program, "id = ?", turn_id)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt_ids, response_ids = (np.frombuffer(row[k], np.int32).tolist() for k in ("prompt_ids", "response_ids"))
    logprobs = np.frombuffer(row["logprobs"], np.float32)
    rendered = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    assert prompt_ids == rendered
    # random bytes may end in an incomplete character, which the detokenizer holds back
    assert tokenizer.decode(response_ids, skip_special_tokens=True).rstrip("\ufffd") == text.rstrip("\ufffd")
    assert row["text"] == text
    assert len(logprobs) == len(response_ids) and (logprobs < 0).all() and (logprobs > -30).all()
    assert row["state"] == "waiting" and row["user"] == "alice"


async def test_recorded_logprobs_match_the_model_at_the_turns_temperature(program, tiny_model):
    """Compared with a forward pass in transformers. Rolls back first, since other tests may have trained the model."""
    import torch
    from transformers import AutoModelForCausalLM

    key = (program.out / "admin_key").read_text().strip()
    back = {"url": f"{program.url}/admin/rollback", "json": {"step": 0}, "headers": {"Authorization": f"Bearer {key}"}}
    httpx.post(**back, timeout=60).raise_for_status()
    reply = await ask(client(program), [user("hm")], 40, temperature=0.7)
    (row,) = rows(program, "id = ?", reply.id)
    prompt, response = (np.frombuffer(row[k], np.int32).tolist() for k in ("prompt_ids", "response_ids"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float() / 0.7
    expected = logits.log_softmax(-1)[range(len(response)), response].detach().numpy()
    assert np.abs(np.frombuffer(row["logprobs"], np.float32) - expected).mean() < 0.05


async def test_a_continued_turn_is_judged_and_another_user_cannot_continue_it(program):
    c, question = client(program), [user("a question of alice's")]
    reply = await ask(c, question)
    talk = [*question, {"role": "assistant", "content": reply.choices[0].message.content}, user("No, that is wrong.")]
    await ask(client(program, BOB), talk)  # the same messages with another key
    assert rows(program, "id = ?", reply.id)[0]["state"] == "waiting"
    second = await ask(c, talk)
    row = await until(lambda: [r for r in rows(program, "id = ?", reply.id) if r["score"] is not None])
    assert json.loads(row[0]["next_messages"]) == [user("No, that is wrong.")]
    assert json.loads(row[0]["votes"]) == [row[0]["score"]] and 1 / 3 < row[0]["confidence"] <= 1  # from the head
    assert rows(program, "id = ?", second.id)[0]["session"] == row[0]["session"]


async def test_each_choice_is_recorded_as_a_turn(program):
    reply = await ask(client(program), [user("three ways")], n=3)
    found = rows(program, "id = ? OR id LIKE ?", reply.id, reply.id + "/%")
    assert {r["text"] for r in found} == {c.message.content for c in reply.choices} and len(found) == 3


@pytest.mark.parametrize(
    "extra, reason",
    [
        ({"extra_headers": {"X-Turn-Type": "side"}}, "side request"),
        ({"extra_headers": {"X-Session-Done": "1"}}, "session is over"),
    ],
)
async def test_an_untrainable_turn_is_served_and_dropped_with_a_reason(program, extra, reason):
    reply = await ask(client(program), [user("untrainable")], **extra)
    (row,) = rows(program, "id = ?", reply.id)
    assert row["state"] == "dropped" and reason in row["reason"]


@pytest.mark.parametrize(
    "extra, why",
    [
        ({"temperature": 0}, "temperature 0 is below 0.3"),
        ({"temperature": 0.01}, "temperature 0.01 is below 0.3"),
        ({"top_p": 0.5}, "sampled with top_p"),
        ({"extra_body": {"top_k": 5}}, "sampled with top_k"),
        ({"extra_body": {"top_k": -1}}, ""),
        ({"extra_body": {"top_k": 0, "min_p": 0, "logit_bias": {}}, "top_p": 1}, ""),
        ({"temperature": 0.5}, ""),
    ],
)
async def test_sampling_options_decide_whether_a_turn_can_be_used_for_rl(program, extra, why):
    """Learning from the score needs the log-probs of the plain policy. Learning from a hint doesn't."""
    reply = await ask(client(program), [user("how was this sampled?")], **extra)
    (row,) = rows(program, "id = ?", reply.id)
    assert row["state"] == "waiting" and row["no_rl"] == why


async def test_a_client_that_hangs_up_leaves_no_trainable_turn(program):
    for attempt in range(10):  # on a busy machine the answer may be complete before the client hangs up
        question = [user(f"hang up on me {attempt}")]
        stream = await ask(client(program), question, 1500, stream=True, extra_body={"ignore_eos": True})
        seen = [part.choices[0].delta.content async for part in first(stream, 5)]
        await stream.close()
        assert seen
        (row,) = await until(partial(rows, program, "messages LIKE ?", f"%hang up on me {attempt}%"))
        n = len(np.frombuffer(row["response_ids"], np.int32))
        if n < 1500:
            break
    assert 0 < n < 1500, "the engine stopped when the client left"
    assert row["state"] == "dropped" and "cut short" in row["reason"]


async def first(stream, n):
    async for part in stream:
        yield part
        n -= 1
        if n == 0:
            return


async def test_the_judges_own_requests_are_not_recorded(program):
    await test_a_continued_turn_is_judged_and_another_user_cannot_continue_it(program)
    assert not rows(program, "messages LIKE '%You grade%' OR user = ''")


@pytest.fixture
def paused_program(program):
    """The shared program with training paused. Otherwise a rated turn could fill a batch and be trained on at once."""
    admin = {"Authorization": f"Bearer {(program.out / 'admin_key').read_text().strip()}"}
    httpx.post(f"{program.url}/admin/pause", headers=admin, timeout=60).raise_for_status()
    yield program
    httpx.post(f"{program.url}/admin/resume", headers=admin, timeout=60).raise_for_status()


async def test_feedback_sets_the_score_and_the_hint(paused_program):
    program = paused_program
    c, headers = client(program), {"Authorization": f"Bearer {ALICE}"}
    async with httpx.AsyncClient(base_url=program.url, headers=headers) as http:
        reply = await ask(c, [user("rate me")])
        body = {"completion_id": reply.id, "score": -1, "text": "answer in one sentence"}
        stranger = await http.post("/v1/feedback", json=body, headers={"Authorization": f"Bearer {BOB}"})
        assert stranger.status_code == 404
        assert (await http.post("/v1/feedback", json=body)).status_code == 200
        (row,) = rows(program, "id = ?", reply.id)
        assert (row["score"], row["source"], json.loads(row["hints"])) == (-1, "feedback", ["answer in one sentence"])
        body["score"] = 1  # she changes her mind before the turn is trained on
        assert (await http.post("/v1/feedback", json=body)).status_code == 200
        (row,) = rows(program, "id = ?", reply.id)
        assert (row["score"], row["hints"]) == (1, "[]"), "praise is no correction"
        talk = [user("rate me"), {"role": "assistant", "content": reply.choices[0].message.content}]
        by_words = {"messages": talk, "score": -1, "text": "answer in two sentences"}
        assert (await http.post("/v1/feedback", json=by_words)).json() == {"completion_id": reply.id, "score": -1}
        (row,) = rows(program, "id = ?", reply.id)
        assert json.loads(row["hints"]) == ["answer in two sentences"]
        for unknown in ([*talk, user("why?")], [user("rate me")]):
            error = await http.post("/v1/feedback", json=by_words | {"messages": unknown})
            assert error.status_code == 404 and "the last of these messages" in error.json()["error"]["message"]
        side = await ask(c, [user("no use")], extra_headers={"X-Turn-Type": "side"})
        late = await http.post("/v1/feedback", json=body | {"completion_id": side.id})
        assert late.status_code == 409 and "side request" in late.json()["error"]["message"]
        greedy = await ask(c, [user("no chance")], temperature=0)
        assert (
            await http.post("/v1/feedback", json=body | {"completion_id": greedy.id, "text": ""})
        ).status_code == 200
        (row,) = rows(program, "id = ?", greedy.id)
        assert row["state"] == "dropped" and row["reason"].startswith("nothing to learn from: there is no hint")
        wrongs = [{}, [], *({"completion_id": reply.id, "score": score} for score in (7, True, 1.0))]
        wrongs += [{"messages": m, "score": 1} for m in ([], 1, None, ["a"], [{"role": "user", "content": [1]}])]
        wrongs += [by_words | more for more in ({"messages": talk * 10_000}, {"more": [0] * 300_000})]
        for wrong in wrongs:
            error = await http.post("/v1/feedback", json=wrong)
            assert error.status_code == 400 and error.json()["error"]["message"]
        half = '{"completion_id": "\\ud800", "session": "\\ud800", "score": 1}'  # one half of a surrogate pair
        for path, status in (("/v1/feedback", 404), ("/web/leave_out", 400)):
            error = await http.post(path, content=half)
            assert error.status_code == status and "ud800" in error.json()["error"]["message"]


async def test_a_hint_goes_into_the_prompt_that_the_model_saw(program, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    reply = await ask(client(program), talk := [user("first"), {"role": "assistant", "content": "a"}, user("then")])
    (row,) = rows(program, "id = ?", reply.id)
    prompt_ids = np.frombuffer(row["prompt_ids"], np.int32).tolist()
    c, asked = client(program), turn(messages=talk, template=json.loads(row["template"]), prompt_ids=prompt_ids)
    plain, hinted = prompt_ids, await distill.hinted_prompts(c, asked, ["Be brief.", "Be kind."])
    for hint, ids in zip(["Be brief.", "Be kind."], hinted, strict=True):
        seen = f"then\n\n[user's hint / instruction]\n{hint}<|im_end|>"
        assert tokenizer.decode(ids) == tokenizer.decode(plain).replace("then<|im_end|>", seen)
    with pytest.raises(distill.NoHintedPrompt, match="the same"):
        await distill.hinted_prompts(c, dataclasses.replace(asked, prompt_ids=prompt_ids[1:]), ["Be brief."])
    with pytest.raises(distill.NoHintedPrompt, match="Unicode"):
        await distill.hinted_prompts(c, asked, ["This is wrong \ud83d"])
    with pytest.raises(distill.NoHintedPrompt, match="JSON compliant"):  # vLLM accepts 1e999 in a tool's schema
        endless = {"chat_template_kwargs": {"x": float("inf")}}
        await distill.hinted_prompts(c, dataclasses.replace(asked, template=endless), ["Be brief."])
    with pytest.raises(distill.NoHintedPrompt, match="BadRequest"):
        other = dataclasses.replace(asked, messages=[user("x")], template={"tools": 1})
        await distill.hinted_prompts(c, other, ["Be brief."])
    with pytest.raises(openai.APIConnectionError):  # no reason to train without the hint
        await distill.hinted_prompts(c.with_options(base_url="http://127.0.0.1:9/v1/"), asked, ["Be brief."])


async def test_hints_written_by_the_judge_match_the_pattern(program):
    """Constrained by the judge's pattern, even a random model writes NONE or a line that is long enough."""
    messages = chat_judge.few_shot(chat_judge.HINT_RULES, chat_judge.HINT_EXAMPLES, "q", "a", [user("No, too long.")])
    judge = chat_judge.ChatJudge(client(program, BOB), "policy", votes=8)
    written = await judge.samples(messages, str, 1.0, chat_judge.HINT_PATTERN)
    # xgrammar counts a surrogate as one character; decoded as UTF-8 it is three U+FFFD.
    written = [re.sub("\ufffd{3,4}", "\ufffd", text) for text in written]
    assert [text for text in written if not re.fullmatch(r"NONE|[A-Z\u00c0-\uffdc][^\n]{5,300}", text)] == []


# ---- bad input ----


@pytest.mark.parametrize(
    "body, status",
    [
        ("not json", 400),
        ("[]", 400),
        ('{"model": "policy"}', 400),
        ('{"model": "policy", "messages": []}', 400),
        ('{"model": "policy", "messages": "hi"}', 400),
        ('{"model": "policy", "messages": [1]}', 400),
        ('{"model": "nope", "messages": [{"role": "user", "content": "x"}]}', 404),
        ('{"model": "policy", "messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', 400),
        ('{"model": "policy", "messages": [{"role": "user", "content": "x"}], "temperature": -1}', 400),
        (json.dumps({"model": "policy", "messages": [user("x" * 5000)]}), 400),  # longer than the context
        ('{"model": "policy", "messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}', None),
    ],
)
async def test_bad_input_gets_an_openai_error_and_the_server_keeps_running(program, body, status):
    before = len(rows(program))
    headers = {"Authorization": f"Bearer {ALICE}", "Content-Type": "application/json"}
    async with httpx.AsyncClient(base_url=program.url, headers=headers, timeout=60) as http:
        reply = await http.post("/v1/chat/completions", content=body)
    if status:
        assert reply.status_code == status
        assert reply.json()["error"]["message"] and reply.json()["error"]["code"] == status
        assert len(rows(program)) == before
    else:
        assert reply.status_code < 500
    assert (await ask(client(program), [user("still there?")])).choices


@pytest.mark.parametrize("key", ["wrong", "", "key-"])
async def test_a_wrong_key_is_refused(program, key):
    with pytest.raises(openai.AuthenticationError) as error:
        await ask(client(program, key or "none"), [user("x")])
    assert error.value.body["message"] == "wrong or missing API key"
    assert httpx.get(f"{program.url}/status").status_code == 401


# ---- the loop ----


async def test_training_and_swaps_do_not_interrupt_a_clients_streams(program):
    """Over ten swaps every answer is complete and none is refused. Late answers have tokens from the new weights."""
    c, stop, answers = client(program), asyncio.Event(), []
    start = len(program.metrics())

    async def keep_streaming():
        while not stop.is_set():
            parts = [
                p
                async for p in await ask(
                    c,
                    [user("go on")],
                    200,
                    stream=True,
                    extra_body={"ignore_eos": True},
                    stream_options={"include_usage": True},
                )
            ]
            answers.append((parts[-1].usage.completion_tokens, parts[-2].choices[0].finish_reason))

    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}

    async def converse(i):
        question = [user(f"question {i}")]
        reply = await ask(c, question, **({"tools": [tool], "tool_choice": "none"} if i % 4 == 0 else {}))
        said = {"role": "assistant", "content": reply.choices[0].message.content}
        await ask(c, [*question, said, user("No. Wrong, do it again.")], 1)
        headers = {"Authorization": f"Bearer {ALICE}"}
        body = {"completion_id": reply.id, "score": 1 if i % 2 else -1}  # the random judge may say neutral
        body |= {} if i % 2 else {"text": "Answer in one word, please."}
        async with httpx.AsyncClient(base_url=program.url, headers=headers, timeout=60) as http:
            assert (await http.post("/v1/feedback", json=body)).status_code in (200, 409)  # 409: already in training

    streaming = asyncio.create_task(keep_streaming())
    i = 0
    while len(program.metrics()) < start + 10:
        await asyncio.gather(*[converse(i + k) for k in range(8)])
        i += 8
        assert i < 2000 and not streaming.done()
    stop.set()
    await streaming
    assert answers and all(a == (200, "length") for a in answers)
    steps = program.metrics()[start:]
    assert all(m["push_gap"] < 0.05 and np.isfinite(m["loss"]) for m in steps)
    taught = [m for m in steps if m["hinted"] or abs(m["reward"]) < 1]  # four equal scores may give no gradient
    assert taught and all(m["grad_norm"] > 0 for m in taught)
    assert [m["step"] for m in steps] == list(range(steps[0]["step"], steps[0]["step"] + len(steps)))
    assert any(m["hinted"] and m["teacher_gap"] > 0 for m in steps)
    hinted = rows(program, "state = 'trained' AND hints != '[]'")
    assert {"tools" in json.loads(r["template"]) for r in hinted} == {True, False}
    assert all(r["hinted_by"] == "own words" for r in hinted)
    assert {r["reason"] for r in hinted} == {None}
    trained = rows(program, "state = 'trained'")
    assert len(trained) >= 40 and {r["step"] for r in trained} >= {m["step"] for m in steps}
    spans = [json.loads(r["versions"]) for r in rows(program, "messages LIKE '%go on%'")]
    assert any(len(s) > 1 for s in spans), "at least one answer ran across a swap"
    assert max(v for s in spans for v, _, _ in s) >= steps[-2]["step"]


def test_output_that_cannot_be_written_is_ignored():
    """A full disk under the log, for example."""
    code = "import run, sys, traceback\nrun.unbreakable(sys.stdout)\nprint('x', flush=True)\n"
    code += "traceback.print_exception(ValueError('y'), file=sys.stdout)\nprint('done', file=sys.stderr)"
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0 and ended.stderr.endswith("done\n"), ended.stderr


async def test_comments_are_streamed_while_a_client_waits_for_the_first_token(program):
    """With each API. The engine is stopped until all clients have had a comment; without one, they would time out."""
    engine, waiting = (
        [pid for pid, _ in descendants(program.process.pid)],
        {"chat/completions", "messages", "responses"},
    )

    async def stream(path):
        asked, limit = ("input", "max_output_tokens") if path == "responses" else ("messages", "max_tokens")
        body = {"model": "policy", asked: [user(f"wait for {path}")], limit: 5, "stream": True}
        async with (
            httpx.AsyncClient(base_url=program.url, headers={"Authorization": f"Bearer {ALICE}"}, timeout=60) as http,
            http.stream("POST", f"/v1/{path}", json=body) as response,
        ):
            said = []
            async for line in response.aiter_lines():
                said += [line] if line else []
                if line.startswith(":"):
                    waiting.discard(path)
                    for pid in engine if not waiting else []:
                        os.kill(pid, signal.SIGCONT)
        assert response.status_code == 200
        assert said[-1] == "data: [DONE]" or "completed" in said[-1] or "message_stop" in said[-1], said[-1]
        (row,) = rows(program, "messages LIKE ?", f"%wait for {path}%")
        assert row["state"] == "waiting" and row["finish_reason"] in ("stop", "length")

    try:
        for pid in engine:
            os.kill(pid, signal.SIGSTOP)
        await asyncio.gather(*map(stream, list(waiting)))
    finally:
        for pid in engine:
            os.kill(pid, signal.SIGCONT)
    assert not waiting


# ---- stop, kill and restart ----


async def test_seeded_requests_with_chunked_prefill_do_not_crash_the_engine(program):
    """Eight prompts of 1,500 tokens are more than vLLM prefills at once."""
    long = [user(f"{i} " + "x" * 1500) for i in range(8)]
    answers = await asyncio.gather(*[ask(client(program), [m], 4, seed=1) for m in long])
    assert all(a.choices[0].finish_reason in ("length", "stop") for a in answers)
    assert (await ask(client(program), [user("still there?")], 4)).choices


async def test_a_stop_keeps_all_steps_and_a_kill_repeats_those_since_the_checkpoint(fresh):
    """SIGTERM loses nothing. kill -9 loses the steps since the last checkpoint, but their turns are queued again."""
    program = fresh(batch_size=2).wait_ready()
    first = [await rated(program, f"q{i}") for i in range(2)]
    await until(lambda: program.status()["step"] == 1)
    for headers, allowed in (
        ({"Origin": "https://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Host": "evil.example:80"}, False),
        ({"Host": "[bad"}, False),
        ({"Origin": "http://localhost:3000"}, True),
    ):
        status = httpx.get(f"{program.url}/status", headers=headers).status_code
        assert status == (200 if allowed else 403), headers
    children = [pid for pid, _ in descendants(program.process.pid)]
    assert engine_processes(program)
    assert program.stop() < 10 and program.process.returncode == 0, program.log()[-2000:]
    await until(lambda: not alive(children), 10)  # the resource tracker ends a moment later

    program = fresh(batch_size=2).wait_ready()
    assert program.status()["step"] == 1
    talk = [user("will you remember me?")]
    open_turn = await ask(client(program, "none"), talk)
    undone = [await rated(program, f"q{i}") for i in range(2, 6)]
    await until(lambda: program.status()["step"] == 3)
    children = [pid for pid, _ in descendants(program.process.pid)]
    os.kill(program.process.pid, signal.SIGKILL)  # no process is left to stop the engine
    program.process.wait()
    await until(lambda: not alive(children), 10)
    assert {r["step"] for r in rows(program, "state = 'trained'")} == {1, 2, 3}

    program = fresh(batch_size=2, steps=2).wait_ready()  # continues with step 2, then stops training
    await until(lambda: program.status()["step"] == 2)
    assert {r["id"]: r["step"] for r in rows(program, "state = 'trained' AND step = 1")} == dict.fromkeys(first, 1)
    again = {r["id"] for r in rows(program, "step = 2")}
    assert again < set(undone) and {r["id"] for r in rows(program, "state = 'queued'")} == set(undone) - again
    assert [m["step"] for m in program.metrics()] == [1, 2], "the rows of undone steps are gone"
    talk += [{"role": "assistant", "content": open_turn.choices[0].message.content}, user("No.")]
    await ask(client(program, "none"), talk)
    assert rows(program, "id = ?", open_turn.id)[0]["next_messages"], "a conversation continues after the kill"

    def admin(*words):
        command = [sys.executable, "-m", "durable.admin", *words, f"--out={program.out}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return done.returncode, (done.stdout + done.stderr).splitlines()[-1]

    await until(lambda: program.status()["training"] == "off")
    for command in ("pause", "resume", "train"):
        assert admin(command) == (1, "training has ended: --steps=2 is reached")
    assert program.status()["training"] == "off"
    program.stop()

    session = rows(program, "id = ?", first[0])[0]["session"]
    assert admin("forget", f"--session={session}") == (
        0,
        "checkpoints that did not see it: only the start, step 0 (rollback --step); that did: 1, 2",
    )
    assert admin("forget", f"--session={session}")[0] == 1 and not rows(program, "id = ?", first[0])
    status, said = admin("rollback", "--step=1")
    gone = [r for r in rows(program) if r["reason"] == "undone by a rollback to step 1"]
    assert (status, said) == (0, f"step 1 is now current; {len(gone)} turns from after it were dropped")
    assert {r["id"] for r in gone} >= again
    assert [p.name for p in (program.out / "checkpoints").iterdir()] == ["step-000001"]
    assert admin("rollback", "--step=7") == (1, "--step=7: there are checkpoints of the steps 0, 1")


TOO_LONG = "Name the river that it ends in and " * 5  # a prompt with this hint has more than 200 tokens


async def test_broken_steps_are_reverted_and_turns_wait_while_the_judge_is_down(fresh):
    """At this learning rate every step breaks the model, but no client sees it. Nothing listens at the judge's URL."""
    program = fresh(
        batch_size=2,
        lr=50.0,
        judge_url="http://127.0.0.1:9/v1",
        judge_model="m",
        max_waiting=6,
        max_train_tokens=200,
        key="me:k",
    ).wait_ready()
    answer = dict(temperature=0, max_tokens=20)
    before = await ask(client(program, "k"), [user("how are you?")], **answer)
    nothing = await rated(program, "empty", -1, TOO_LONG, temperature=0)
    reverted = [await rated(program, f"q{i}", (1, -1)[i % 2]) for i in range(5)]
    await until(lambda: program.status()["training"].startswith("stopped: 3 steps in a row reverted"))
    for r in rows(program, "id IN (SELECT value FROM json_each(?))", json.dumps(reverted)):
        assert r["state"] == "dropped" and r["reason"].startswith("step 1 reverted: on the probe, "), dict(r)
    assert rows(program, "id = ?", nothing)[0]["reason"] == "nothing to learn from"
    after = await ask(client(program, "k"), [user("how are you?")], **answer)
    assert program.status()["step"] == 0 and program.metrics() == []
    assert after.choices[0].message.content == before.choices[0].message.content, "the served weights have not changed"
    assert glance(program, "k")["why"].startswith("Training is stopped by the guard: 3 steps in a row reverted, ")

    for i in range(8):
        reply = await ask(client(program, "k"), [user(f"question {i}")])
        said = {"role": "assistant", "content": reply.choices[0].message.content}
        await ask(client(program, "k"), [user(f"question {i}"), said, user("No.")], 1)
    waiting = rows(program, "next_messages IS NOT NULL")
    assert [r["state"] for r in waiting] == ["judging"] * 6 + ["dropped"] * 2
    assert "more than 6 turns wait" in waiting[-1]["reason"] and all(r["score"] is None for r in waiting)
    await until(lambda: "no verdict from the judge" in program.log())
    admin = {"Authorization": f"Bearer {(program.out / 'admin_key').read_text().strip()}"}
    httpx.post(f"{program.url}/admin/resume", json={}, headers=admin).raise_for_status()
    why = glance(program, "k")["why"]
    assert why.startswith("The judge is down, and 6 turns wait for it: no verdict from the judge"), why


async def test_turns_without_a_signal_are_dropped_and_low_temperature_turns_use_their_hint(fresh):
    program = fresh(batch_size=2, key="me:k", max_train_tokens=200).wait_ready()
    score_alone = await rated(program, "greedy", -1, temperature=0)
    await rated(program, "a", 1, top_p=0.5)
    found = {r["id"]: r for r in rows(program, "no_rl != ''")}
    assert all(r["state"] == "dropped" and r["reason"].startswith("nothing to learn from") for r in found.values())
    assert len(found) == 2
    empty = [await rated(program, f"empty {i}", -1, TOO_LONG, temperature=0) for i in (1, 2)]
    await until(lambda: all(r["state"] == "dropped" for r in rows(program, "id IN (?, ?)", *empty)))
    assert {r["reason"] for r in rows(program, "id IN (?, ?)", *empty)} == {"nothing to learn from"}
    assert program.status()["step"] == 0 and not program.metrics(), "no step is taken on such a batch"
    body = {"completion_id": score_alone, "score": -1, "text": "Name the river. Say where it ends, please."}
    headers = {"Authorization": "Bearer k"}
    assert httpx.post(f"{program.url}/v1/feedback", json=body, headers=headers, timeout=30).status_code == 200
    cold = [
        await rated(program, f"cold {i}", -1, "Be kind to the reader. Use plain words!", temperature=0.01)
        for i in (1, 2)
    ]
    await until(lambda: program.status()["step"] >= 1)
    (first, *_) = program.metrics()
    assert first["grad_norm"] < 1000 and first["dlogp"] == 0 and abs(first["kl"]) < 1, first
    await until(lambda: all(r["state"] == "trained" for r in rows(program, "id = ?", cold[0])))


async def test_sigterm_during_startup_stops_the_program(fresh):
    program = fresh()
    await until(lambda: engine_processes(program), 120)
    children = [pid for pid, _ in descendants(program.process.pid)]
    assert program.stop() < 10, program.log()[-2000:]
    await until(lambda: not alive(children), 10)


async def test_kill_9_during_startup_leaves_no_process(fresh):
    program = fresh()
    await until(lambda: engine_processes(program), 120)
    children = [pid for pid, _ in descendants(program.process.pid)]
    program.process.kill()
    program.process.wait()
    await until(lambda: not alive(children), 30)


async def test_the_judge_works_over_tls_and_sighup_stops_with_a_checkpoint(fresh, tmp_path, monkeypatch):
    """The certificate is self-signed. The program's own judge must be able to reach the program, too."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=x -addext subjectAltName=IP:127.0.0.1 "
    subprocess.run(f"{command} -keyout {key} -out {certificate}".split(), check=True, capture_output=True)
    program = fresh(batch_size=1, judge_style="chat", ssl_certfile=certificate, ssl_keyfile=key)
    program.url = program.url.replace("http:", "https:")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    program.wait_ready()
    first = await ask(client(program, "none"), [user("hi")])
    said = {"role": "assistant", "content": first.choices[0].message.content}
    await ask(client(program, "none"), [user("hi"), said, user("No.")])
    (row,) = await until(lambda: rows(program, "id = ? AND score IS NOT NULL", first.id))
    assert row["source"] == "judge"
    await rated(program, "something else")
    await until(lambda: program.status()["step"] >= 1)
    program.process.send_signal(signal.SIGHUP)
    program.wait_end()
    assert program.process.returncode == 0 and "stopped by SIGHUP" in program.log()
    assert list((program.out / "checkpoints").glob("step-*/model.safetensors"))


def test_a_closed_terminal_does_not_prevent_a_clean_stop(tmp_path):
    """Printing to it is an error, and the checkpoint is written after a print."""
    code = f"""
import asyncio, fcntl, os, signal, sys, termios
sys.path.insert(0, {str(ROOT)!r})
import run
run.unbreakable(sys.stdout)
async def main():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    stopped = asyncio.Event()
    for s in run.STOPPING:
        asyncio.get_running_loop().add_signal_handler(s, run.on_signal, s, stopped)
    print("ready", flush=True)
    await stopped.wait()
    print("stopping", flush=True)
    open("done", "w").close()
asyncio.run(main())
"""
    master, terminal = os.openpty()
    ends = dict(stdin=terminal, stdout=terminal, stderr=terminal)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True, **ends)
    os.close(terminal)
    said = b""
    while b"ready\r\n" not in said:
        said += os.read(master, 1000)
    os.close(master)
    assert process.wait(60) == 0 and (tmp_path / "done").exists()


def test_a_context_longer_than_the_models_is_refused_without_a_traceback(fresh):
    started = fresh(max_model_len=4096)
    assert started.process.wait(120) == 1
    assert "max_model_len (4096) is greater than" in started.log() and "Traceback" not in started.log()


def test_a_model_that_engine_and_trainer_compute_differently_is_refused(tiny_model, tmp_path):
    """Here vLLM scales all positions, because of a field that transformers doesn't read."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 100.0, "max_trained_positions": 512}
    config.initializer_range = 0.2
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    program = Program(folder, tmp_path / "out")
    try:
        assert program.process.wait(120) == 1
    finally:
        program.process.kill()
    assert "engine and trainer disagree about this model" in program.log().splitlines()[-1]
    assert "Traceback" not in program.log() and not descendants(program.process.pid)


def test_a_port_in_use_is_reported_at_once(fresh, program):
    second = fresh(port=program.port)
    assert second.process.wait(60) == 1
    assert str(program.port) in second.log() and "in use" in second.log().splitlines()[-1]


def test_a_second_program_on_the_same_journal_is_refused(tiny_model, program):
    command = [sys.executable, str(ROOT / "run.py"), f"--model={tiny_model}", f"--out={program.out}"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 1 and f"in use by process {program.process.pid}" in second.stderr


async def test_no_answer_is_started_on_a_full_disk(monkeypatch, tmp_path):
    """Tests Capture alone: it refuses requests whose answer could not be recorded, and serves all others."""

    async def app(scope, receive, send):
        await PlainTextResponse("reached")(scope, receive, send)

    room = [True]
    monkeypatch.setattr(journal, "has_disk_space", lambda db: room[0])
    p = SimpleNamespace(keys=keys.Keys(tmp_path, False), config=SimpleNamespace(web_origins=[]), db=None)
    transport = httpx.ASGITransport(server.Capture(app, p))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        ask_it = lambda: http.post("/v1/chat/completions", json={"messages": [user("hi")]})  # noqa: E731
        assert (await ask_it()).text == "reached"
        room[0] = False
        refused = await ask_it()
        assert refused.status_code == 507 and "disk is full" in refused.json()["error"]["message"]
        assert (await http.get("/v1/models")).text == "reached"
        room[0] = True
        assert (await ask_it()).text == "reached"
        many = await http.post("/v1/chat/completions", json={"messages": [user("hi")] * 10_001})
        assert many.status_code == 400 and "10000 messages" in many.json()["error"]["message"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lrr=1"], "--lrr=1"),
        (["--lr=fast"], "--lr"),
        (["--lr=nan"], "--lr=nan: expected a finite number"),
        (["--lr=-1"], "--lr=-1.0: expected a finite number that is not negative"),
        (["--kl=inf"], "--kl=inf: expected a finite number"),
        (["--ssl_keyfile=key.pem"], "--ssl_certfile and --ssl_keyfile: give both, or none"),
        (["--beta1=1"], "--beta1=1.0: expected less than 1"),
        (["--judge_url=127.0.0.1:8001/v1", "--judge_model=x"], "--judge_url=127.0.0.1:8001/v1: expected http"),
        (["--dual_clip=0"], "--dual_clip=0.0: expected more than 1"),
        (["--batch_size=2.5"], "--batch_size"),
        (["--judge_url=http://127.0.0.1:9/v1"], "--judge_url needs --judge_model"),
        (["--judge_url=http://127.0.0.1:9/v1", "--judge_style=head"], "it takes no --judge_url"),
        (["--port=0"], "--port=0: expected at least 1"),
        (["--w_rl=0", "--w_opd=0"], "at least one must be above 0"),
        (["lr=1"], "lr=1"),
        (["--keep=0"], "--keep=0: expected at least 1"),
        (["--votes=0"], "--votes=0: expected at least 1"),
        (["--batch_size=0"], "--batch_size=0: expected at least 1"),
        (["--expire=0"], "--expire=0: expected more than 0"),
        (["--user_share=2"], "a fraction from 0 to 1"),
        (["--batch_size=2", "--session_share=0.05"], "a fraction from 0.5 to 1"),
        (["--baseline=median"], "--baseline"),
        (["--model=/nowhere"], "/nowhere"),
    ],
)
def test_a_wrong_option_gives_an_error_that_names_it(arguments, message, capfd):
    with pytest.raises(SystemExit) as error:
        try:
            model_folder(config.parse(arguments).model)
        except UsageError as e:  # as run.py does
            sys.exit(str(e))
    said = f"{error.value} {' '.join(capfd.readouterr())}"
    assert error.value.code and message in " ".join(re.sub("[│╭╮╰╯─]", "", said).split()), said


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit):
        config.parse(["--help"])
    said = capsys.readouterr().out
    for f in dataclasses.fields(config.Config):
        assert f"--{f.name} " in said
