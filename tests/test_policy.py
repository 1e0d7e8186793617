"""The trainer's side of a model: bf16 values in whatever dtype, fp32 masters, checkpoints that others can load."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import policy
from tests.conftest import make_tiny_model


def load(folder, start=None, lr=1e-3):
    return policy.load_state(folder, start or folder, "cpu", lr, (0.9, 0.98), 0.01)


def train_a_step(state, seed):
    g = torch.Generator().manual_seed(seed)
    for master in state.masters:
        master.grad.copy_(torch.randn(master.shape, generator=g))
    state.adam.step()
    state.adam.zero_grad(set_to_none=False)
    policy.publish(state.masters, state.policy)
    state.step += 1


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_goes_on_where_it_stopped(tmp_path, tied):
    folder = make_tiny_model(tmp_path / "model", tied)
    state = load(folder)
    for seed in range(3):
        train_a_step(state, seed)
    state.baselines = {"alice": -0.25}
    saved = policy.save_checkpoint(state, tmp_path)
    assert policy.latest_checkpoint(tmp_path, folder) == saved == tmp_path / "checkpoints" / "step-000003"

    with pytest.raises(SystemExit, match="trained from"):
        policy.latest_checkpoint(tmp_path, tmp_path / "another-model")

    again = load(saved, folder)
    assert (again.step, again.baselines) == (3, {"alice": -0.25})
    for s in (state, again):
        train_a_step(s, 9)  # the optimizer's moments came back too
    for a, b in zip(state.masters, again.masters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)

    plain = AutoModelForCausalLM.from_pretrained(saved)  # as anybody would load it
    assert plain.dtype == torch.bfloat16
    untrained = load(saved)
    for name, p in untrained.policy.named_parameters():
        torch.testing.assert_close(p.to(torch.bfloat16), plain.get_parameter(name), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(saved).chat_template


def test_what_is_trained_through_is_what_is_served(tiny_model):
    """Masters keep what bf16 cannot hold; the policy has exactly the values that are pushed."""
    state = load(tiny_model, lr=1e-5)
    before = policy.served_weights(state.policy)
    train_a_step(state, 1)
    pushed = policy.served_weights(state.policy)
    moved = 0
    for (name, w), master, p in zip(pushed.items(), state.masters, state.policy.parameters(), strict=True):
        assert w.dtype == torch.bfloat16 and torch.equal(w.to(p.dtype), p)
        assert not torch.equal(w.float(), master), "the master keeps the fine part"
        moved += (w != before[name]).float().mean().item()
    assert moved / len(pushed) < 0.9, "at this learning rate many weights wait below bf16's resolution"


def test_gradients_of_several_rows_add_up_in_fp32(tiny_model):
    state = load(tiny_model)
    parameter, master = next(state.policy.parameters()), state.masters[0]
    for _ in range(2):
        (parameter * 1.0).sum().backward()
        if parameter.grad is not master.grad:
            master.grad.add_(parameter.grad)
            parameter.grad = None
    assert torch.equal(master.grad, torch.full_like(master, 2.0))


def test_a_half_written_checkpoint_is_never_taken(tmp_path):
    assert policy.latest_checkpoint(tmp_path, tmp_path) is None
    (tmp_path / "checkpoints" / "step-000007.part").mkdir(parents=True)
    assert policy.latest_checkpoint(tmp_path, tmp_path) is None
