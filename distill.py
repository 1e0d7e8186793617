"""On-policy distillation: a correction in words becomes a signal for every token of the answer that it corrects.

The teacher is the frozen starting model, with the correction in its prompt as a hint. It computes its log-probs at each
token of the recorded answer, and the policy without the hint is moved towards them. (OpenClaw-RL v2, arXiv 2603.10165,
section on on-policy distillation; notation: README.)
"""

import openai
import torch
import torch.nn.functional as F
from torch import Tensor

import grpo
from clients.sessions import last_request
from durable.journal import Turn

HINT = "\n\n[user's hint / instruction]\n"

# ---- the hinted prompt ----


class NoHintedPrompt(ValueError):
    """The hint can't be put into this prompt; the turn is trained on without it."""


def with_hint(messages: list[dict], hint: str) -> list[dict]:
    """The messages with the hint at the end of the last user message. NoHintedPrompt if there is no user message."""
    last = last_request(messages)
    if last is None:
        raise NoHintedPrompt("no user message")
    content = messages[last].get("content") or ""
    added = [*content, {"type": "text", "text": HINT + hint}] if isinstance(content, list) else f"{content}{HINT}{hint}"
    return [*messages[:last], {**messages[last], "content": added}, *messages[last + 1 :]]


async def hinted_prompts(client: openai.AsyncOpenAI, turn: Turn, hints: list[str]) -> list[list[int]]:
    """The token ids of a turn's prompt with each hint, made by the server's own chat template (vLLM's /tokenize).

    The prompt is first rendered without a hint. NoHintedPrompt if that doesn't give the recorded ids, since then the
    hint would not be the only change. openai.APIError if the server can't be reached, or fails.
    """
    root = client.with_options(base_url=str(client.base_url).removesuffix("/v1/"))

    async def render(messages: list[dict]) -> list[int]:
        # vLLM's chat endpoint takes thinking under both names, its /tokenize only as `reasoning`.
        messages = [{"reasoning" if k == "reasoning_content" else k: v for k, v in m.items()} for m in messages]
        try:
            body = {**turn.template, "messages": messages}  # `template`: other fields of the prompt, such as tools
            return (await root.post("/tokenize", cast_to=object, body=body))["tokens"]
        except (openai.APIStatusError, ValueError) as e:  # a lone surrogate or 1e999: JSON that the client can't send
            if getattr(e, "status_code", 400) in (500, 502, 503, 504):
                raise
            raise NoHintedPrompt(f"{type(e).__name__}: {e}") from e

    if await render(turn.messages) != turn.prompt_ids:
        raise NoHintedPrompt("the prompt is not the same when it is rendered again")
    return [await render(with_hint(turn.messages, hint)) for hint in hints]


# ---- the teacher ----


def top_k(hidden: Tensor, head: Tensor, k: int) -> Tensor:
    """The k most likely tokens at each position, most likely first: (N, D), (V, D) -> ids (N, k)."""
    return torch.cat([F.linear(h, head).topk(k).indices for h in hidden.split(grpo.CHUNK)])


def hint_effect(hinted: Tensor, plain: Tensor) -> Tensor:
    """How much a hint changes the teacher's prediction: KL(hinted || plain) over K tokens and "any other token".

    Log-probs of the same tokens, (N, K) each -> (N,), not negative except by rounding."""
    rest_hinted, rest_plain = ((1 - logps.exp().sum(-1)).clamp(min=1e-6) for logps in (hinted, plain))  # (N,)
    return (hinted.exp() * (hinted - plain)).sum(-1) + rest_hinted * (rest_hinted / rest_plain).log()


@torch.no_grad()
def teacher_logps(
    head: Tensor, row: grpo.Row, ids: Tensor, hinted: dict[int, list[Tensor]], plain: Tensor
) -> tuple[Tensor, Tensor, dict[int, int]]:
    """The teacher's log-probs (N, K) of `ids` (N, K) at a row's N positions, the hint mask (N,): 1.0 in the answers of
    `hinted`, 0.0 elsewhere, and for each sample in `hinted` the candidate that was used.

    `head` (V, D): the teacher's. `hinted`: sample in the row -> the teacher's hidden states (T, D) in its answer, for
    each candidate hint. `plain` (N, K): the teacher's log-probs without a hint. Of several candidates, the one that
    changes the teacher's prediction most is used: "Redo it in one sentence." says what the person wants, and changes it
    much more than "That is too long."
    """
    logps, hint_mask = torch.zeros(ids.shape, device=ids.device), torch.zeros(len(ids), device=ids.device)
    used = {}
    for sample, candidates in hinted.items():
        here = row["sample"] == sample  # (N,), true at T positions
        hint_mask[here] = 1.0
        found = [grpo.token_logps(hidden, head, ids[here]) for hidden in candidates]  # (T, K) each
        effects = [hint_effect(teacher, plain[here]).sum().item() for teacher in found]
        used[sample] = effects.index(max(effects))
        logps[here] = found[used[sample]]
    return logps, hint_mask, used


# ---- losses, per token ----


def advantage(student: Tensor, teacher: Tensor, clip: float) -> Tensor:
    """log pi_T - log pi_0, clipped to [-clip, clip] unless clip is 0. pi_0: the student before this step. Any shape."""
    gap = teacher - student
    return gap.clamp(-clip, clip) if clip else gap


def top_k_loss(
    logp: Tensor, student: Tensor, teacher: Tensor, clip: float, clip_low: float, clip_high: float
) -> Tensor:
    """Sum over the k tokens v of max(-A_v rho_v, -A_v clip(rho_v, 1 - low, 1 + high)). (N, k) each -> (N,)

    A_v = w_v advantage_v, w the student's own probabilities normalised to sum to 1 over the k tokens, rho_v =
    exp(log pi - log pi_0). With k = V and no clip, its gradient at rho = 1 is exactly that of KL(pi || pi_T). With one
    Adam step per batch, as here, rho is 1; the clip on rho matters only with several.
    """
    adv = advantage(student, teacher, clip) * student.softmax(-1)
    ratio = (logp - student).exp()
    return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - clip_low, 1 + clip_high)).sum(-1)
