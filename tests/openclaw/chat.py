"""A short first chat, with complaints, with SmolLM2-135M behind the real OpenClaw. Then it prints what the journal says
about each answer.

    .venv/bin/python -m tests.openclaw.chat FOLDER

Use the same folder as for check.py. Takes about five minutes on two cores: the agent's prompt has 2,100 tokens.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from clients import paste
from durable.model import model_folder
from tests.conftest import ROOT, Program
from tests.openclaw.check import KEY, gateway_of, installed, openclaw

QUESTIONS = ("What is a glacier?", "Why is the sea salty?", "What does a judge do?", "What is a volcano?")


def reaction(answer: str) -> str:
    """The reply of a user who wants one sentence: not two words, not a page."""
    words = len(answer.split())
    if words < 8:
        return "No, much too short. I wanted a whole sentence that explains it."
    return "No, much too long. Redo it as one short sentence." if words > 40 else "Perfect, thanks!"


def answer_to(env: dict[str, str], text: str) -> str:
    out = openclaw(env, "agent", "--session-id", "chat", "--message", text, "--json")
    payloads = json.loads(out[out.index("{") :])["result"]["payloads"]
    return "\n".join(p["text"] for p in payloads)


def main(folder: Path) -> None:
    out = folder / f"chat-{time.strftime('%H%M%S')}"
    env = installed(folder, out / "home")
    program = Program(model_folder(""), out, key=f"me:{KEY}", max_model_len=8192, engine_memory=1, batch_size=4)
    try:
        program.wait_ready()
        settings = json.loads(paste.openclaw(f"{program.url}/v1", "policy", KEY, 8192))
        with gateway_of(out, env, settings):
            for question in QUESTIONS:
                answer = answer_to(env, question)
                print(f"\n> {question}\n{answer}\n\n> {reaction(answer)}", flush=True)
                print(answer_to(env, reaction(answer)), flush=True)
            answer_to(env, "Thank you, that's all.")
            while program.status()["step"] < 1:
                time.sleep(1)
    finally:
        program.stop()
    show = [sys.executable, "-m", "durable.admin", "show", f"--out={out}", "--session=me/chat"]
    print(f"\n$ {' '.join(show[1:])}", flush=True)
    subprocess.run(show, check=True, cwd=ROOT)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
