"""Which part of a complaint becomes the hint? For complaints of people who are not in people.py, to be read by hand.

    python -m evaluation.hints        docs/evaluation/complaints.jsonl -> one line each: effect in nats, hint, complaint

The effect is how much the hint changes the model's predictions over the whole answer, see `distill.hint_effect`.
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import distill
import grpo
import reward
from durable.model import model_folder

COMPLAINTS = Path(__file__).parent.parent / "docs/evaluation/complaints.jsonl"

folder = model_folder("")
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
head = model.get_output_embeddings().weight
for line in COMPLAINTS.read_text().splitlines():
    case = json.loads(line)
    asked = [{"role": "user", "content": case["request"]}]
    answer = tokenizer(case["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]

    @torch.no_grad()
    def logps(messages: list[dict], ids: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        hidden = grpo.response_hidden(model, grpo.single_row(prompt, answer, "cpu"))  # noqa: B023
        ids = distill.top_k(hidden, head, 20) if ids is None else ids
        return ids, grpo.token_logps(hidden, head, ids)

    ids, plain = logps(asked)
    hints = reward.own_words(case["request"], [{"role": "user", "content": case["complaint"]}])
    moved = {
        hint: distill.hint_effect(logps(distill.with_hint(asked, hint), ids)[1], plain).sum().item() for hint in hints
    }
    best = max(moved, key=moved.get, default="(none)")
    print(f"{moved.get(best, 0):5.1f}  {best}   <- {case['complaint']}", flush=True)
