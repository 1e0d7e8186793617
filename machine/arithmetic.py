"""Is the arithmetic of grpo.py this model's? Checked at the start, before anything is trained."""

import torch
from transformers import PreTrainedModel

import grpo
import probe
from durable.errors import UsageError


@torch.no_grad()
def check_arithmetic(model: PreTrainedModel, ids: list[int]) -> bool:
    """May samples share a row, and a prefix? True if a text's two halves, and a branch off the first one, have the same
    log-probs packed into one row as alone.

    Models with a recurrent state, a convolution or chunked attention don't see where a sample begins in a row.
    UsageError if our log-probs differ from the model's own logits: some models scale or cap those, which
    `grpo.token_logps` doesn't know.
    """
    if not hasattr(model, "model") or model.get_output_embeddings() is None:
        raise UsageError(f"{type(model).__name__} has no `model` with a head on it: it can't be trained here")
    most = 1e-3 if model.dtype == torch.float32 else 0.2  # what rounding does
    half = len(ids) // 2
    texts = [ids[:half], ids[half:], ids[: half // 2] + ids[half:]]
    alone = [probe.token_logps(model, text) for text in texts]
    own = [probe.text_logps(model, text).cpu().gather(1, torch.tensor(text[1:])[:, None])[:, 0] for text in texts]
    gap = (torch.cat(own) - torch.cat(alone)).abs().max().item()
    if gap > most:
        raise UsageError(
            f"{type(model).__name__} can't be trained here: its logits are more than the product of hidden state and "
            f"head (scaled, capped or shifted: log-probs differ by {gap:.2g})"
        )
    most_tokens = 2 * len(ids)  # all of it in one row
    row = next(grpo.unscored([t[:1] for t in texts], [t[1:] for t in texts], most_tokens, model.device, most_tokens))
    packed = grpo.response_logps(model, row).cpu()  # (N,)
    order = row["sample"].unique_consecutive().tolist()
    packs = (packed - torch.cat([alone[i] for i in order])).abs().max().item() <= most
    if not packs:
        print(f"rows      of one sample each: {type(model).__name__} would mix samples that share a row", flush=True)
    return packs
