"""The three APIs, through their usual client packages: conversations, streamed or not, with and without tools."""

import json
import subprocess
import sys
import time

import anthropic
import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient
from transformers import AutoTokenizer

import distill
import server
from clients import paste
from durable.errors import UsageError
from durable.model import tool_parser_of
from tests.conftest import ROOT, Program
from tests.openclaw.check import TEMPLATE, make_tool_model
from tests.records import turn
from tests.talking import ALICE, BOB, ask, client, rated, rows, until, user

PATH = {"type": "object", "properties": {"path": {"enum": ["a", "b"]}}, "required": ["path"]}


@pytest.fixture(scope="module")
def program(tiny_model, tmp_path_factory):
    """A separate program whose batch never fills, so that the requests in this file don't affect other tests."""
    with pytest.MonkeyPatch.context() as environment:  # none of this may affect the program
        for name in ("HTTP_PROXY", "ALL_PROXY", "VLLM_API_KEY"):
            environment.setenv(name, "http://127.0.0.1:9")
        environment.setenv("VLLM_SERVER_DEV_MODE", "1")
        options = {"batch_size": 1000, "key": "alice:key-a,bob:key-b", "origins": f"{PAGE}, http://other.example"}
        program = Program(tiny_model, tmp_path_factory.mktemp("apis"), **options)
    yield program.wait_ready()
    program.stop()


PAGE = "http://localhost:3000"
HELLO_BODY = {"model": "policy", "messages": [user("hello there")], "max_tokens": 4, "ignore_eos": True}


def test_environment_variables_open_no_extra_endpoints(program):
    headers = {"Authorization": f"Bearer {ALICE}"}
    for path in ("/sleep", "/collective_rpc", "/update_weights", "/reset_prefix_cache", "/v1/load_lora_adapter"):
        assert httpx.post(f"{program.url}{path}", headers=headers, json={}).status_code == 404, path


def test_a_web_page_from_an_allowed_origin_is_served(program):
    """Its browser sends a preflight request without a key. The page must be able to read errors, too."""
    wanted = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    asked = httpx.options(
        f"{program.url}/v1/chat/completions",
        headers=wanted | {"Access-Control-Request-Headers": "authorization,content-type"},
    )
    assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in asked.headers["access-control-allow-headers"]
    body = {"model": "policy", "messages": [user("from a page")], "max_tokens": 2}
    for key, status in ((ALICE, 200), ("wrong", 401)):
        headers = {"Origin": PAGE, "Authorization": f"Bearer {key}"}
        reply = httpx.post(f"{program.url}/v1/chat/completions", headers=headers, json=body, timeout=60)
        assert reply.status_code == status and reply.headers.get_list("access-control-allow-origin") == [PAGE]
    evil = httpx.options(f"{program.url}/v1/chat/completions", headers=wanted | {"Origin": "https://evil.example"})
    assert evil.status_code == 400 and "access-control-allow-origin" not in evil.headers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": f"bearer {ALICE}"}, 200),
        ({"authorization": f"BEARER  {ALICE}"}, 200),
        ({"x-api-key": ALICE, "Authorization": "Bearer of another proxy"}, 200),
        ({"x-api-key": "wrong", "Authorization": f"Bearer {ALICE}"}, 200),
        ({"x-api-key": "wrong", "Authorization": "Basic abc"}, 401),
        ({"Authorization": ""}, 401),
        ({"x-api-key": ""}, 401),
    ],
)
def test_a_key_is_read_from_authorization_or_x_api_key(program, headers, status):
    assert httpx.get(f"{program.url}/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        ("chat/completions", "max_tokens", {}),
        ("chat/completions", "max_completion_tokens", {}),
        ("messages", "max_tokens", {"stop_sequences": ["e"]}),
        ("responses", "max_output_tokens", {}),
    ],
)
def test_max_tokens_beyond_the_context_is_reduced_to_what_fits(program, path, field, body):
    talk = [user("as long as you like")]
    body = {"model": "policy", ("input" if path == "responses" else "messages"): talk, field: 32_000} | body
    headers = {"Authorization": f"Bearer {ALICE}"}
    reply = httpx.post(f"{program.url}/v1/{path}", headers=headers, json=body, timeout=120)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("path", "fields", "why"),
    [
        ("chat/completions", {"n": 129}, "n=129: at most 128"),
        ("chat/completions", {"kv_transfer_params": {"prompt_token_ids": [5, 6]}}, "kv_transfer_params"),
        ("messages", {"kv_transfer_params": {"prompt_token_ids": [5, 6]}}, "kv_transfer_params"),
    ],
)
def test_fields_that_would_harm_others_or_hide_the_prompt_are_refused(program, path, fields, why):
    body = HELLO_BODY | fields
    reply = httpx.post(f"{program.url}/v1/{path}", headers={"Authorization": f"Bearer {ALICE}"}, json=body, timeout=60)
    assert reply.status_code == 400 and why in reply.json()["error"]["message"]


@pytest.mark.parametrize("echo", [False, True])
async def test_the_reply_to_a_continued_answer_is_found(program, echo):
    """With vLLM's `echo`, the answer repeats the text that it continues; without it, the client puts them together."""
    fields = {"add_generation_prompt": False, "continue_final_message": True, "echo": echo}
    talk, begun = [user(f"begin with sure, {echo}")], "Surely it is"
    reply = await ask(client(program), [*talk, {"role": "assistant", "content": begun}], extra_body=fields)
    text = reply.choices[0].message.content
    assert text.startswith(begun) == echo
    talk += [{"role": "assistant", "content": text if echo else begun + text}, user("No, shorter.")]
    await ask(client(program), talk, 2)
    assert json.loads(rows(program, "id = ?", reply.id)[0]["next_messages"]) == [user("No, shorter.")]


@pytest.mark.parametrize(
    ("path", "fields", "shown"),
    [
        ("chat/completions", {"reasoning_effort": "low"}, "<think:True:low>"),
        ("chat/completions", {"chat_template_kwargs": {"enable_thinking": False}}, "<think:False:"),
        ("messages", {"thinking": {"type": "disabled"}}, "<think:False:none>"),
        ("responses", {"reasoning": {"effort": "high"}}, "<think:True:high>"),
    ],
)
async def test_options_that_reach_the_template_are_recorded(program, tiny_model, path, fields, shown):
    """Without them, rendering the messages again would give another prompt, and the hint could not be used."""
    limit = "max_output_tokens" if path == "responses" else "max_tokens"
    talk = [user(f"think about {path} {fields}")]
    body = {"model": "policy", ("input" if path == "responses" else "messages"): talk, limit: 4} | fields
    headers = {"Authorization": f"Bearer {ALICE}"}
    reply = httpx.post(f"{program.url}/v1/{path}", headers=headers, json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    row = rows(program)[-1]
    prompt = np.frombuffer(row["prompt_ids"], np.int32).tolist()
    assert shown in AutoTokenizer.from_pretrained(tiny_model).decode(prompt)
    recorded = turn(messages=json.loads(row["messages"]), template=json.loads(row["template"]), prompt_ids=prompt)
    assert await distill.hinted_prompts(client(program), recorded, ["Be brief, please."])


def session_of(program, text):
    """The rows of the conversation that began with a request with this text, in order."""
    (first,) = [r for r in rows(program) if text in json.dumps(json.loads(r["messages"])[-1])]
    return rows(program, "session = ?", first["session"])


async def check(program, tiny_model, found, after):
    """Check two turns of a conversation: the first is judged by its next message, both have the rendered prompt."""
    first, second = found
    assert [m["role"] for m in json.loads(first["next_messages"])] == [after]
    assert first["state"] != "waiting" and second["state"] == "waiting" and second["user"] == "alice"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for row in found:
        ids = {k: np.frombuffer(row[k], np.int32).tolist() for k in ("prompt_ids", "response_ids")}
        assert tokenizer.decode(ids["response_ids"], skip_special_tokens=True).rstrip("\ufffd") == row["text"].rstrip(
            "\ufffd"
        )
        # Raises unless the messages, rendered again, give the recorded prompt.
        recorded = turn(
            messages=json.loads(row["messages"]), template=json.loads(row["template"]), prompt_ids=ids["prompt_ids"]
        )
        assert await distill.hinted_prompts(client(program), recorded, ["Be brief, please."])


@pytest.mark.parametrize("stream", [False, True])
async def test_anthropic_messages(program, tiny_model, stream):
    async with anthropic.AsyncAnthropic(base_url=program.url, api_key=ALICE, max_retries=0) as c:

        async def ask(messages):
            options = {"model": "policy", "max_tokens": 12, "system": "Be kind.", "messages": messages}
            if not stream:
                return await c.messages.create(**options)
            async with c.messages.stream(**options) as s:
                return await s.get_final_message()

        talk = [{"role": "user", "content": f"an anthropic question, {stream}"}]
        reply = await ask(talk)
        talk += [{"role": "assistant", "content": [b.model_dump() for b in reply.content]}]
        await ask([*talk, {"role": "user", "content": [{"type": "text", "text": "No, wrong."}]}])
    found = session_of(program, talk[0]["content"])
    assert found[0]["text"] == reply.content[0].text and found[0]["id"] == reply.id
    await check(program, tiny_model, found, "user")


@pytest.mark.parametrize("stream", [False, True])
async def test_openai_responses(program, tiny_model, stream):
    c = client(program)

    async def ask(messages):
        options = {"model": "policy", "max_output_tokens": 12, "instructions": "Be kind.", "input": messages}
        if not stream:
            return await c.responses.create(**options)
        async with c.responses.stream(**options) as s:
            return await s.get_final_response()

    question = f"a question to responses, {stream}"
    reply = await ask(question)
    said = [item.model_dump(exclude_none=True) for item in reply.output]
    await ask([{"role": "user", "content": question}, *said, {"role": "user", "content": "No, wrong."}])
    found = session_of(program, question)
    assert found[0]["text"] == reply.output_text and found[0]["id"] == reply.id
    await check(program, tiny_model, found, "user")


@pytest.mark.parametrize("api", ["chat", "anthropic", "responses"])
async def test_tool_calls_and_their_results_are_recorded(program, tiny_model, api):
    """The tiny model calls a tool only if forced to. That is not a sample of the plain policy, so RL can't use it."""
    question, c = f"use the tool, {api}", client(program)
    function = {"name": "read", "parameters": PATH, "strict": True}
    if api == "chat":
        options = {"model": "policy", "max_tokens": 200, "tools": [{"type": "function", "function": function}]}
        talk = [{"role": "user", "content": question}]
        reply = await c.chat.completions.create(
            messages=talk, tool_choice={"type": "function", "function": {"name": "read"}}, **options
        )
        (call,) = reply.choices[0].message.tool_calls
        talk += [reply.choices[0].message.model_dump(exclude_none=True)]
        result = {"role": "tool", "tool_call_id": call.id, "content": "text of it"}
        del options["tools"]  # with tools, the answer would be constrained to their schema again
        await c.chat.completions.create(messages=[*talk, result], **options)
        call_id = call.id
    elif api == "responses":
        options = {
            "model": "policy",
            "max_output_tokens": 200,
            "tools": [{"type": "function", **function}],
        }
        talk = [{"role": "user", "content": question}]
        reply = await c.responses.create(input=talk, tool_choice={"type": "function", "name": "read"}, **options)
        (call,) = reply.output
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "text of it"}
        del options["tools"]  # with tools, the answer would be constrained to their schema again
        await c.responses.create(input=[*talk, call.model_dump(exclude_none=True), result], **options)
        call_id = call.call_id
    else:
        async with anthropic.AsyncAnthropic(base_url=program.url, api_key=ALICE, max_retries=0) as a:
            options = {
                "model": "policy",
                "max_tokens": 200,
                "tools": [{"name": "read", "input_schema": PATH, "strict": True}],
            }
            talk = [{"role": "user", "content": question}]
            reply = await a.messages.create(messages=talk, tool_choice={"type": "tool", "name": "read"}, **options)
            (call,) = reply.content
            result = {"type": "tool_result", "tool_use_id": call.id, "content": "text of it"}
            talk += [{"role": "assistant", "content": [call.model_dump()]}, {"role": "user", "content": [result]}]
            del options["tools"]  # with tools, the answer would be constrained to their schema again
            await a.messages.create(messages=talk, **options)
        call_id = call.id
    assert call_id.isalnum(), "OpenClaw would send another one back"
    first, second = [r for r in rows(program) if question in r["messages"]]
    assert "structured_outputs" in first["no_rl"] and second["state"] == "waiting"
    ids = np.frombuffer(second["prompt_ids"], np.int32).tolist()
    recorded = turn(messages=json.loads(second["messages"]), template=json.loads(second["template"]), prompt_ids=ids)
    assert await distill.hinted_prompts(client(program), recorded, ["Be brief, please."])
    result = json.loads(second["messages"])[-1]
    assert (result["role"], result["tool_call_id"], result["content"]) == ("tool", call_id, "text of it")


async def test_a_previous_response_id_is_refused(program):
    """vLLM does not keep earlier answers, so a request that names one only by its id gets an error."""
    async with httpx.AsyncClient(base_url=program.url, headers={"Authorization": f"Bearer {ALICE}"}) as http:
        body = {"model": "policy", "input": "go on", "previous_response_id": "resp_1"}
        reply = await http.post("/v1/responses", json=body)
    assert 400 <= reply.status_code < 500 and "resp_1" in reply.json()["error"]["message"]


async def test_regenerated_edited_and_branched_chats_link_each_answer_to_its_own_reply(program):
    """Open WebUI keeps a tree of messages. Each answer is a separate turn, linked only to the reply to it."""
    chat = {"X-OpenWebUI-Chat-Id": "chat-7"}

    async def ask(*talk):
        messages = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(talk)]
        stream = await client(program).chat.completions.create(
            model="policy", messages=messages, max_tokens=12, stream=True, extra_headers=chat
        )
        chunks = [chunk async for chunk in stream]
        return chunks[0].id, "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)

    question = "a question in a web page"
    (one, red), (two, blue) = await ask(question), await ask(question)  # the second one is a regenerate
    three, green = await ask(question, blue, "No, wrong.")
    four, _ = await ask(question, red, "Thank you!")  # back to the first branch
    five, _ = await ask(question, blue, "Wrong, and rude.")  # the user's message is edited
    six, _ = await ask(f"{question}, edited")
    seven, _ = await ask(question, blue, "No, wrong.", green, "Shorter, please.")
    title, _ = await ask(f"### Task:\nGenerate a title.\n<chat_history>\nUSER: {question}\n</chat_history>")
    found = {r["id"]: r for r in rows(program, "session = ?", "alice/chat-7")}
    assert list(found) == [one, two, three, four, five, six, seven, title]
    said = {k: [m["content"] for m in json.loads(r["next_messages"] or "[]")] for k, r in found.items()}
    assert (said[one], said[two], said[three]) == (["Thank you!"], ["No, wrong."], ["Shorter, please."])
    assert all(said[k] == [] and found[k]["state"] == "waiting" for k in (four, five, six, seven, title))


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """A program whose model thinks before each answer, with a context long enough for an agent's prompts."""
    model = make_tool_model(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE.replace("<think></think><|say|>", "<think>")
    tokenizer.save_pretrained(model)
    options = {"reasoning_parser": "deepseek_r1", "judge_style": "chat", "max_model_len": 20_000, "batch_size": 1}
    program = Program(model, tmp_path_factory.mktemp("thinking"), **options)
    yield program.wait_ready()
    program.stop()


async def test_an_answer_that_continues_another_is_judged_by_the_reply_to_both(program):
    c, talk = client(program, ALICE), [user("a story, please"), {"role": "assistant", "content": "Once upon a time"}]
    more = await ask(c, talk, max_tokens=8, extra_body={"ignore_eos": True})
    talk[1]["content"] += more.choices[0].message.content
    await ask(c, [*talk, user("No, shorter.")])
    (row,) = rows(program, "id = ?", more.id)
    assert json.loads(row["next_messages"])[0]["content"] == "No, shorter."


async def test_thinking_is_sent_separately_and_recorded_with_the_answer(thinking):
    """The client need not send the thinking back. The model also thinks first when it is the judge."""
    c, talk = client(thinking), [user("hello")]
    stream = await c.chat.completions.create(model="policy", messages=talk, stream=True)
    deltas = [chunk.choices[0].delta async for chunk in stream if chunk.choices]
    thought = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
    answer = "".join(d.content or "" for d in deltas)
    assert thought and answer and not set(thought.split()) - {"Hm", "so", "then", "well"}
    talk += [{"role": "assistant", "content": answer}, user("No, wrong.")]
    await c.chat.completions.create(model="policy", messages=talk)
    (row,) = await until(lambda: rows(thinking, "votes IS NOT NULL"))
    assert row["text"] == f"{thought}</think>{answer}"
    assert row["source"] == "judge" and len(json.loads(row["votes"])) == 3
    talk[1]["reasoning_content"] = thought
    reply = (await c.chat.completions.create(model="policy", messages=talk)).choices[0].message
    assert reply.reasoning_content and not hasattr(reply, "reasoning")
    (row,) = rows(thinking, "messages LIKE '%reasoning_content%'")
    prompt = np.frombuffer(row["prompt_ids"], np.int32).tolist()
    assert thought in AutoTokenizer.from_pretrained(thinking.model).decode(prompt)
    recorded = turn(messages=json.loads(row["messages"]), template=json.loads(row["template"]), prompt_ids=prompt)
    assert await distill.hinted_prompts(c, recorded, ["Be brief, please."])


async def test_an_agents_long_prompt_is_trained_on(thinking):
    async def outcome(length):
        turn_id = await rated(thinking, "x" * length, max_tokens=600, extra_body={"ignore_eos": True})
        return await until(lambda: rows(thinking, "id = ? AND state IN ('trained', 'dropped')", turn_id), 200)

    ((fits,), (too_long,)) = await outcome(12_000), await outcome(16_000)
    assert fits["state"] == "trained" and len(fits["prompt_ids"]) > 4 * 12_000
    assert len(fits["response_ids"]) == 4 * 600
    assert (too_long["state"], too_long["reason"]) == ("dropped", "longer than --max_train_tokens=16384")


async def test_a_client_can_name_the_session_in_a_header(program):
    said = [{"role": "user", "content": "who am I?"}]
    headers = {"x-session-affinity": "main:1"}
    reply = await client(program).chat.completions.create(
        model="policy", messages=said, max_tokens=4, extra_headers=headers
    )
    assert rows(program, "id = ?", reply.id)[0]["session"] == "alice/main"


def test_errors_of_our_own_routes_have_the_form_of_openai(program):
    headers = {"Authorization": f"Bearer {ALICE}"}

    def damaged(request):
        raise UsageError("trainer.pt is damaged")

    app = Starlette(routes=[Route("/x", damaged)], exception_handlers={Exception: server.own_error})
    reply = TestClient(app, raise_server_exceptions=False).get("/x")
    assert (reply.status_code, reply.json()["error"]["message"]) == (500, "UsageError: trainer.pt is damaged")
    reply = httpx.post(f"{program.url}/v1/chat/completions", headers=headers, json=HELLO_BODY, timeout=60).json()
    long = {"completion_id": reply["id"], "score": -1, "text": "x" * 10_001}
    reply = httpx.post(f"{program.url}/v1/feedback", headers=headers, json=long)
    assert reply.status_code == 400 and "at most 10000 characters" in reply.json()["error"]["message"]


def test_a_thumb_and_its_words_come_in_two_requests(tiny_model, tmp_path):
    """Open WebUI sends the thumb at the click, and the words when a form is saved."""
    program = Program(tiny_model, tmp_path, batch_size=1).wait_ready()
    try:
        with httpx.Client(base_url=f"{program.url}/v1", timeout=60) as http:
            reply = http.post("/chat/completions", json=HELLO_BODY).json()["choices"][0]["message"]
            thumb = {"messages": [*HELLO_BODY["messages"], reply], "score": -1}
            assert http.post("/feedback", json=thumb).status_code == 200
            time.sleep(5)  # the trainer is idle
            words = thumb | {"text": "You should have said it in German."}
            assert http.post("/feedback", json=words).status_code == 200
        deadline = time.monotonic() + 20
        while not program.metrics() and time.monotonic() < deadline:
            time.sleep(0.5)
        assert [step["hinted"] for step in program.metrics()] == [1.0]
    finally:
        program.stop()


def test_an_answer_with_chosen_logprobs_is_recorded(program):
    """vLLM's own field: log-probs of certain tokens, besides the sampled one."""
    headers, ids = {"Authorization": f"Bearer {ALICE}"}, [65, 66, 67]
    body = HELLO_BODY | {"logprobs": True, "logprob_token_ids": ids, "return_token_ids": True}
    reply = httpx.post(f"{program.url}/v1/chat/completions", headers=headers, json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    (row,) = rows(program, "id = ?", reply.json()["id"])
    given = [at["logprob"] for at in reply.json()["choices"][0]["logprobs"]["content"]]
    recorded = np.frombuffer(row["logprobs"], np.float32)
    assert len(recorded) == 4 and np.allclose(recorded, given, atol=1e-4)


async def test_odd_message_shapes_cause_no_server_error(program):
    """The session matcher must handle all that vLLM accepts, also in the next request of the conversation."""
    big = {"id": ["x"], "type": "function", "function": {"name": "f", "arguments": json.dumps({"n": 10**400})}}
    call = {"id": "i", "type": "function", "function": {"name": "f", "arguments": '{"n": ' + "9" * 400 + "}"}}
    odd = [
        [{"role": "user", "content": "hi", "tool_calls": [{"function": "x"}]}],
        [{"role": "assistant", "content": "n", "tool_calls": [call]}],
        [{"role": "assistant", "content": "n", "tool_calls": [big]}],
        [{"role": "tool", "content": "n", "tool_call_id": ["x"]}],
    ]
    async with httpx.AsyncClient(
        base_url=program.url, headers={"Authorization": f"Bearer {ALICE}"}, timeout=60
    ) as http:
        for messages in odd:
            talk = [{"role": "user", "content": "hi"}, *messages, {"role": "user", "content": "go on"}]
            for tools in ({}, {"tools": [{"type": "function", "function": {"name": "f"}}]}):
                reply = await http.post(
                    "/v1/chat/completions", json={"model": "policy", "messages": talk, "max_tokens": 2} | tools
                )
                assert reply.status_code in (200, 400), reply.text


def test_a_key_with_quotes_can_be_pasted():
    key = """a'b"c$d"""
    command = paste.curl("http://127.0.0.1:9/v1", "it's", key, 2048).replace("curl", "printf '%s\\n'", 1)
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.splitlines()
    assert f"Authorization: Bearer {key}" in said and json.loads(said[-1])["model"] == "it's"
    compile(paste.openai("u", "m", key, 2048), "pasted", "exec")
    assert json.loads(paste.openclaw("u", "m", key, 2048))["models"]["providers"]["rl"]["apiKey"] == key
    assert (
        key
        in subprocess.run(
            ["bash", "-c", paste.open_webui("u", "m", key, 2048).replace("open-webui serve", "env")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )


def test_the_curl_command_and_the_openai_code_to_paste_work(program):
    arguments = f"{program.url}/v1", "policy", ALICE, 2048
    answer = subprocess.run(["bash", "-c", paste.curl(*arguments)], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["choices"][0]["message"]["role"] == "assistant"
    code = paste.openai(*arguments).replace("messages=talk", "messages=talk, max_tokens=8")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    first, second = [r for r in rows(program) if r["prompt_ids"] and "Why is the sky blue" in r["messages"]][-2:]
    assert "one sentence" in first["next_messages"] and second["session"] == first["session"]


@pytest.mark.parametrize("client_name", ["openclaw", "openai", "curl", "open-webui"])
def test_client_settings_to_paste_are_printed(client_name):
    options = ["--url=http://127.0.0.1:1234/v1", "--key=sk-1", f"--client={client_name}"]
    done = subprocess.run(
        [sys.executable, "-m", "clients.paste", *options], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "http://127.0.0.1:1234/v1" in done.stdout and "sk-1" in done.stdout
    if client_name == "openclaw":
        (provider,) = json.loads(done.stdout)["models"]["providers"].values()
        assert provider["models"][0]["contextWindow"] == 8192 and provider["apiKey"] == "sk-1"


def test_show_prints_a_session(program, tmp_path):
    def show(*options):
        command = [sys.executable, "-m", "durable.admin", "show", *options]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    body = {"model": "policy", "messages": [{"role": "user", "content": "show me"}], "max_tokens": 4}
    headers = {"Authorization": f"Bearer {ALICE}", "X-Session-Id": "shown"}
    with httpx.Client(base_url=program.url, headers=headers, timeout=60) as http:
        reply = http.post("/v1/chat/completions", json=body).json()
        feedback = {"completion_id": reply["id"], "score": -1, "text": "You should have been brief."}
        assert http.post("/v1/feedback", json=feedback).status_code == 200
    found = show(f"--out={program.out}", "--session=alice/shown").stdout
    for line in (
        "user      show me",
        "verdict   -1 by feedback",
        "hint      You should have been brief. (own words)",
        "became",
    ):
        assert line in found, found
    assert "show me" in show(f"--out={program.out}").stdout
    assert "no such session" in show(f"--out={program.out}", "--session=none").stderr
    assert "no journal.db" in show(f"--out={tmp_path}").stderr


@pytest.mark.parametrize(
    ("template", "parser"),
    [
        ("{% if tools %}<tool_call>{% endif %}<|python_tag|>", "hermes"),
        ("Environment: ipython", "llama3_json"),
        ("<tool_call><function=name>", "qwen3_coder"),
        ("[TOOL_CALLS]", "mistral"),
        ("<｜tool▁calls▁begin｜>", "hermes"),  # this token is not in the vocabulary
        ("{{ messages }}", "hermes"),
    ],
)
def test_the_tool_parser_is_chosen_from_the_chat_template(tiny_model, tmp_path, template, parser):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    assert tool_parser_of(tmp_path) == parser


def admin_headers(program):
    return {"Authorization": f"Bearer {(program.out / 'admin_key').read_text().strip()}"}


def metrics(program):
    return httpx.get(f"{program.url}/metrics", headers=admin_headers(program)).raise_for_status().text


def test_a_user_sees_only_their_own_counts_and_the_admin_sees_all(program):
    def ask_and_count_turns(user, key):
        body = {"model": "policy", "messages": [{"role": "user", "content": f"I am {user}"}], "max_tokens": 2}
        headers = {"Authorization": f"Bearer {key}"}
        httpx.post(f"{program.url}/v1/chat/completions", headers=headers, json=body, timeout=60).raise_for_status()
        return sum(httpx.get(f"{program.url}/status", headers=headers).json()["turns"].values())

    own = {user: ask_and_count_turns(user, key) for user, key in (("alice", ALICE), ("bob", BOB))}
    everyones = httpx.get(f"{program.url}/status", headers=admin_headers(program)).json()["turns"]
    assert own["bob"] < own["alice"] + own["bob"] == sum(everyones.values()) == len(rows(program))
    assert own["bob"] == len(rows(program, "user = 'bob'"))
    for state, n in everyones.items():
        assert f'openclaw_rl_turns{{state="{state}"}} {n:.1f}\n' in metrics(program)


def test_users_do_not_share_a_prefix_cache(program):
    """Otherwise the time to the first token would reveal what another user asked."""

    def cached_tokens(key, path="/v1/chat/completions", field="messages"):
        def figure(name):
            lines = metrics(program).splitlines()
            return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:prefix_cache_{name}"))

        asked, hits, text = figure("queries_t"), figure("hits_t"), "Is this a secret? " * 60
        body = {"model": "policy", "max_tokens": 1, field: text if field == "prompt" else [user(text)]}
        headers = {"Authorization": f"Bearer {key}"}
        httpx.post(f"{program.url}{path}", headers=headers, json=body, timeout=60).raise_for_status()
        deadline = time.monotonic() + 20
        while figure("queries_t") == asked:  # vLLM updates its counters a moment after the answer
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return figure("hits_t") - hits

    assert cached_tokens(ALICE) == 0 and cached_tokens(ALICE) > 500
    assert cached_tokens(BOB) == 0
    assert cached_tokens(ALICE, "/v1/completions", "prompt") == 0 < cached_tokens(ALICE, "/v1/completions", "prompt")
    assert cached_tokens(BOB, "/v1/completions", "prompt") == 0


def test_an_untrained_key_is_served_but_not_trained_on(program):
    (program.out / "keys").write_text((program.out / "keys").read_text() + "\ncarol:key-c untrained\n")
    headers = {"Authorization": "Bearer key-c"}
    talk = [user("This is confidential.")]
    with httpx.Client(base_url=program.url, headers=headers, timeout=60) as http:
        for _ in range(2):
            reply = http.post("/v1/chat/completions", json={"model": "policy", "messages": talk, "max_tokens": 12})
            talk += [reply.json()["choices"][0]["message"], user("No, that was too long.")]
            feedback = http.post("/v1/feedback", json={"completion_id": reply.json()["id"], "score": -1})
            assert feedback.status_code == 409 and "this key is not trained on" in feedback.text
        dropped = http.get("/status").json()["dropped"]
    assert dropped == {"this key is not trained on": 2}
    assert not any(r["next_messages"] for r in rows(program, "user = 'carol'"))


def test_a_key_can_be_added_and_revoked_while_the_program_runs(program):
    def change(*options):
        command = [sys.executable, "-m", "durable.admin", "key", f"--out={program.out}", *options]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()

    headers = {"Authorization": f"Bearer {change('--add=dora')}"}
    assert httpx.get(f"{program.url}/v1/models", headers=headers).status_code == 200
    with httpx.stream("GET", f"{program.url}/web/events", headers=headers, timeout=30) as page:
        change("--revoke=dora")
        for _ in page.iter_raw():  # an open page gets nothing more
            pass
    assert httpx.get(f"{program.url}/v1/models", headers=headers).status_code == 401
    assert httpx.get(f"{program.url}/v1/models", headers={"x-api-key": ALICE}).status_code == 200
    assert not any(key in program.log() for key in (ALICE, BOB, "key-c"))
