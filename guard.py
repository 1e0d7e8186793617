"""What may be trained on and what may be served: a step that harms is taken back before anybody has met it.

The bounds are wide: they are for a policy that breaks, not for one that changes.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

import grpo
from journal import NOTHING, Sample

DLOGP = 1.0  # mean |dlogp| of a batch between the sampler and the trainer before the step
NLL_RISE = 0.5  # nats per token of the fixed text, against the first weights (0.03 after 14 steps of the hybrid)
ENTROPY_CHANGE = 1.0  # nats per token of the fixed text, against the first weights, up or down (0.15)
KL_JUMP = 0.25  # nats per token of the fixed text, to the first weights, in one step (0.04 in all 14)
REPEATED = 0.5  # share of repeated 4-grams in the answers to the fixed prompts, where the first weights had less (0)
LENGTH = 1.5  # tokens of those answers with their stop token: below it nothing is said any more (15)
IN_A_ROW = 3  # steps taken back one after the other until training stops

ANSWER_TOKENS = 24
PROMPTS = ("What is a bridge?", "Tell me about bees.", "How do I boil an egg?", "Write a sentence about the sea.")


class Refused(RuntimeError):
    """This step is not to be served; the message says why."""


def unfit(
    sample: Sample,
    chosen: list[Sample],
    step: int,
    *,
    batch_size: int,
    max_staleness: int,
    max_train_tokens: int,
    w_rl: float,
    shares: dict[str, float],
) -> str | None:
    """Why this sample is not trained on in a batch that has `chosen` already; None: it is.

    `shares`: the largest part of a batch from one user, from one session, and of answers cut off by max_tokens.
    """
    turn = sample.turn
    if step - min(version for version, _, _ in turn.versions) > max_staleness:
        return f"stale: more than {max_staleness} steps old"
    if len(turn.prompt_ids) + len(turn.response_ids) > max_train_tokens:
        return f"longer than --max_train_tokens={max_train_tokens}"
    if not w_rl and not sample.verdict.hints:
        return f"{NOTHING}: there is no hint, and the score is not trained on (w_rl is 0)"
    cut = turn.finish_reason == "length"
    alike = {
        "user": sum(s.turn.user == turn.user for s in chosen),
        "session": sum((s.turn.user, s.turn.session) == (turn.user, turn.session) for s in chosen),
        "truncated": sum(s.turn.finish_reason == "length" for s in chosen) if cut else -1,
    }
    for what, share in shares.items():
        if alike[what] + 1 > share * batch_size:
            return f"over the share of a batch: {what}, {share:g}"
    return None


def check_batch(loss: float, grad_norm: float, dlogp: float) -> None:
    """Before Adam's step. Refused where it would be taken on numbers that mean nothing."""
    if not (abs(loss) < float("inf") and grad_norm < float("inf")):  # also for NaN
        raise Refused(f"loss {loss:.3g}, gradient norm {grad_norm:.3g}")
    if not dlogp <= DLOGP:
        raise Refused(f"mean |dlogp| between sampler and trainer {dlogp:.2f} > {DLOGP}")


@torch.no_grad()
def text_logps(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Log-probs of the whole vocabulary at each place of a text but the first. (L - 1, V)"""
    return model(torch.tensor([ids], device=model.device)).logits[0, :-1].float().log_softmax(-1)


@torch.no_grad()
def answers(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """One sampled answer to each prompt, at most ANSWER_TOKENS, with its stop token; the same for the same weights."""
    longest, training = max(map(len, prompts)), model.training
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)  # (B, P), padded left
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    stop = model.generation_config.eos_token_id
    stops = set(stop) if isinstance(stop, list) else {stop}
    options = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    model.eval()  # in training, with gradient checkpointing on, there would be no KV cache
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        out = model.generate(ids, attention_mask=seen, max_new_tokens=ANSWER_TOKENS, pad_token_id=0, **options)
    model.train(training)
    rows = out[:, longest:].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def probe(model: PreTrainedModel, ids: list[int], prompts: list[list[int]], first: Tensor) -> dict[str, float]:
    """How a model does on the fixed text and prompts. `first` (L - 1, V): the first weights' `text_logps`. Refused
    where its log-probs are not finite: there is nothing to sample from then."""
    logps = text_logps(model, ids)
    if not logps.isfinite().all():
        raise Refused("the log-probs of the probe are not finite")
    said = answers(model, prompts)
    return {
        "nll": -logps.gather(1, torch.tensor(ids[1:], device=logps.device)[:, None]).mean().item(),
        "entropy": -(logps.exp() * logps).sum(-1).mean().item(),
        "kl": (logps.exp() * (logps - first)).sum(-1).mean().item(),
        "repeated": sum(map(grpo.repetition, said)) / len(said),
        "length": sum(map(len, said)) / len(said),
    }


def check_weights(found: dict[str, float], first: dict[str, float], before: dict[str, float]) -> None:
    """After Adam's step: the probe of the new weights, of the first and of the last served ones. Refused where the new
    ones are broken; each condition is written so that NaN fails it."""
    for fine, why in (
        (found["nll"] - first["nll"] <= NLL_RISE, "nll"),
        (abs(found["entropy"] - first["entropy"]) <= ENTROPY_CHANGE, "entropy"),
        (found["kl"] - before["kl"] <= KL_JUMP, "kl"),
        (found["repeated"] <= max(REPEATED, first["repeated"]), "repeated"),
        (found["length"] >= min(LENGTH, first["length"]), "length"),
    ):
        if not fine:
            raise Refused(
                f"on the probe, {why} is {found[why]:.2f}; before the step {before[why]:.2f}, first {first[why]:.2f}"
            )
