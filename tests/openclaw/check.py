"""Runs the real, unmodified OpenClaw against the real program. It installs node and openclaw with npm into a folder.
Two sessions talk through OpenClaw's gateway and one through the one-shot CLI, while weights are swapped. OpenClaw's own
requests are triggered, too: a memory flush, a heartbeat, a session's title, a compaction's summary. Then the journal is
checked.

    .venv/bin/python -m tests.openclaw.check FOLDER

Needs npm's registry, and takes about five minutes the first time. The model is random except for the form of its
answers: it answers a user's message with a thought and a tool call, and a tool's result with words.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import openai
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from clients import paste
from clients.sessions import answer_digest
from tests.conftest import Program, free_port, make_tiny_model
from tests.test_program import rows

NODE, OPENCLAW, KEY, CONTEXT = "node@26", "openclaw@2026.9.6", "sk-claw", 65_536
SESSIONS, TURNS = ("alpha", "beta"), 5

TEMPLATE = """{%- if tools %}<|im_start|>system
# Tools: call one as <tool_call> JSON </tool_call>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning %}<think>{{ m.reasoning }}</think>{% endif %}
{{- m.content or '' }}{% for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% set carried = 'INTERNAL_CONTEXT' in (messages[-1].content or '') %}
{%- set last = messages[-2 if carried else -1] %}
{%- if 'Follow the heartbeat' in (last.content or '') %}<think></think><|hush|>
{%- elif tools and last.role != 'tool' %}<think>
{%- else %}<think></think><|say|>{% endif %}{% endif %}"""
OPEN, CLOSE = '<tool_call>\n{"name": "exec", "arguments": {"command": "', '"}}\n</tool_call>'
COMMANDS = ["date -u", "echo hello", "ls -a /", "no-such-command"]
HUSH, THINK, THOUGHT = "NO_REPLY", ["<think>", "</think>"], [" Hm", " so", " then", " well"]
WORDS = [" It", " is", " done", " now", " and", " here", " was", " the", " file", "!"]


def make_tool_model(folder: Path) -> Path:
    """A Llama whose next token depends only on the last one: a chain through a tool call, or through some words."""
    make_tiny_model(folder, tied=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|say|>", "<|hush|>"]})
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t in [HUSH, *THINK, *THOUGHT, OPEN, CLOSE, *COMMANDS, *WORDS]]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    config.vocab_size = config.hidden_size = -(-len(tokenizer) // 64) * 64
    config.head_dim, config.max_position_embeddings = 64, CONTEXT
    model = type(model)(config)
    end, (think, thought) = tokenizer.eos_token, THINK
    chain = {think: THOUGHT, thought: [OPEN], OPEN: COMMANDS, CLOSE: [end], "<|say|>": WORDS}
    chain |= {"<|hush|>": [HUSH], HUSH: [end]}
    chain |= dict.fromkeys(THOUGHT, [*THOUGHT, thought]) | dict.fromkeys(COMMANDS, [CLOSE])
    chain |= dict.fromkeys(WORDS, [*WORDS, end, end])
    of = tokenizer.convert_tokens_to_ids
    after = {of(token): [of(t) for t in following] for token, following in chain.items()}
    with torch.no_grad():
        for layer in model.model.layers:  # only the last token counts, until training changes that
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(config.vocab_size))
        model.lm_head.weight.normal_(std=1e-3)
        for token, following in after.items():  # a one-hot state has the norm sqrt(D) after RMSNorm
            for nxt in set(following):
                model.lm_head.weight[nxt, token] = (20 + np.log(following.count(nxt))) / config.hidden_size**0.5
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def installed(folder: Path, home: Path) -> dict[str, str]:
    """Install openclaw and a matching node into `folder` with npm. Return an environment with both in its PATH."""
    env = os.environ | {"HOME": str(home), "OPENCLAW_HOME": str(home)}
    for name, package, flags in (("node", NODE, []), ("app", OPENCLAW, ["--ignore-scripts"])):
        binary = folder / name / "node_modules" / ("node/bin" if name == "node" else ".bin")
        if not binary.exists():
            subprocess.run(["npm", "install", "--prefix", folder / name, *flags, package], check=True, env=env)
        env["PATH"] = f"{binary}:{env['PATH']}"
    return env


def settings_for(url: str) -> dict:
    """What `python -m clients.paste` prints, changed so that OpenClaw soon flushes its memory and compacts."""
    settings = json.loads(paste.openclaw(f"{url}/v1", "policy", KEY, 8192))
    settings["models"]["providers"]["rl"]["models"][0]["contextWindow"] = CONTEXT
    settings["agents"]["defaults"] |= {
        "heartbeat": {"every": "30m", "target": "none"},
        "compaction": {
            "mode": "default",
            "keepRecentTokens": 100,
            "memoryFlush": {"enabled": True, "forceFlushTranscriptBytes": "1kb"},
        },
    }
    return settings


def is_up(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def gateway_of(out: Path, env: dict[str, str], settings: dict) -> Iterator[None]:
    """Run OpenClaw's gateway with these settings, and write its log to `out`."""
    port = free_port()
    own = {"mode": "local", "bind": "loopback", "port": port, "auth": {"mode": "token", "token": "t"}}
    place = Path(env["HOME"]) / ".openclaw"
    place.mkdir(parents=True)
    (place / "openclaw.json").write_text(json.dumps(settings | {"gateway": own}))
    with open(out / "gateway.log", "w") as log:
        command, deadline = ["openclaw", "gateway", "run"], time.monotonic() + 120
        gateway = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        while not is_up(f"http://127.0.0.1:{port}/healthz"):
            log_so_far = (out / "gateway.log").read_text()[-3000:]
            assert gateway.poll() is None and time.monotonic() < deadline, log_so_far
            time.sleep(0.5)
        yield
        gateway.terminate()
        gateway.wait(60)
    finally:
        if gateway.poll() is None:
            os.killpg(gateway.pid, signal.SIGKILL)


def openclaw(env: dict[str, str], *command: str) -> str:
    done = subprocess.run(["openclaw", *command], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    return done.stdout


def say(env: dict[str, str], session: str, text: str, *flags: str) -> None:
    whom = ("--agent", "main") if session == "main" else ("--session-id", session)
    openclaw(env, "agent", *flags, *whom, "--message", text, "--json")


def kind(row) -> str:
    """The kind of this request of OpenClaw's, by its text (`sessions.py` decides it in another way)."""
    messages = json.loads(row["messages"])
    system, said = (" ".join(str(m["content"]) for m in messages if m["role"] == "system"), user_text(row))
    if "tools" not in json.loads(row["template"]):
        return "title" if system.startswith("Generate a concise session title") else "summary"
    if said.startswith("Pre-compaction memory flush"):
        return "flush"
    return "heartbeat" if said.startswith("Follow the heartbeat") else "main"


def wait_for(program: Program, what: str, known: int = 0) -> int:
    """Wait until there are more than `known` requests of this kind. Return their number."""
    deadline = time.monotonic() + 120
    while (n := [kind(r) for r in openclaw_rows(program)].count(what)) <= known:
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.5)
    return n


def openclaw_rows(program: Program) -> list:
    return rows(program, "user = 'claw'")


@contextmanager
def refusing_proxy(url: str) -> Iterator[str]:
    """The address of a proxy to the program. It answers the first request of the session "retry" with a 503."""
    refused: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if b"turn of retry" in body and not refused:
                refused.append(body)
                self.send_error(503)
                return
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "content-length")}
            with httpx.stream("POST", url + self.path, content=body, headers=headers, timeout=None) as answer:
                self.send_response(answer.status_code)
                self.send_header("content-type", answer.headers["content-type"])
                self.end_headers()
                for chunk in answer.iter_raw():
                    self.wfile.write(chunk)
                    self.wfile.flush()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
        assert refused, "nothing was refused"


def keep_training(program: Program, stop: threading.Event, errors: list) -> None:
    """Ask and rate as another user, so that there are steps and swaps all the time."""
    c = openai.OpenAI(base_url=f"{program.url}/v1", api_key="sk-other", max_retries=0)
    k = 0
    while not stop.is_set():
        try:
            reply = c.chat.completions.create(
                model="policy", messages=[{"role": "user", "content": f"go {k}"}], max_tokens=20
            )
            body = {"completion_id": reply.id, "score": 1 if k % 2 else -1}
            httpx.post(
                f"{program.url}/v1/feedback", json=body, headers={"Authorization": "Bearer sk-other"}, timeout=60
            )
        except (openai.APIError, httpx.HTTPError) as e:
            errors.append(e)
        k += 1
        time.sleep(0.5)


def check(program: Program, model: Path, said: list[tuple[str, str]]) -> None:
    """Check that each message has two answers, a tool call and words, and that each is linked to its next message."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = openclaw_rows(program)
    main = [r for r in found if kind(r) == "main" and "turn of retry" not in r["messages"]]
    for k, (session, text) in enumerate(said):
        mine = [r for r in main if text in user_text(r)]
        assert len(mine) == 2, f"{text!r}: {len(mine)} answers"
        call, words = mine
        assert "<tool_call>" in call["text"] and "<tool_call>" not in words["text"]
        # The thinking is sent back with the history, in its own field, so the model reads it.
        (thought,) = re.findall("(.*)</think>", call["text"])
        assert [m for m in json.loads(words["messages"]) if m.get("reasoning_content") == thought], thought
        assert [m["role"] for m in json.loads(call["next_messages"])] == ["tool"]
        nxt = [t for s, t in said[k + 1 :] if s.split()[0] == session.split()[0]][:1]  # also after a compaction
        if nxt:
            (came,) = json.loads(words["next_messages"])
            assert came["role"] == "user" and nxt[0] in str(came["content"]), (nxt, came)
        else:
            assert words["state"] == "waiting" and words["next_messages"] is None
        assert call["session"] == words["session"]
        for row in mine:
            ids = {k: np.frombuffer(row[k], np.int32).tolist() for k in ("prompt_ids", "response_ids")}
            assert tokenizer.decode(ids["response_ids"], skip_special_tokens=True) == row["text"]
            template = json.loads(row["template"])
            rendered = tokenizer.apply_chat_template(
                as_rendered(json.loads(row["messages"])),
                tools=template["tools"],
                add_generation_prompt=True,
                return_dict=False,
            )
            assert ids["prompt_ids"] == rendered, "the prompt is not what the messages render to"
    sides = [r for r in found if kind(r) != "main"]
    assert {kind(r) for r in sides} == {"title", "summary", "flush", "heartbeat"}
    for row in sides:
        # A memory flush is cancelled if the user sends a message meanwhile.
        assert re.match("side request: the client's own|cut short", row["reason"]), (kind(row), row["state"])
        assert row["next_messages"] is None
    counted = ", ".join(f"{n} {what}" for what, n in Counter(map(kind, sides)).items())
    print(f"{len(main)} answers of {len(said)} turns, all linked; of its own requests none trained on: {counted}")


def print_turns(found: list) -> None:
    """Print the outcome of each answer, and the end of its next message."""
    for r in found:
        nxt = r["next_messages"] and r["next_messages"][-60:]
        print(
            r["session"], kind(r), r["state"], r["reason"], r["score"], repr(r["text"][-40:]), user_text(r)[-60:], nxt
        )


def check_retry(program: Program) -> None:
    """OpenClaw's retry is never in its history. An answer must be linked exactly if a later history contains it."""
    found = [r for r in openclaw_rows(program) if "turn of retry" in r["messages"] and kind(r) == "main"]
    for k, row in enumerate(found):
        later = [m for r in found[k + 1 :] for m in json.loads(r["messages"]) if m["role"] == "assistant"]
        followed = row["answer"] in [answer_digest(m) for m in later]
        assert (row["next_messages"] is not None) is followed, (row["text"], row["next_messages"])
    print(f"a retry: {len(found)} answers, {sum(r['next_messages'] is not None for r in found)} of them linked")


def user_text(row) -> str:
    said = [
        m for m in json.loads(row["messages"]) if m["role"] == "user" and "INTERNAL_CONTEXT" not in str(m["content"])
    ]
    return str(said[-1]["content"])


def as_rendered(messages: list[dict]) -> list[dict]:
    """The messages as vLLM passes them to the template: tool calls' arguments as objects, content as text."""
    out = []
    for m in messages:
        calls = [
            c | {"function": c["function"] | {"arguments": json.loads(c["function"]["arguments"])}}
            for c in m.get("tool_calls") or []
        ]
        content = m.get("content")
        text = "".join(p["text"] for p in content) if isinstance(content, list) else content
        thought = {"reasoning": m["reasoning_content"]} if "reasoning_content" in m else {}
        out.append(m | {"content": text} | thought | ({"tool_calls": calls} if calls else {}))
    return out


def talk(env: dict[str, str], program: Program, said: list[tuple[str, str]]) -> None:
    """Through the gateway: two sessions alternately, then OpenClaw's own requests between the user's messages."""

    def say_turn(chain: str, turn: int) -> None:
        said.append((chain, f"This is turn of {chain}, number {turn}: look, please."))
        say(env, chain.split()[0], said[-1][1])
        print(said[-1][1], f"step {program.status()['step']}", flush=True)

    for turn in range(1, TURNS + 1):
        for session in SESSIONS:
            say_turn(session, turn)
        if turn == 1:
            wait_for(program, "flush")

    # Also before the user's first message: OpenClaw then joins the two in its history.
    for turn in (1, 2, 3):
        known = [kind(r) for r in openclaw_rows(program)].count("heartbeat")
        openclaw(env, "system", "event", "--mode", "now", "--text", f"The washing machine is done, {turn} times.")
        wait_for(program, "heartbeat", known)
        say_turn("main", turn)

    openclaw(env, "sessions", "compact", "agent:main:explicit:alpha")
    wait_for(program, "summary")
    for turn in (1, 2):
        say_turn("alpha after compaction", turn)

    said.append(("dashboard", "This is turn of dashboard, number 1: look, please."))
    openclaw(env, "gateway", "call", "sessions.create", "--params", json.dumps({"message": said[-1][1]}))
    wait_for(program, "title")
    wait_for(program, "main", 2 * len(said) - 1)
    while openclaw_rows(program)[-1]["created"] > time.time() - 5:  # its requests after the last answer
        time.sleep(1)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"out-{time.strftime('%H%M%S')}"
    env, model = installed(folder, out / "home"), make_tool_model(folder / "model")
    options = {"max_model_len": CONTEXT, "max_train_tokens": CONTEXT, "batch_size": 2, "lr": 1e-5}
    options["reasoning_parser"] = "deepseek_r1"
    program = Program(model, out, key=f"claw:{KEY},other:sk-other", **options)
    stop, errors, said = threading.Event(), [], []
    others = threading.Thread(target=keep_training, args=(program, stop, errors))
    try:
        program.wait_ready()
        others.start()
        step = program.status()["step"]
        with refusing_proxy(program.url) as url:
            with gateway_of(out, env, settings_for(url)):
                talk(env, program, said)
                met = re.findall(".*(?:isError=true|rawError=).*", (out / "gateway.log").read_text())
                for turn in (1, 2):
                    say(env, "retry", f"This is turn of retry, number {turn}: look, please.")
            for turn in (1, 2):  # without the gateway, which uses the same folder as the one-shot CLI
                said.append(("gamma", f"This is turn of gamma, number {turn}: look, please."))
                say(env, *said[-1], "--local")
        swaps = program.status()["step"] - step
    finally:
        stop.set()
        if others.is_alive():
            others.join()
        ended = program.stop()
    assert swaps >= 5, f"only {swaps} swaps"
    assert not errors, errors
    try:
        check(program, model, said)
    except (AssertionError, TypeError, ValueError):
        print_turns(openclaw_rows(program))
        raise
    check_retry(program)
    assert not met, met
    print(f"{swaps} swaps meanwhile; the program ended in {ended:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
