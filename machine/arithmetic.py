"""Does grpo.py compute this model's log-probs? Checked at the start, before anything is trained."""

import torch
from transformers import PreTrainedModel

import grpo
import probe
from durable.errors import UsageError


@torch.no_grad()
def check_arithmetic(model: PreTrainedModel, ids: list[int]) -> bool:
    """May samples share a row, and a prefix? True if the two halves of a text, and a branch off the first half, have
    the same log-probs in one packed row as each has alone.

    Models with a recurrent state, a convolution or chunked attention don't see where a sample in a row begins.
    UsageError if our log-probs don't match the model's own logits: some models scale or cap those, and
    `grpo.token_logps` doesn't.
    """
    if not hasattr(model, "model") or model.get_output_embeddings() is None:
        raise UsageError(f"{type(model).__name__} has no `model` with a head on it: it can't be trained here")
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.2  # rounding error
    half = len(ids) // 2
    texts = [ids[:half], ids[half:], ids[: half // 2] + ids[half:]]
    alone = [probe.token_logps(model, text) for text in texts]
    own = [probe.text_logps(model, text).cpu().gather(1, torch.tensor(text[1:])[:, None])[:, 0] for text in texts]
    # In bf16, means of 8 neighbours: rounding alone makes single log-probs differ by up to 0.25 in a model of 135M
    # parameters. A convolution mixes only a few positions, at the start of a sample, so a mean of all won't do.
    width = 1 if model.dtype == torch.float32 else 8

    def difference(one: torch.Tensor, other: torch.Tensor) -> float:
        return (one - other).abs().unfold(0, width, 1).mean(-1).max().item()

    gap = difference(torch.cat(own), torch.cat(alone))
    if not gap <= tolerance:  # also for NaN
        raise UsageError(
            f"{type(model).__name__} can't be trained here: its logits are not just the product of hidden state and "
            f"head (scaled, capped or shifted: log-probs differ by {gap:.2g})"
        )
    most_tokens = 2 * len(ids)  # so that all is in one row
    answers = [grpo.Answer(t[:1], t[1:]) for t in texts]
    row = next(grpo.collate(answers, most_tokens, most_tokens, model.device))
    packed = grpo.response_logps(model, row).cpu()  # (N,)
    order = row["sample"].unique_consecutive().tolist()
    packs = difference(packed, torch.cat([alone[i] for i in order])) <= tolerance
    if not packs:
        print(f"rows      of one sample each: {type(model).__name__} would mix samples that share a row", flush=True)
    return packs
