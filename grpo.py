"""Binary RL, from judged turns to a loss: packed rows, token log-probs, advantages, the PPO-clip loss, the KL penalty.

Notation of the paper (OpenClaw-RL, arXiv 2603.10165): pi_old is the sampler, whose log-probs were recorded with the
answer; pi is the current policy at the turn's own temperature; rho = exp(log pi - log pi_old) per token.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# ---- batch ----


def pack_rows(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Which samples share a row of at most `limit` tokens: first fit, longest first.

    A sample longer than `limit` gets its own row; nothing is truncated.
    """
    rows: list[tuple[int, list[int]]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for k, (used, members) in enumerate(rows):
            if used + lengths[i] <= limit:
                rows[k] = (used + lengths[i], [*members, i])
                break
        else:
            rows.append((lengths[i], [i]))
    return [members for _, members in rows]


def grow_trees(samples: Sequence[list[int]], limit: int, tree: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Which samples share a prefix tree. For each tree: its number of tokens, and for each of its samples the index and
    the length of the prefix that it shares with the sample before it in the tree (0 for the first).

    The samples are sorted by their ids, and each branches off the one before. A sample always joins if the whole tree
    so far is its prefix. Otherwise it joins if the tree then has at most `tree` tokens and either fits a packed row of
    `limit` tokens or costs no more attention than its samples alone. (A tree attends over all pairs of its tokens.)
    """
    trees, squares, before = [], 0, []  # squares: sum of the squared lengths of the last tree's samples
    for i in sorted(range(len(samples)), key=samples.__getitem__):
        shared, length = common(before, samples[i]), len(samples[i])
        grown, squares = (trees[-1][0] if trees else 0) + length - shared, squares + length**2
        if shared and (grown == length or (grown <= tree and (grown <= limit or grown**2 <= squares))):
            trees[-1] = (grown, [*trees[-1][1], (i, shared)])
        else:
            trees.append((length, [(i, 0)]))
            squares = length**2
        before = samples[i]
    return trees


def common(one: list[int], other: list[int]) -> int:
    """The length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


class Answer(NamedTuple):
    """A sample: a recorded answer with its prompt. To read its log-probs, the ids are enough."""

    prompt: Sequence[int]
    response: Sequence[int]
    old_logps: Sequence[float] | None = None  # the sampler's, of the response; None: unknown, NaN in the row
    adv: float = 0.0
    temperature: float = 1.0


# A packed row: ids, positions (1, L); at (N,), the index in the row that predicts each response token; and per response
# token target, old_logp, adv, temperature, sample (N,).
Row = dict[str, Tensor]


def collate(answers: Sequence[Answer], limit: int, tree: int = 0, device: str | torch.device = "cpu") -> Iterator[Row]:
    """Packed rows of B samples, without padding. A shared prefix is in the row once. A token's position is its depth in
    its tree: it drops back at the start of a branch, and to 0 at the start of a tree.

    ValueError if a sample has no prompt or no response, or not one old log-prob for each response token."""
    samples = [[*answer.prompt, *answer.response] for answer in answers]
    trees = grow_trees(samples, limit, tree)
    for row in pack_rows([length for length, _ in trees], limit):
        ids, positions, at, target, old_logp, adv, temperature, sample = [], [], [], [], [], [], [], []
        path: list[int] = []  # index in the row of each token of the sample
        for i, shared in [member for k in row for member in trees[k][1]]:
            answer = answers[i]
            P, T = len(answer.prompt), len(answer.response)
            old_logps = [math.nan] * T if answer.old_logps is None else answer.old_logps
            if not P or not T or len(old_logps) != T:
                raise ValueError(f"sample {i}: {P} prompt ids, {T} response ids, {len(old_logps)} log-probs")
            path = [*path[:shared], *range(len(ids), len(ids) + P + T - shared)]
            ids += samples[i][shared:]
            positions += range(shared, P + T)
            at += path[P - 1 : P + T - 1]  # each token is predicted by the one before it
            target += answer.response
            old_logp += old_logps
            adv += [answer.adv] * T
            temperature += [answer.temperature] * T
            sample += [i] * T
        integers = {"ids": [ids], "positions": [positions], "at": at, "target": target, "sample": sample}
        floats = {"old_logp": old_logp, "adv": adv, "temperature": temperature}
        yield {k: torch.tensor(v, dtype=torch.long, device=device) for k, v in integers.items()} | {
            k: torch.tensor(v, dtype=torch.float32, device=device) for k, v in floats.items()
        }


def single_row(prompt: Sequence[int], response: Sequence[int], device: str | torch.device) -> Row:
    """A row of one sample at temperature 1, for reading log-probs only."""
    return next(collate([Answer(prompt, response)], 1, device=device))


# ---- token log-probs ----


def response_hidden(model: torch.nn.Module, row: Row) -> Tensor:
    """The last hidden states that predict a row's response tokens, (N, D), divided by the tokens' temperatures. So the
    logits computed from them are at these temperatures. Dividing (N, V) logits instead would cost 5 % of a step."""
    mask = tree_mask(row["positions"][0], model.dtype)
    out = model.model(input_ids=row["ids"], position_ids=row["positions"], attention_mask=mask, use_cache=False)
    hidden = out.last_hidden_state[0, row["at"]]
    return (hidden / row["temperature"][:, None]).to(hidden.dtype)


def tree_mask(depth: Tensor, dtype: torch.dtype) -> Tensor | None:
    """An additive attention mask by which a token sees only the tokens on its own path: 0 for those, -inf for others.

    depth (L,) -> (1, 1, L, L). It is causal. Once a branch has begun at depth d (d = 0: another tree), no token from
    before it with depth d or more is seen. None for a single sequence: the model is faster without a mask. Not a bool
    mask: torch would convert it in each layer, and keep each copy for the backward pass.
    """
    starts = (depth.diff() != 1).nonzero()[:, 0] + 1
    if not len(starts):
        return None
    # Attention on a GPU needs no copy of the mask if its rows are a multiple of 8 long in memory.
    wide = torch.full((len(depth), -(-len(depth) // 8) * 8), -torch.inf, dtype=dtype, device=depth.device)
    mask = wide[:, : len(depth)].triu_(1)
    for start in starts.tolist():
        mask[start:, :start].masked_fill_(depth[:start] >= depth[start], -torch.inf)
    return mask[None, None]


@torch.no_grad()
def hidden_states(model: torch.nn.Module, answers: Sequence[Answer], limit: int, tree: int) -> list[Tensor]:
    """For each sample, the hidden states that predict its response tokens: (T, D)."""
    found = {}
    for row in collate(answers, limit, tree, model.device):
        hidden = response_hidden(model, row)
        found |= {i: hidden[row["sample"] == i] for i in row["sample"].unique().tolist()}
    return [found[i] for i in range(len(answers))]


CHUNK = 256  # positions whose logits are in memory at a time


def in_chunks(compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """compute(*inputs), for CHUNK of the N positions at a time. It runs again in the backward pass, so the logits that
    it computes never exist as one (N, V) tensor."""
    if len(inputs[0]) <= CHUNK:
        return compute(*inputs)  # computing it again would save no memory
    chunks = zip(*(x.split(CHUNK) for x in inputs), strict=True)
    return torch.cat([checkpoint(compute, *parts, use_reentrant=False) for parts in chunks])


def token_logps(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """Log-probs of K tokens at each of N positions: hidden (N, D), head (V, D), ids (N, K) -> (N, K) float32."""

    def logps(hidden: Tensor, ids: Tensor) -> Tensor:  # of C positions
        return F.linear(hidden, head).float().log_softmax(-1).gather(-1, ids)  # (C, K)

    return in_chunks(logps, hidden, ids)


def response_logps(model: torch.nn.Module, row: Row) -> Tensor:
    """Log-probs of a row's response tokens at their temperatures. (N,) float32"""
    hidden, head = response_hidden(model, row), model.get_output_embeddings().weight
    return token_logps(hidden, head, row["target"][:, None]).squeeze(-1)


# ---- advantages ----


DECAY = 0.9  # of a baseline, per judged turn


def baseline_key(user: str, from_tool: bool) -> str:
    """Turns with the same key share a running mean reward. Tools have their own: most tool calls succeed, but most
    people don't praise. With one mean for both, successes would get small advantages and complaints large ones."""
    return f"{user} tools" if from_tool else user


def move_baseline(baselines: dict[str, float], key: str, reward: float) -> None:
    """Update a running mean with a judged turn, in place. It starts at 0, and a neutral turn moves it towards 0."""
    baselines[key] = DECAY * baselines.get(key, 0.0) + (1 - DECAY) * reward


def advantages(
    rewards: Sequence[float], keys: Sequence[str], groups: Sequence[object], baselines: dict[str, float], kind: str
) -> list[float]:
    """The advantage A of each sample.

    kind "mean": A = r - b, b the running mean of this key's rewards before this batch. "none": A = r (upstream, paper
    v1). "group": A = (r - mean) / std over the samples with an equal `groups` entry (the same prompt), as in GRPO
    (arXiv 2402.03300 section 4.1); a sample alone in its group gets "mean". Neutral turns (r = 0) get A = 0, and don't
    count in their group.
    """
    if kind not in ("mean", "none", "group"):
        raise ValueError(f"baseline {kind!r} is not one of mean, none, group")
    advs = []
    for r, key, group in zip(rewards, keys, groups, strict=True):
        peers = [q for q, g in zip(rewards, groups, strict=True) if g == group and q]
        if not r:
            advs.append(0.0)
        elif kind == "none":
            advs.append(float(r))
        elif kind == "group" and len(peers) > 1:
            mean = sum(peers) / len(peers)
            std = (sum((q - mean) ** 2 for q in peers) / len(peers)) ** 0.5
            advs.append((r - mean) / std if std > 0 else 0.0)
        else:
            advs.append(r - baselines.get(key, 0.0))
    return advs


# ---- losses, per token ----


def ppo_clip_loss(
    logp: Tensor, old_logp: Tensor, adv: Tensor, clip_low: float, clip_high: float, dual_clip: float
) -> Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A), for A < 0 at most -dual_clip A. (N,) each.

    PPO's clipped surrogate (arXiv 1707.06347 eq. 7) with DAPO's clip-higher (2503.14476 eq. 10) and the dual clip
    (1912.09729 eq. 5).
    """
    ratio = (logp - old_logp).exp()
    surrogate = torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    surrogate = torch.where(adv < 0, torch.maximum(surrogate, dual_clip * adv), surrogate)
    return -surrogate


def compare_with_start(
    hidden: Tensor, head: Tensor, start: Tensor, start_head: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of K tokens at each of N positions, the policy's and the starting weights', (N, K) each, and
    KL(pi || pi_start) (N,). Given hidden states (N, D) and heads (V, D) of both models, ids (N, K).

    The KL is exact over the vocabulary. An estimate from the sampled token alone (k2, k3) has no baseline: it pushes
    down every token that has become more likely.
    """

    def compare(hidden: Tensor, start: Tensor, ids: Tensor) -> Tensor:  # of C positions
        logps = F.linear(hidden, head).float().log_softmax(-1)  # (C, V)
        start_logps = F.linear(start, start_head).float().log_softmax(-1)  # (C, V)
        kl = (logps.exp() * (logps - start_logps)).sum(-1, keepdim=True)  # (C, 1)
        return torch.cat([logps.gather(-1, ids), start_logps.gather(-1, ids), kl], 1)

    K = ids.shape[1]
    logps, start_logps, kl = in_chunks(compare, hidden, start, ids).split([K, K, 1], 1)
    return logps, start_logps.detach(), kl[:, 0]


# ---- metrics ----


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of an answer's n-grams that occurred earlier in it: near 1 if it loops, 0 if it has fewer than n tokens."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
