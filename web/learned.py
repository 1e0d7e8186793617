"""What was learned: a user's own requests, sent again to the starting weights and to the current ones.

The starting weights then read the complaint after both answers. If the model now does unasked what the user had asked
for, the complaint becomes less likely.
"""

import asyncio
import json
import sqlite3
import uuid
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import grpo
import reward
import swap
from clients.sessions import request_of, without_thinking, words_of
from durable import journal
from durable.look import LONGEST_PROMPT
from program import Program

MAX_TOKENS = 128  # of an answer that is asked for again
CHARS = 4000  # of what the judge reads of a turn


def complaint_about(db: sqlite3.Connection, number: str, user: str | None) -> tuple[journal.Turn, str] | None:
    """A turn and the user's complaint about it; None if this user has no such turn, or if its prompt is too long.
    `number`: any text; SQLite compares it as a number."""
    row = db.execute(
        "SELECT id, hints, source FROM turns WHERE number = ?1 AND (?2 IS NULL OR user = ?2) AND score = -1 "
        "AND hints != '[]' AND template NOT NULL AND prompt_tokens <= ?3",
        (number, user, LONGEST_PROMPT),
    ).fetchone()
    if row is None:
        return None
    turn, following = journal.load_turn(db, row["id"])
    by_message = row["source"] == "judge" and following and following[-1].get("role") == "user"
    return turn, words_of(following[-1]) if by_message else json.loads(row["hints"])[0]


async def ask_again(p: Program, turn: journal.Turn, complaint: str) -> dict[str, Any]:
    """Both answers, greedy, and how much likelier the complaint is after the current one, in nats; negative: less."""

    async def answer(first_weights: bool) -> str:
        """By the user's newest weights, or by the starting weights (`first_weights`, only with LoRA)."""
        owner = p.owner_of(turn.user)
        prompt = swap.salted({"prompt_token_ids": turn.prompt_ids}, turn.user)
        params = swap.final_only(max_tokens=MAX_TOKENS, temperature=0.0)
        request_id = f"greedy-{uuid.uuid4().hex}"
        # `swap.generate` only asks whether there is a lora_request.
        outputs = swap.generate(p.engine, owner, prompt, params, request_id, lora_request=first_weights)
        (output,) = [output async for output in outputs]
        return p.state.tokenizer.decode(list(output.outputs[0].token_ids), skip_special_tokens=True)

    def on_judge(f: Any, *args: Any) -> asyncio.Future:
        return asyncio.get_running_loop().run_in_executor(p.judging, f, *args)

    await p.load_adapter(turn.user)
    current = await answer(False)
    if p.config.lora_rank:
        first = await answer(True)
    else:
        first = await on_judge(first_answer, p.state, turn.prompt_ids)
    request, start = request_of(turn.messages), p.state.start
    logps = [await on_judge(logp_of, start, p.state.tokenizer, request, text, complaint) for text in (first, current)]
    return {"request": request, "complaint": complaint, "first": first, "current": current, "nats": logps[1] - logps[0]}


@torch.no_grad()
def first_answer(state: Any, prompt_ids: list[int]) -> str:
    prompt = torch.tensor([prompt_ids], device=state.start.device)
    stops = [lambda *_: torch.tensor([state.stopping.is_set()], device=prompt.device)]
    options = {"max_new_tokens": MAX_TOKENS, "do_sample": False, "stopping_criteria": stops}
    ids = state.start.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return state.tokenizer.decode(ids[0, len(prompt_ids) :], skip_special_tokens=True)


@torch.no_grad()
def logp_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: str, answer: str, complaint: str
) -> float:
    """The log-prob of all the person's words, at the place where the judge reads them."""
    reply = [{"role": "user", "content": complaint}]
    text = reward.evidence(request, without_thinking(answer), reply, CHARS)
    before, label, said = text.rpartition("\nUser reply:")  # `said` is one line: it can't hold the label
    prompt = tokenizer(before + label)["input_ids"]
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    return grpo.response_logps(model, grpo.single_row(prompt, ids, model.device)).sum().item()
