"""Runs the unmodified Open WebUI against the real program. It is installed with pip into a folder, without the packages
for its own models, and gets the function of docs/openwebui_feedback.py. Its HTTP API is used as its page does: chats
with and without tools and a file, thumbs with and without a comment, regenerate, edit. Then the journal is checked.

    .venv/bin/python -m tests.openclaw.open_webui FOLDER

Needs PyPI and 1.5 GB of disk. The model is random except for the form of its answers: see check.make_tool_model.
"""

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import httpx

from clients import paste
from clients.sessions import request_of
from tests.conftest import ROOT, Program, free_port
from tests.openclaw import check
from tests.talking import rows

PACKAGE, KEY, CONTEXT = "open-webui==0.12.4", "sk-webui", 32_768  # its own tools have 20,600 bytes; a byte is a token
OWN_MODELS = ("accelerate", "einops", "faster-whisper", "opencv", "rapidocr", "sentence-transformers", "transformers")
SETTINGS = {"WEBUI_AUTH": "False", "OFFLINE_MODE": "true", "ENABLE_OLLAMA_API": "False", "WEBUI_SECRET_KEY": "x"}
SETTINGS |= {"BYPASS_EMBEDDING_AND_RETRIEVAL": "true", "RAG_EMBEDDING_ENGINE": "openai"}
NO_TOOLS = {"function_calling": "legacy"}


def wait(what, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.3)
    return value


def install(venv: Path) -> None:
    pip = [venv / "bin/python", "-m", "pip", "install", "-q"]
    listing = "from importlib.metadata import requires; print(*requires('open-webui'), sep='\\n')"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    subprocess.run([*pip, "--no-deps", PACKAGE], check=True)
    needed = subprocess.run([venv / "bin/python", "-c", listing], check=True, capture_output=True, text=True).stdout
    wanted = [r for r in needed.splitlines() if "extra ==" not in r and not r.startswith(OWN_MODELS)]
    subprocess.run([*pip, *wanted], check=True)


class Page:
    """Sends the requests that Open WebUI's page sends to its server."""

    def __init__(self, url: str) -> None:
        self.http, self.said = httpx.Client(base_url=url, timeout=60), set()
        token = self.post("/api/v1/auths/signin", {"email": "", "password": ""})["token"]
        self.http.headers["Authorization"] = f"Bearer {token}"

    def post(self, path: str, body: dict) -> dict:
        return self.http.post(path, json=body).raise_for_status().json()

    def chat(self, chat_id: str) -> dict:
        return self.http.get(f"/api/v1/chats/{chat_id}").raise_for_status().json()

    def ask(self, said: str | dict, after: dict | None = None, chat: str | None = None, **options) -> dict:
        """The answer to a new message `after` an answer, or another answer to an earlier message (regenerate)."""
        answer_id, parent = str(uuid.uuid4()), after["id"] if after else None
        if isinstance(said, str):
            said = {"id": str(uuid.uuid4()), "parentId": parent, "role": "user", "content": said}
            said |= {"childrenIds": [answer_id], "models": ["policy"], "files": options.get("files", [])}
        chat = after["chat"] if after else chat
        tasks = {"follow_up_generation": True, "title_generation": not chat, "tags_generation": not chat}
        body = {"model": "policy", "stream": True, "session_id": "page", "id": answer_id, "user_message": said}
        body |= {"parent_id": said["parentId"], "background_tasks": tasks, **({"chat_id": chat} if chat else {})}
        self.said.add(options.get("regeneration_prompt", said["content"]))
        chat = self.post("/api/chat/completions", body | options)["chat_id"]
        message = lambda: self.chat(chat)["chat"]["history"]["messages"][answer_id]  # noqa: E731
        wait(lambda: message().get("done"))
        return message() | {"chat": chat, "said": said}

    def rate(self, answer: dict, rating: int, comment: str = "") -> None:
        """Send a thumb, and with a comment also the form that opens below it."""
        data = {"rating": rating, "model_id": "policy", "reason": None, "details": None}
        meta, snapshot = {"message_id": answer["id"], "chat_id": answer["chat"]}, {"chat": self.chat(answer["chat"])}
        body = {"type": "rating", "data": data, "meta": meta, "snapshot": snapshot}
        rated = self.post("/api/v1/evaluations/feedback", body)
        if comment:
            body["data"] |= {"reason": "not_helpful", "comment": comment, "details": {"rating": 2}}
            self.post(f"/api/v1/evaluations/feedback/{rated['id']}", body)


def talk(page: Page, found) -> None:
    """`found(answer)`: the rows of all answers to the same message, oldest first."""
    function = (ROOT / "docs/openwebui_feedback.py").read_text()
    page.post("/api/v1/functions/create", {"id": "thumbs", "name": "Thumbs", "content": function, "meta": {}})
    page.post("/api/v1/functions/id/thumbs/toggle", {})

    one = page.ask("Say hello, please.", params=NO_TOOLS)
    two = page.ask("No, that was too short.", one, params=NO_TOOLS)
    page.rate(two, -1, "You should have said it in German.")
    three = page.ask("Thank you, and the sea?", two, params=NO_TOOLS)
    page.rate(three, 1)
    again = page.ask(three["said"], two, params=NO_TOOLS)
    page.rate(again, -1)
    wait(lambda: [r["score"] for r in found(three)] == [1, -1] and found(two)[0]["hints"] not in (None, "[]"))
    assert [m["content"] for m in json.loads(found(one)[0]["next_messages"])] == ["No, that was too short."]
    assert {r["source"] for a in (two, three) for r in found(a)} == {"feedback"}
    assert json.loads(found(two)[0]["hints"])[0] == "You should have said it in German.", found(two)[0]["hints"]

    tree = page.ask("What is a tree?", params=NO_TOOLS)
    edited = page.ask("What is a bush?", chat=tree["chat"], params=NO_TOOLS)
    assert not any(r["next_messages"] for a in (tree, edited) for r in found(a)), "an edit is not a next message"
    guided = {"regeneration_prompt": "Shorter, please.", "regeneration_message_id": tree["id"]}
    page.ask(tree["said"], chat=tree["chat"], params=NO_TOOLS, **guided)
    assert [m["content"] for m in json.loads(found(tree)[0]["next_messages"])] == ["Shorter, please."]

    sent = {"file": ("ice.txt", b"A glacier is ice that <b>moves</b>.", "text/plain")}
    file = page.http.post("/api/v1/files/", files=sent).raise_for_status().json()
    wait(lambda: page.http.get(f"/api/v1/files/{file['id']}").json()["data"]["status"] == "completed")
    read = page.ask("What does it say?", files=[{"type": "file", "id": file["id"], "name": "ice.txt", "file": file}])
    last = page.ask("Right, and in one word?", read)
    page.rate(last, 1)
    wait(lambda: found(last)[-1]["source"] == "feedback")
    first, second = found(read)  # the tool call, and the answer after its result
    assert "<context>" in first["messages"] and "<tool_call>" in first["text"]
    assert [json.loads(r["next_messages"])[0]["role"] for r in (first, second)] == ["tool", "user"]
    assert json.loads(second["next_messages"])[0]["content"] == "Right, and in one word?"


def main(folder: Path) -> None:
    out, venv, port = folder / f"webui-{time.strftime('%H%M%S')}", folder / "open-webui", free_port()
    out.mkdir(parents=True)
    if not venv.exists():
        install(venv)
    check.CONTEXT = CONTEXT
    options = {"max_model_len": CONTEXT, "max_train_tokens": CONTEXT, "batch_size": 1000, "engine_memory": 1.0}
    model = check.make_tool_model(out / "model")
    program = Program(model, out, key=f"me:{KEY}", reasoning_parser="deepseek_r1", **options)

    def by_user() -> list:
        return [r for r in rows(program) if "side request" not in (r["reason"] or "")]

    def found(answer: dict) -> list:
        return [r for r in by_user() if request_of(json.loads(r["messages"])) == answer["said"]["content"]]

    try:
        program.wait_ready()
        command = paste.open_webui(f"{program.url}/v1", "policy", KEY, CONTEXT)
        command = command.replace(
            "open-webui serve", f"exec {venv}/bin/open-webui serve --host=127.0.0.1 --port={port}"
        )
        with open(out / "webui.log", "w") as log:
            webui = subprocess.Popen(
                ["bash", "-c", command], env=os.environ | SETTINGS, cwd=out, stdout=log, stderr=log
            )
        try:
            wait(lambda: check.is_up(f"http://127.0.0.1:{port}/health"), 120)
            page = Page(f"http://127.0.0.1:{port}")
            talk(page, found)
        finally:
            webui.terminate(), webui.wait(30)
    finally:
        program.stop()
    assert {request_of(json.loads(r["messages"])) for r in by_user()} == page.said, "only what the user wrote"
    asked = [json.loads(r["messages"])[-1]["content"] for r in rows(program) if r not in by_user()]
    assert all(any(kind in text for text in asked) for kind in ("a concise title", "1-3 broad tags", "Predict 3-5"))
    print(f"{len(rows(program))} turns, {len(asked)} of them asked by Open WebUI itself; all is as it should be")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
