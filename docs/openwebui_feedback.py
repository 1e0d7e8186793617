"""
title: Thumbs for nano-openclaw-rl
description: Sends each rating of an answer, with its comment, to the model's server.
required_open_webui_version: 0.12.0
"""

import os

import httpx
from open_webui.models.feedbacks import Feedbacks
from open_webui.utils.middleware import process_messages_with_output
from open_webui.utils.misc import get_message_list
from pydantic import BaseModel

WISHES = {
    "too_verbose": "Be less verbose.",
    "not_factually_correct": "State only correct facts.",
    "didnt_fully_follow_instructions": "Follow all instructions.",
    "being_lazy": "Do the whole task.",
}


class Event:
    class Valves(BaseModel):
        url: str = os.environ.get("OPENAI_API_BASE_URL", "http://127.0.0.1:8000/v1")
        key: str = os.environ.get("OPENAI_API_KEY", "none")

    def __init__(self) -> None:
        self.valves = self.Valves()

    async def event(self, event: dict) -> None:
        if event["event"] not in ("feedback.created", "feedback.updated"):
            return
        feedback = await Feedbacks.get_feedback_by_id(event["subject"]["id"])
        tree = feedback.snapshot["chat"]["chat"]["history"]["messages"]
        # The conversation up to the rated answer, as Open WebUI sends it to the model.
        talk = process_messages_with_output(get_message_list(tree, feedback.meta["message_id"]))
        talk = [{k: m[k] for k in ("role", "content", "tool_calls", "tool_call_id") if k in m} for m in talk]
        # A reason that is picked from the list says what was wrong; the model learns from what it should do.
        text = feedback.data.get("comment") or WISHES.get(feedback.data.get("reason"), "")
        body = {"messages": talk, "score": feedback.data["rating"], "text": text}
        async with httpx.AsyncClient(base_url=self.valves.url, timeout=60) as http:
            reply = await http.post("/feedback", json=body, headers={"Authorization": f"Bearer {self.valves.key}"})
        if reply.is_error:
            raise RuntimeError(f"{reply.status_code}: {reply.text}")  # into Open WebUI's log
