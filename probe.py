"""The probe: fixed texts that show whether the model still works after a step, before its weights are served.

After each push, engine and trainer are compared on it.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import grpo
from durable import guard

TEXT = (
    "The tide comes in twice a day because the moon pulls the sea towards it. On the far side of the earth the water "
    "bulges too, since the moon pulls the solid earth a little more than the sea behind it. Sailors have kept tables "
    "of high and low water for centuries: a harbour with two metres of water at noon may be a field of mud by six."
)
PROMPTS = ("Tell me about bees.", "How do I boil an egg?")
ANSWER_TOKENS = 12  # at most, in an answer to a prompt; each costs a forward pass


@dataclass(frozen=True)
class Probe:
    """TEXT and PROMPTS as token ids, and the results of the starting weights on them."""

    ids: list[int]  # (L,)
    prompts: list[list[int]]
    first_logps: Tensor  # (L - 1, V), see `text_logps`
    first: dict[str, float] = field(default_factory=dict)  # see `measure`

    def measure(self, model: PreTrainedModel) -> tuple[dict[str, float], Tensor]:
        """Metrics of a model on the probe, and its log-probs of ids[1:], to compare with the engine's: (L - 1,) on the
        CPU. guard.Refused if log-probs are not finite: nothing can be sampled then."""
        logps = text_logps(model, self.ids)  # (L - 1, V)
        if not logps.isfinite().all():
            raise guard.Refused("the log-probs of the probe are not finite")
        said = sample_answers(model, self.prompts)
        sampled_logps = logps.gather(1, torch.tensor(self.ids[1:], device=logps.device)[:, None])[:, 0]  # (L - 1,)
        return {
            "nll": -sampled_logps.mean().item(),
            "entropy": -(logps.exp() * logps).sum(-1).mean().item(),
            "kl": (logps.exp() * (logps - self.first_logps)).sum(-1).mean().item(),
            "repeated": sum(map(grpo.repetition, said)) / len(said),
            "length": sum(map(len, said)) / len(said),
        }, sampled_logps.cpu()


def make_probe(first: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Probe:
    """The probe, for the starting weights."""
    ids = tokenizer(TEXT)["input_ids"]
    asked = [[{"role": "user", "content": text}] for text in PROMPTS]
    prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in asked]
    probe = Probe(ids, prompts, text_logps(first, ids))
    return replace(probe, first=probe.measure(first)[0])


@torch.no_grad()
def token_logps(policy: PreTrainedModel, ids: list[int]) -> Tensor:
    """Log-probs of ids[1:], as training computes them. (L - 1,) on the CPU"""
    return grpo.response_logps(policy, grpo.single_row(ids[:1], ids[1:], policy.device)).cpu()


@torch.no_grad()
def text_logps(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Log-probs of the whole vocabulary at each position of a text but the first. (L - 1, V)"""
    return model(torch.tensor([ids], device=model.device)).logits[0, :-1].float().log_softmax(-1)


@torch.no_grad()
def sample_answers(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """A sampled answer to each prompt, at most ANSWER_TOKENS with its stop token. Deterministic for given weights."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)  # (B, P), padded left
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    stop = model.generation_config.eos_token_id
    stops = set(stop) if isinstance(stop, list) else {stop}
    options = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        out = model.generate(ids, attention_mask=seen, max_new_tokens=ANSWER_TOKENS, pad_token_id=0, **options)
    rows = out[:, longest:].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]
