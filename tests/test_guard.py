"""Which turns may be trained on, and which weights may be served."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import probe
from config import Config
from durable import guard

DEFAULTS = dict(batch_size=4, max_staleness=2, max_train_tokens=10)


def queued(versions="[[5, 0, 3]]", **changes):
    row = {"user": "alice", "session": "s", "hints": '["say less"]', "finish_reason": "stop", "prompt_tokens": 2}
    return row | {"versions": versions} | changes


@pytest.mark.parametrize(
    "changes, settings, why",
    [
        ({}, {}, None),
        ({"versions": "[[3, 0, 1], [5, 1, 3]]"}, {}, None),
        ({"versions": "[[2, 0, 1], [5, 1, 3]]"}, {}, "stale: more than 2 steps old"),
        ({"versions": "[[2, 0"}, {}, "its row is damaged"),
        ({"prompt_tokens": 7}, {}, None),
        ({"prompt_tokens": 8}, {}, "longer than --max_train_tokens=10"),
        ({"hints": "[]"}, {}, None),
        ({"hints": "[]"}, {"w_rl": 0}, "nothing to learn from: there is no hint, and the score"),
        ({}, {"user_share": 0.5}, None),  # one user may have all of a batch if nobody else waits
        ({}, {"session_share": 0.5}, "over the share of a batch: session, 0.5"),
        ({"session": "u"}, {"session_share": 0.5}, None),
        ({"user": "bob"}, {"session_share": 0.5}, None),
        ({"finish_reason": "length"}, {"truncated_share": 0.0}, "truncated, 0"),
        ({"finish_reason": "length"}, {"truncated_share": 0.25}, None),
        ({"finish_reason": "stop"}, {"truncated_share": 0.0}, None),
    ],
)
def test_a_turn_that_does_not_fit_a_batch_is_rejected_with_the_reason(changes, settings, why):
    found = guard.reject_reason(queued(**changes), [queued(), queued()], 5, Config(**DEFAULTS | settings))
    assert (found is None) if why is None else why in found


@pytest.mark.parametrize(
    "loss, norm, dlogp, why",
    [
        (0.1, 1.0, 0.9, None),
        (math.nan, 1.0, 0.0, "loss nan"),
        (math.inf, 1.0, 0.0, "loss inf"),
        (0.1, math.inf, 0.0, "norm inf"),
        (0.1, math.nan, 0.0, "norm nan"),
        (0.1, 1.0, 1.1, "dlogp"),
        (0.1, 1.0, math.nan, "dlogp"),
    ],
)
def test_a_step_with_non_finite_numbers_or_a_large_dlogp_is_refused(loss, norm, dlogp, why):
    if why is None:
        return guard.check_batch(loss, norm, dlogp)
    with pytest.raises(guard.Refused, match=why):
        guard.check_batch(loss, norm, dlogp)


FIRST = {"nll": 3.0, "entropy": 2.0, "kl": 0.0, "repeated": 0.1, "length": 20.0}


@pytest.mark.parametrize(
    "changes, why",
    [
        ({}, None),
        ({"nll": 3.4}, None),
        ({"nll": 3.6}, "nll is 3.60"),
        ({"nll": math.nan}, "nll"),
        ({"entropy": 3.1}, "entropy"),
        ({"entropy": 0.9}, "entropy"),
        ({"kl": 0.4}, None),
        ({"kl": 0.5}, "kl is 0.50; before the step 0.20, first 0.00"),
        ({"repeated": 0.6}, "repeated"),
        ({"length": 1.0}, "length"),
    ],
)
def test_broken_weights_are_refused(changes, why):
    before = FIRST | {"kl": 0.2}
    if why is None:
        return guard.check_weights(FIRST | changes, FIRST, before)
    with pytest.raises(guard.Refused, match=why):
        guard.check_weights(FIRST | changes, FIRST, before)


def test_the_probe_matches_an_obvious_reference(tiny_model):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids, prompts = list(range(5, 45)), [[1, 2, 3], [4, 5, 6, 7, 8]]
    first = probe.text_logps(model, ids)
    assert probe.Probe(ids, prompts, first).measure(model)[0]["kl"] == pytest.approx(0, abs=1e-6)
    drawn = torch.get_rng_state()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    (found, logps), (again, _) = (probe.Probe(ids, prompts, first).measure(model) for _ in range(2))
    assert found == again, "the same weights give the same probe"
    torch.set_rng_state(drawn)
    logits = model(torch.tensor([ids])).logits[0].double()
    nll = entropy = kl = 0.0
    for i in range(len(ids) - 1):
        p = logits[i].softmax(-1)
        nll -= p[ids[i + 1]].log().item() / (len(ids) - 1)
        entropy -= (p * p.log()).sum().item() / (len(ids) - 1)
        kl += (p * (p.log() - first[i].double())).sum().item() / (len(ids) - 1)
    assert (found["nll"], found["entropy"], found["kl"]) == pytest.approx((nll, entropy, kl), rel=1e-4)
    torch.testing.assert_close(logps, probe.token_logps(model, ids), msg="as training computes them")


def test_weights_with_nan_or_inf_are_refused(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids, first = [1, 2, 3], probe.text_logps(model, [1, 2, 3])
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.nan
        next(model.parameters())[1:4] = math.inf
    with pytest.raises(guard.Refused, match="not finite"):
        probe.Probe(ids, [[1, 2]], first).measure(model)


def test_probe_answers_are_sampled_after_their_own_prompts(tiny_model):
    """Left padding and batching change nothing: each token is likely after its own prompt."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).train()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(200)  # sampling is now nearly deterministic
    prompts = [[1, 2, 3], [9, 8, 7, 6, 5, 4]]
    for prompt, answer in zip(prompts, probe.sample_answers(model, prompts), strict=True):
        so_far = list(prompt)
        for token in answer:
            assert model(torch.tensor([so_far])).logits[0, -1].softmax(-1)[token] > 0.01
            so_far.append(token)
        assert len(answer) == probe.ANSWER_TOKENS or answer[-1] == model.generation_config.eos_token_id
    assert model.training
