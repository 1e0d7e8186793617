"""Which part of a complaint becomes the hint? On complaints of people who are not in people.py; to be read by hand.

    .venv/bin/python docs/evaluation/hints.py        complaints.jsonl -> a line each: the hint, and what it does

Nats per token: how much less likely the teacher finds the answer that was complained about, with the hint than without.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
import distill  # noqa: E402
import grpo  # noqa: E402
import policy  # noqa: E402
import reward  # noqa: E402

folder = policy.model_folder("")
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
for line in (HERE / "complaints.jsonl").read_text().splitlines():
    case = json.loads(line)
    asked = [{"role": "user", "content": case["request"]}]
    answer = tokenizer(case["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    found = {}
    for hint in ["", *reward.own_words(case["request"], [{"role": "user", "content": case["complaint"]}])]:
        messages = distill.with_hint(asked, hint) if hint else asked
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            found[hint] = grpo.response_logps(model, grpo.alone(prompt, answer, "cpu")).mean().item()
    best = min(found, key=found.get)
    print(f"{found[''] - found[best]:+.2f}  {best or '(none)'}   <- {case['complaint']}", flush=True)
