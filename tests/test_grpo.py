"""The math of grpo.py against slow, obvious references: values and gradients."""

import copy
import math
from unittest import mock

import pytest
import torch

import grpo

LOW, HIGH, DUAL = 0.2, 0.28, 3.0


def ppo(logp, old, adv):
    return grpo.ppo_clip_loss(torch.tensor([logp]), torch.tensor([old]), torch.tensor([adv]), LOW, HIGH, DUAL).item()


@pytest.mark.parametrize(
    "ratio, adv, expected",
    [
        (1.0, 1.0, -1.0),
        (1.1, 2.0, -2.2),
        (1.5, 1.0, -1.28),  # clipped above
        (0.5, 1.0, -0.5),  # not clipped below if A > 0
        (1.0, -1.0, 1.0),
        (0.5, -1.0, 0.8),  # clipped below
        (2.0, -1.0, 2.0),  # not clipped above if A < 0
        (9.0, -1.0, 3.0),  # dual clip
        (9.0, 0.0, 0.0),
    ],
)
def test_ppo_loss_matches_values_computed_by_hand(ratio, adv, expected):
    assert ppo(math.log(ratio), 0.0, adv) == pytest.approx(expected, rel=1e-5)


def test_ppo_gradient_at_ratio_1_is_reinforce():
    logits = torch.randn(5, 7, requires_grad=True)
    target, adv = torch.randint(7, (5,)), torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0])
    logp = logits.log_softmax(-1)[range(5), target]
    (ours,) = torch.autograd.grad(
        grpo.ppo_clip_loss(logp, logp.detach(), adv, LOW, HIGH, DUAL).sum(), logits, retain_graph=True
    )
    (reinforce,) = torch.autograd.grad(-(adv * logp).sum(), logits)
    torch.testing.assert_close(ours, reinforce)


@pytest.mark.parametrize("ratio, adv", [(1.5, 1.0), (0.5, -1.0), (9.0, -1.0)])
def test_ppo_gradient_is_0_where_clipped(ratio, adv):
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    grpo.ppo_clip_loss(logp, torch.zeros(1), torch.tensor([adv]), LOW, HIGH, DUAL).sum().backward()
    assert logp.grad.item() == 0


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_comparison_with_the_start_is_exact(chunk, monkeypatch):
    """Values and gradients of the reverse KL and of both models' log-probs, against their definitions."""
    monkeypatch.setattr(grpo, "CHUNK", chunk)
    hidden, start = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5)
    head, start_head = torch.randn(11, 5, requires_grad=True), torch.randn(11, 5)

    def slow(h, s):
        p, q = (h @ head.T).softmax(-1), (s @ start_head.T).softmax(-1)
        return sum(p[v] * (p[v] / q[v]).log() for v in range(11))

    exact = torch.stack([slow(*place) for place in zip(hidden, start, strict=True)])
    ids = torch.randint(11, (7, 2))
    exact_logps, exact_start = (
        (h @ w.T).softmax(-1).gather(-1, ids).log() for h, w in ((hidden, head), (start, start_head))
    )
    logps, start_logps, kl = grpo.compare_with_start(hidden, head, start, start_head, ids)
    torch.testing.assert_close((kl, logps, start_logps), (exact, exact_logps, exact_start))
    weight, weights = torch.rand(7), torch.rand(7, 2)
    sums = (weight @ kl + (weights * logps).sum(), weight @ exact + (weights * exact_logps).sum())
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, head)) for loss in sums), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- advantages ----


def test_running_mean_baseline():
    baselines = {}
    assert grpo.advantages([1, -1, -1], ["u"] * 3, range(3), baselines, "mean") == [1, -1, -1]  # it begins at 0
    for r in (1, -1, 0):
        grpo.move_baseline(baselines, "u", r)
    b = ((0.9 * 0 + 0.1) * 0.9 - 0.1) * 0.9
    assert baselines == {"u": pytest.approx(b)}
    assert grpo.advantages([1, -1, 0], ["u"] * 3, range(3), baselines, "mean") == [1 - b, -1 - b, 0.0]


def test_complaints_have_large_advantages_at_first_and_among_neutral_turns():
    baselines = {}
    assert grpo.advantages([-1] * 4, ["u"] * 4, range(4), baselines, "mean") == [-1.0] * 4
    for r in [0] * 12 + [-1] * 7 + [1]:  # 60 % neutral, 35 % complaints, 5 % thanks
        grpo.move_baseline(baselines, "u", r)
    mostly_neutral = {}
    for r in [-1, 0, 0, -1, 0] * 20:
        grpo.move_baseline(mostly_neutral, "u", r)
    assert -0.5 < mostly_neutral["u"] < -0.3 and grpo.advantages([-1], ["u"], [0], mostly_neutral, "mean")[0] < -0.5


def test_baselines_are_per_user_and_separate_for_tools():
    keys = [grpo.baseline_key("a", False), grpo.baseline_key("a", True), grpo.baseline_key("b", False)]
    assert len(set(keys)) == 3
    baselines = {keys[0]: -0.5, keys[1]: 0.75}
    assert grpo.advantages([-1, 1, -1], keys, range(3), baselines, "mean") == [-0.5, 0.25, -1.0]


def test_raw_and_group_advantages():
    assert grpo.advantages([1, -1, 0], ["u"] * 3, range(3), {"u": 0.7}, "none") == [1.0, -1.0, 0.0]
    advs = grpo.advantages([1, 1, -1, -1, 1], ["u"] * 5, ["p", "p", "p", "p", "q"], {"u": 0.25}, "group")
    assert advs == [1.0, 1.0, -1.0, -1.0, 0.75]  # q is alone in its group: the running mean
    assert grpo.advantages([1, 1], ["u"] * 2, ["p", "p"], {}, "group") == [0.0, 0.0]
    with pytest.raises(ValueError, match="gropu"):
        grpo.advantages([1], ["u"], [0], {}, "gropu")


# ---- log-probs through a model ----


@pytest.fixture(scope="module")
def model(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def batch(seed=0, temperatures=(1.0, 0.7, 1.3)):
    """Three samples of different lengths; each response ends with the stop token (id 256)."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(0, 256, (n,), generator=g).tolist()  # noqa: E731
    prompts, responses = [draw(5), draw(17), draw(3)], [[*draw(9), 256], [*draw(3), 256], [*draw(20), 256]]
    old = [(torch.randn(len(r), generator=g) * 0.3 - 5.5).tolist() for r in responses]
    return prompts, responses, old, [1.0, -0.5, 0.7], list(temperatures)


def answers(samples):
    return [grpo.Answer(*sample) for sample in zip(*samples, strict=True)]


def slow_logps(model, prompt, response, temperature):
    """Log-probs of one sample alone, from all its logits, the textbook way. (T,)"""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1)[range(len(response)), response]


def response_logps(model, row, chunk):
    """`grpo.response_logps` with another chunk size."""
    with mock.patch.object(grpo, "CHUNK", chunk):
        return grpo.response_logps(model, row)


def loss_and_gradients(model, samples, limit, chunk=256, tree=0, separate=False):
    model = copy.deepcopy(model)
    n, total = sum(map(len, samples[1])), 0.0
    batches = [[answer] for answer in answers(samples)] if separate else [answers(samples)]
    for row in [row for batch in batches for row in grpo.collate(batch, limit, tree)]:
        logp = response_logps(model, row, chunk)
        loss = grpo.ppo_clip_loss(logp, row["old_logp"], row["adv"], LOW, HIGH, DUAL).sum() / n
        loss.backward()
        total += loss.item()
    return total, {k: p.grad for k, p in model.named_parameters()}


@pytest.mark.parametrize("limit", [1, 40, 1000])
def test_logps_match_the_textbook_computation(model, limit):
    prompts, responses, old, advs, temperatures = samples = batch()
    for row in grpo.collate(answers(samples), limit):
        logp = response_logps(model, row, chunk=4)
        for i in set(row["sample"].tolist()):
            mine = row["sample"] == i
            expected = slow_logps(model, prompts[i], responses[i], temperatures[i])
            torch.testing.assert_close(logp[mine], expected, atol=1e-4, rtol=1e-4)
            assert row["target"][mine].tolist() == responses[i]  # the stop token too
            torch.testing.assert_close(row["old_logp"][mine], torch.tensor(old[i]))


def test_loss_is_invariant_to_rows_order_and_chunks(model):
    whole, gradients = loss_and_gradients(model, batch(), limit=1000)
    reversed_batch = tuple(list(reversed(part)) for part in batch())
    for samples, limit, chunk in [(batch(), 1, 256), (batch(), 40, 256), (reversed_batch, 1000, 256), (batch(), 1, 5)]:
        loss, other = loss_and_gradients(model, samples, limit, chunk)
        assert loss == pytest.approx(whole, abs=1e-5)
        for name, g in gradients.items():
            torch.testing.assert_close(other[name], g, atol=1e-5, rtol=1e-3)


# ---- trees ----


def random_ids(seed=0):
    g = torch.Generator().manual_seed(seed)
    return lambda n: torch.randint(0, 256, (n,), generator=g).tolist()


def chain(draw, turns=3):
    """The turns of a conversation: each prompt is the one before with its answer and the next message."""
    prompts, responses = [draw(7)], [draw(5)]
    for _ in range(turns - 1):
        prompts.append(prompts[-1] + responses[-1] + draw(4))
        responses.append(draw(5))
    return prompts, responses


def fork(draw):
    """Two turns. The second prompt has the first answer without its beginning, as if thinking was removed."""
    prompts, responses = chain(draw, 2)
    return [prompts[0], prompts[0] + responses[0][2:] + draw(4)], responses


def group(draw):
    """Four answers to one prompt: two are the same, and a third begins like them."""
    answer = draw(6)
    return [draw(9)] * 4, [answer, answer[:2] + draw(5), draw(3), answer]


def unrelated(draw):
    return [[1, *draw(5)], [2, *draw(17)], [3, *draw(3)]], [draw(9), draw(3), draw(8)]


def everything(draw):
    """All of these, shuffled: several trees in a row, and branches of branches."""
    parts = [kind(draw) for kind in (chain, fork, group, unrelated)]
    together = [x for prompts, responses in parts for x in zip(prompts, responses, strict=True)]
    return [p for p, _ in together[::2] + together[1::2]], [r for _, r in together[::2] + together[1::2]]


def add_training_values(prompts, responses, seed=0):
    g = torch.Generator().manual_seed(seed)
    old = [(torch.randn(len(r), generator=g) * 0.3 - 5.5).tolist() for r in responses]
    numbers = torch.rand(2, len(prompts), generator=g) + 0.3
    return prompts, responses, old, (numbers[0] - 0.8).tolist(), numbers[1].tolist()


@pytest.mark.parametrize("limit", [1, 40, 1000])
@pytest.mark.parametrize(
    ("kind", "tokens"), [(chain, 30), (fork, 24), (group, 9 + 6 + 5 + 3), (unrelated, 48), (everything, 125)]
)
def test_a_tree_gives_the_loss_and_gradient_of_separate_rows(model, kind, tokens, limit):
    samples = add_training_values(*kind(random_ids()))
    separate, gradients = loss_and_gradients(model, samples, 1, separate=True)
    loss, other = loss_and_gradients(model, samples, limit, tree=1000)
    assert loss == pytest.approx(separate, abs=1e-5)
    for name, g in gradients.items():
        torch.testing.assert_close(other[name], g, atol=1e-5, rtol=1e-3)
    if limit == 1000:  # all in one row
        assert sum(row["ids"].numel() for row in grpo.collate(answers(samples), limit, 1000)) == tokens


def test_samples_share_a_tree_only_if_that_is_cheaper_and_there_is_room():
    """Cheaper: the tree's tokens squared are at most the sum of its samples' squares, unless it fits a packed row."""
    lengths = lambda samples, limit, tree: [n for n, _ in grpo.grow_trees(samples, limit, tree)]  # noqa: E731
    prompt, other = list(range(100)), [[*range(200, 240)], [*range(300, 340)], [*range(400, 440)]]
    assert lengths([prompt + o for o in other], 1, 1000) == [220]
    assert lengths([prompt + o for o in other], 1, 200) == [180, 140]  # no room for the third
    short = [[0, 1, *o] for o in other]
    assert lengths(short, 1, 1000) == [42] * 3 and lengths(short, 82, 1000) == [82, 42]
    assert lengths([prompt, prompt + other[0], prompt + other[0] + other[1]], 1, 0) == [180]  # a chain
    assert lengths([prompt + other[0], prompt + other[1]], 1000, 0) == [140] * 2  # no branches if none are allowed


def test_read_gives_the_same_hidden_states_as_each_sample_alone(model):
    samples = answers(everything(random_ids()))
    for found, answer in zip(grpo.hidden_states(model, samples, 40, 1000), samples, strict=True):
        with torch.no_grad():
            alone = grpo.response_hidden(model, grpo.single_row(answer.prompt, answer.response, "cpu"))
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


def test_recomputing_activations_does_not_change_the_gradient(model):
    whole, gradients = loss_and_gradients(model, batch(), limit=1000)
    model = copy.deepcopy(model).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, other = loss_and_gradients(model, batch(), limit=1000)
    assert loss == pytest.approx(whole, abs=1e-6)
    for name, g in gradients.items():
        torch.testing.assert_close(other[name], g, atol=1e-6, rtol=1e-4)


def test_gradient_matches_the_textbook_computation(model):
    prompts, responses, old, advs, temperatures = batch()
    reference = copy.deepcopy(model)
    loss = 0.0
    for p, r, o, a, t in zip(prompts, responses, old, advs, temperatures, strict=True):
        ratio = (slow_logps(reference, p, r, t) - torch.tensor(o)).exp()
        per_token = -torch.minimum(ratio * a, ratio.clamp(1 - LOW, 1 + HIGH) * a)
        loss += (per_token if a >= 0 else per_token.clamp(max=-DUAL * a)).sum() / sum(map(len, responses))
    loss.backward()
    ours, gradients = loss_and_gradients(model, batch(), limit=1000)
    assert ours == pytest.approx(loss.item(), abs=1e-5)
    for name, p in reference.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-5, rtol=1e-3)


def test_the_stop_token_is_trained_on(model):
    """The gradient of the last position's log-prob is largest at the stop token."""
    prompts, responses, _, _, _ = batch()
    row = next(grpo.collate([grpo.Answer(prompts[0], responses[0], [0.0] * 10, 1.0)], 1000))
    assert row["target"][-1] == 256
    logp = grpo.response_logps(model, row)
    (gradient,) = torch.autograd.grad(-logp[-1], model.get_output_embeddings().weight)
    assert gradient[256].norm() > gradient[:256].norm(dim=-1).max()


def test_rows_keep_to_the_limit_and_no_sample_is_truncated():
    lengths = [50, 10, 200, 60, 30]
    rows = grpo.pack_rows(lengths, 100)
    assert sorted(i for row in rows for i in row) == [0, 1, 2, 3, 4]
    assert all(sum(lengths[i] for i in row) <= 100 or len(row) == 1 for row in rows) and len(rows) == 3


def test_a_sample_whose_lengths_do_not_match_is_an_error():
    with pytest.raises(ValueError, match="log-probs"):
        list(grpo.collate([grpo.Answer([1], [2, 3], [0.0])], 10))
