"""A judge by script, for one ablation: the hint whose top-k overlap most against a random one.

    .venv/bin/python docs/evaluation/judge.py &
    .venv/bin/python users.py --out=docs/evaluation/choice --talks=80 --seed=0,1 \
        --judge_url=http://127.0.0.1:8001/v1 --judge_model=three     # --judge_model=one

The model that the evaluation trains is too small to write hints. This one reads what the one-sentence person says and
writes rules of different worth, as a judge's votes do: under the name "three" three different ones, among which
distill.py chooses; under the name "one" a single one, drawn at random.
"""

import random

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

RULES = (
    "Answer in one short sentence.",
    "Give the whole answer in a single sentence.",
    "Keep it to one line.",
    "Be much briefer.",
    "Don't write a long explanation.",
    "Leave out the details that nobody asked for.",
)


async def reply(request: Request) -> JSONResponse:
    body = await request.json()
    said = body["messages"][-1]["content"].rpartition("User reply: ")[2]
    body.setdefault("n", 1)
    if "choice" in body["structured_outputs"]:
        texts = ["good" if "thank" in said.lower() else "bad"] * body["n"]
    elif len(said) < 12:  # "No, wrong.": no rule would have mended it
        texts = ["NONE"] * body["n"]
    else:
        texts = random.sample(RULES, 3) if body["model"] == "three" else [random.choice(RULES)] * body["n"]
    choices = [
        {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        for i, text in enumerate(texts)
    ]
    return JSONResponse({"id": "", "object": "chat.completion", "created": 0, "model": "", "choices": choices})


if __name__ == "__main__":
    uvicorn.run(
        Starlette(routes=[Route("/v1/chat/completions", reply, methods=["POST"])]), port=8001, log_level="warning"
    )
