"""Runs the unmodified Claude Code against the real program. It is installed with npm into a folder, and sends three
messages in one conversation (`claude -p`, then --continue), each with a tool call and its result. Then the journal is
checked.

    .venv/bin/python -m tests.openclaw.claude_code FOLDER

Needs npm's registry. The model is random except for the form of its answers. The context is long, since Claude Code's
prompt has 74,000 bytes, and here each byte is a token.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from transformers import AutoTokenizer

from clients.sessions import request_of
from tests.conftest import Program
from tests.openclaw import check
from tests.talking import rows

PACKAGE, KEY, CONTEXT = "@anthropic-ai/claude-code@2.1.197", "sk-claude", 262_144
CALL = '<tool_call>\n{"name": "Bash", "arguments": {"description": "look", "command": "'
SAID = ["Say hello, please.", "No, that was too short.", "Thank you, that is right."]


def make_model(folder: Path) -> Path:
    """`check.make_tool_model` with Claude Code's tool: the model calls it once, then answers in words."""
    check.OPEN, check.CONTEXT, check.COMMANDS = CALL, CONTEXT, ["date -u", "echo hello"]
    check.make_tool_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = check.TEMPLATE.replace("{%- elif tools and last", "{%- elif tools and last")
    tokenizer.save_pretrained(folder)
    return folder


def say(binary: Path, env: dict[str, str], where: Path, text: str, *options: str) -> str:
    command = [binary, "-p", text, "--allowedTools", "Bash", "--model", "policy", *options]
    done = subprocess.run(command, env=env, cwd=where, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def main(folder: Path) -> None:
    out = folder / f"claude-{time.strftime('%H%M%S')}"
    where, home, binary = out / "work", out / "home", folder / "claude/node_modules/.bin/claude"
    where.mkdir(parents=True), home.mkdir()
    if not binary.exists():
        subprocess.run(["npm", "install", "--prefix", folder / "claude", PACKAGE], check=True)
    options = {"max_model_len": CONTEXT, "max_train_tokens": 1024, "batch_size": 1000, "engine_memory": 2.0}
    program = Program(make_model(out / "model"), out, key=f"me:{KEY}", reasoning_parser="deepseek_r1", **options)
    try:
        program.wait_ready()
        env = {"PATH": os.environ["PATH"], "HOME": str(home), "IS_SANDBOX": "1"}
        env |= {"ANTHROPIC_BASE_URL": program.url, "ANTHROPIC_AUTH_TOKEN": KEY}
        env |= {f"ANTHROPIC_DEFAULT_{size}_MODEL": "policy" for size in ("OPUS", "SONNET", "HAIKU")}
        for number, text in enumerate(SAID):
            print(say(binary, env, where, text, *(["--continue"] if number else [])))
    finally:
        program.stop()
    found = [r for r in rows(program) if "side request" not in (r["reason"] or "")]
    for r in found:
        following = [(m["role"], str(m["content"])[:60]) for m in json.loads(r["next_messages"] or "[]")]
        print(r["session"], r["state"], r["reason"], repr(request_of(json.loads(r["messages"]))[:60]), following)
    main_turns = [r for r in found if request_of(json.loads(r["messages"])) in SAID]
    assert len({r["session"] for r in main_turns}) == 1, "one session"
    assert {request_of(json.loads(r["messages"])) for r in main_turns} == set(SAID), "only what the user wrote"
    assert all(r["next_messages"] for r in main_turns[:-1]), "each answer but the last has its next message"


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
