"""The distillation loss against slow, obvious references, and one whole step with a hint."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import distill
import grpo
import trainer
from clients.sessions import CARRIER
from config import Config
from durable.model import model_folder

LOW, HIGH = 0.2, 0.28


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


# ---- the loss ----


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_top_k_loss_matches_the_formula(clip):
    """Computed token by token, with ratios inside and outside the clip range."""
    student, teacher, now = (logits(6, 3, seed=s).log_softmax(-1) for s in (1, 2, 3))
    now.requires_grad_()
    expected = []
    for i in range(6):
        total = 0.0
        norm = sum(student[i, v].exp() for v in range(3))
        for v in range(3):
            delta = teacher[i, v] - student[i, v]
            if clip:
                delta = max(-clip, min(clip, delta.item()))
            a, rho = delta * student[i, v].exp() / norm, (now[i, v] - student[i, v]).exp()
            total = total + max(-a * rho, -a * rho.clamp(1 - LOW, 1 + HIGH))
        expected.append(total)
    loss = distill.top_k_loss(now, student, teacher, clip, LOW, HIGH)
    assert loss.shape == (6,)
    torch.testing.assert_close(loss, torch.stack(expected))
    (ours,), (theirs,) = (torch.autograd.grad(x.sum(), now, retain_graph=True) for x in (loss, torch.stack(expected)))
    torch.testing.assert_close(ours, theirs)


def test_top_k_loss_over_the_whole_vocabulary_has_the_gradient_of_the_kl():
    x, teacher = logits(4, 9).requires_grad_(), logits(4, 9, seed=1).log_softmax(-1)
    now = x.log_softmax(-1)
    loss = distill.top_k_loss(now, now.detach(), teacher, 0.0, LOW, HIGH)
    (ours,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
    (exact,) = torch.autograd.grad((now.exp() * (now - teacher)).sum(), x)
    torch.testing.assert_close(ours, exact)


def test_the_advantage_is_clipped_unless_clip_is_0():
    student, teacher = torch.tensor([0.0, -5.0, -1.0]), torch.tensor([-3.0, -1.0, -0.5])
    assert distill.advantage(student, teacher, 1.0).tolist() == [-1.0, 1.0, 0.5]
    assert distill.advantage(student, teacher, 0.0).tolist() == [-3.0, 4.0, 0.5]


# ---- the teacher ----


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def samples():
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, 256, (n,), generator=g).tolist()  # noqa: E731
    return [draw(5), draw(17), draw(3)], [draw(9), draw(4), draw(20)], draw


def slow_logps(model, prompt, response, temperature=1.0):
    """Log-probs of one sample in a pass of its own: (T, V)."""
    out = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].float()
    return (out / temperature).log_softmax(-1)


def make_row(model, k):
    prompts, responses, draw = samples()
    temperatures = [1.0, 0.7, 1.3]
    parts = zip(prompts, responses, temperatures, strict=True)
    row = next(grpo.collate([grpo.Answer(p, r, temperature=t) for p, r, t in parts], 1000))
    hidden, head = grpo.response_hidden(model, row).detach(), model.get_output_embeddings().weight
    ids = distill.top_k(hidden, head, k) if k else row["target"][:, None]
    return row, ids, prompts, responses, temperatures, draw


@pytest.mark.parametrize("k", [0, 4])
def test_top_k_ids_and_teacher_logps_match_separate_passes(model, k):
    row, ids, prompts, responses, temperatures, draw = make_row(model, k)
    hinted = {0: [draw(12)], 2: [draw(30)]}

    def sample(prompt, i):
        return grpo.Answer(prompt, responses[i], temperature=temperatures[i])

    states = {i: grpo.hidden_states(model, [sample(hinted[i][0], i)], 1000, 0) for i in hinted}
    teacher, hint_mask, used = distill.teacher_logps(
        model.get_output_embeddings().weight, row, ids, states, torch.zeros(ids.shape)
    )
    assert teacher.shape == ids.shape and hint_mask.shape == (33,) and used == {0: 0, 2: 0}
    for i in range(3):
        here = row["sample"] == i
        plain = slow_logps(model, prompts[i], responses[i], temperatures[i])
        expected = plain.topk(k).indices if k else torch.tensor(responses[i])[:, None]
        assert torch.equal(ids[here].sort().values, expected.sort().values)
        assert hint_mask[here].tolist() == [float(i in hinted)] * len(responses[i])
        if i in hinted:
            logps = slow_logps(model, hinted[i][0], responses[i], temperatures[i])
            torch.testing.assert_close(teacher[here], logps.gather(-1, ids[here]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 6, 8])
def test_shift_is_the_kl_over_the_k_tokens_and_any_other_token(k):
    p, q = (torch.randn(5, 8, generator=torch.Generator().manual_seed(i)).softmax(-1) for i in (1, 2))
    expected = [
        sum(a * math.log(a / b) for a, b in zip(x[:k], y[:k], strict=True))
        + (0 if k == 8 else (1 - sum(x[:k])) * math.log((1 - sum(x[:k])) / (1 - sum(y[:k]))))
        for x, y in zip(p.tolist(), q.tolist(), strict=True)
    ]
    torch.testing.assert_close(distill.hint_effect(p[:, :k].log(), q[:, :k].log()), torch.tensor(expected))


@pytest.mark.parametrize("k", [0, 4])
def test_of_several_hints_the_one_that_changes_the_teacher_most_is_used(model, k):
    row, ids, prompts, responses, temperatures, draw = make_row(model, k)
    candidates = [draw(30), draw(8), prompts[2], draw(5)]
    here = row["sample"] == 2
    logps = [slow_logps(model, p, responses[2], temperatures[2]).gather(-1, ids[here]) for p in candidates]
    plain = torch.zeros(ids.shape)
    plain[here] = logps[2]  # the third candidate is the prompt itself: it changes nothing
    changes = [distill.hint_effect(found, plain[here]).sum().item() for found in logps]
    assert abs(changes[2]) < 1e-4 and len(set(changes)) == 4
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        best = max(order, key=changes.__getitem__)
        answers = [grpo.Answer(candidates[i], responses[2], temperature=temperatures[2]) for i in order]
        states = {2: grpo.hidden_states(model, answers, 1000, 1000)}
        teacher, hint_mask, used = distill.teacher_logps(model.get_output_embeddings().weight, row, ids, states, plain)
        assert used == {2: order.index(best)}
        torch.testing.assert_close(teacher[here], logps[best], atol=1e-4, rtol=1e-4)
        assert torch.equal(hint_mask, here.float())


@pytest.mark.parametrize("no_rl", ["", "sampled with top_p"])
def test_the_first_step_sees_no_difference_to_the_start_and_to_a_teacher_without_a_hint(tiny_model, no_rl):
    """All three are the same model then, at the turn's temperature."""
    state = trainer.load_state(Config(), None, tiny_model, "cpu", torch.float32)
    prompt, response = [5, 6, 7], [8, 9]
    logprobs = slow_logps(state.policy, prompt, response, 0.5).gather(-1, torch.tensor(response)[:, None]).flatten()
    turn = SimpleNamespace(prompt_ids=prompt, response_ids=response, temperature=0.5, no_rl=no_rl)
    turn.logprobs = logprobs.tolist()
    metrics = trainer.update(Config(), state, [trainer.Lesson(turn, 0.0, [turn.prompt_ids])])
    assert metrics["kl"] == pytest.approx(0, abs=1e-6) and metrics["teacher_gap"] == pytest.approx(0, abs=1e-5)


# ---- the hinted prompt (its rendering is tested in test_program.py) ----


def test_the_hint_is_appended_to_the_last_user_message_and_nothing_else_changes():
    said, hint = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "c"
    tool = [*said, {"role": "user", "content": "d"}, {"role": "tool", "content": "e"}]
    before = copy.deepcopy(tool)
    got = distill.with_hint(tool, hint)
    assert got[2] == {"role": "user", "content": "d\n\n[user's hint / instruction]\nc"}
    assert got[:2] + got[3:] == before[:2] + before[3:] and tool == before
    listed = distill.with_hint([{"role": "user", "content": [{"type": "text", "text": "a"}], "name": "n"}], hint)
    assert [p["text"] for p in listed[0]["content"]] == ["a", distill.HINT + "c"] and listed[0]["name"] == "n"
    carrier = [*said[:1], {"role": "user", "content": CARRIER + " the time"}]  # from OpenClaw, not from the person
    assert distill.with_hint(carrier, hint) == [{"role": "user", "content": "a" + distill.HINT + "c"}, carrier[1]]
    with pytest.raises(distill.NoHintedPrompt):
        distill.with_hint(said[1:], hint)


# ---- a whole step, on the real small model ----


@pytest.fixture(scope="module")
def real():
    folder = model_folder("")
    return folder, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("k", [0, 20])
def test_a_hint_that_names_a_word_makes_it_likelier_in_a_prompt_without_the_hint(real, k):
    """One step on "... is Max" with the hint "Say Luna.": without the hint, Luna becomes likelier at that position."""
    folder, tokenizer = real
    question = "What is a good name for my dog?"

    def prompt(text):
        talk = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]

    answer = tokenizer("A good name for your dog is Max.<|im_end|>")["input_ids"]
    (wanted,), (sampled,) = (tokenizer(w)["input_ids"] for w in (" Luna", " Max"))
    at = answer.index(sampled)
    config = Config(lr=1e-5, opd_k=k, w_rl=0.0, kl=0.0)
    state = trainer.load_state(config, None, folder, "cpu", torch.float32)

    @torch.no_grad()
    def probabilities():
        return slow_logps(state.policy, prompt(question), answer)[at].exp()

    before, logps = probabilities(), slow_logps(state.policy, prompt(question), answer).detach()
    old = logps.gather(-1, torch.tensor(answer)[:, None]).squeeze(-1).tolist()
    turn = SimpleNamespace(prompt_ids=prompt(question), response_ids=answer, logprobs=old, temperature=1.0, no_rl="")
    hinted = [[prompt(question + distill.HINT + "I want the name Luna. Say Luna.")]]
    metrics = trainer.update(config, state, [trainer.Lesson(turn, 0.0, hinted[0])])
    after = probabilities()
    assert metrics["hinted"] == 1 and metrics["teacher_gap"] > 0.1 and metrics["kl"] == 0
    if k:
        assert after[wanted] > 1.2 * before[wanted]
    else:  # only the sampled token gets a signal
        assert after[sampled] < before[sampled]
