"""The trainer: bf16 values in any dtype, fp32 masters, and checkpoints that other programs can load."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import probe
import trainer
from config import Config
from durable import checkpoint
from durable.errors import UsageError
from durable.model import check_folder, fingerprint
from machine import memory
from machine.plan import faster_dtype, measure_gflops
from tests.conftest import ROOT, make_tiny_model
from tests.records import turn


def load(folder, start=None, lr=1e-3, dtype=torch.float32):
    return trainer.load_state(Config(lr=lr), folder if start else None, start or folder, "cpu", dtype)


def save(state, out, size=0):
    checkpoint.write(checkpoint.folder_of(out, "", state.step), size, lambda folder: trainer.save(state, folder))


def trained_once(folder):
    state = load(folder)
    train_a_step(state, 1)
    return state


def train_a_step(state, seed):
    g = torch.Generator().manual_seed(seed)
    for master in state.masters:
        master.grad = torch.randn(master.shape, generator=g)
    state.adam.step()
    state.adam.zero_grad()
    trainer.sync_bf16(state)
    state.step += 1


@pytest.mark.parametrize("tied", [True, False])
def test_training_resumes_exactly_from_a_checkpoint(tmp_path, tied):
    folder = make_tiny_model(tmp_path / "model", tied)
    state = load(folder)
    for seed in range(3):
        train_a_step(state, seed)
    state.baselines, state.probed = {"alice": -0.25}, {"nll": 2.5}
    trainer.snapshot(state)
    save(state, tmp_path)
    saved = checkpoint.folder_of(tmp_path, "", 3)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]

    again = load(saved, folder)
    saved.rename(tmp_path / "gone")  # it may be removed while a program that started from it runs
    save(again, tmp_path)
    assert AutoTokenizer.from_pretrained(saved).chat_template
    assert (again.step, again.baselines, again.probed) == (3, {"alice": -0.25}, {"nll": 2.5})
    for s in (state, again):
        train_a_step(s, 9)  # Adam's moments are restored, too
    for a, b in zip(state.masters, again.masters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)

    plain = AutoModelForCausalLM.from_pretrained(saved)  # as other programs load it
    assert plain.dtype == torch.bfloat16
    untrained = load(saved)
    for name, p in untrained.policy.named_parameters():
        torch.testing.assert_close(p.to(torch.bfloat16), plain.get_parameter(name), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(saved).chat_template


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotary_frequencies_are_not_rounded(tiny_model, dtype):
    """vLLM computes them in fp32. Rounded to bf16, they would give other log-probs far into a long text."""
    exact = AutoModelForCausalLM.from_pretrained(tiny_model).model.rotary_emb.inv_freq
    assert not torch.equal(exact, exact.bfloat16().float())
    state = load(tiny_model, dtype=dtype)
    for model in (state.policy, state.start):
        assert model.dtype == dtype and torch.equal(model.model.rotary_emb.inv_freq, exact)


def test_the_policy_has_exactly_the_values_that_are_served(tiny_model):
    """Masters keep what bf16 can't represent; the policy has exactly the values that are pushed."""
    state = load(tiny_model, lr=1e-5)
    before = trainer.served_weights(state.policy)
    train_a_step(state, 1)
    pushed = trainer.served_weights(state.policy)
    moved = 0
    for (name, w), master, p in zip(pushed.items(), state.masters, state.policy.parameters(), strict=True):
        assert w.dtype == torch.bfloat16 and torch.equal(w.to(p.dtype), p)
        assert not torch.equal(w.float(), master), "the master keeps the fine part"
        moved += (w != before[name]).float().mean().item()
    assert moved / len(pushed) < 0.9, "at this learning rate many weights wait below bf16's resolution"


def served_share(state, start):
    """The share of the masters' change that is served: <served, moved> / |moved|^2."""
    moved = torch.cat([(m.detach() - s).flatten() for m, s in zip(state.masters, start, strict=True)])
    served = [p.detach().float() - s for p, s in zip(state.policy.parameters(), start, strict=True)]
    return (torch.cat([t.flatten() for t in served]) @ moved / (moved @ moved)).item()


def test_an_update_is_served_in_full_from_the_first_step(tmp_path, tiny_model):
    """Rounding to the nearest bf16 value would serve only a few percent of it."""
    state = load(tiny_model, lr=1e-5)
    start = [m.detach().clone() for m in state.masters]
    for step in (1, 2, 3):
        train_a_step(state, step)
        assert 0.95 < served_share(state, start) < 1.05
    nearest = [m.detach().to(torch.bfloat16).float() - s for m, s in zip(state.masters, start, strict=True)]
    moved = [m.detach() - s for m, s in zip(state.masters, start, strict=True)]
    dot = lambda a, b: sum((x * y).sum().item() for x, y in zip(a, b, strict=True))  # noqa: E731
    assert dot(nearest, moved) / dot(moved, moved) < 0.5, "rounding to nearest must fail this test"

    trainer.snapshot(state)
    served = trainer.served_weights(state.policy)
    assert all(torch.equal(w, served[n]) for n, w in trainer.snapshot_weights(state).items()), "what an undo serves"
    save(state, tmp_path)
    again = load(checkpoint.folder_of(tmp_path, "", 3), tiny_model, lr=1e-5)
    assert all(torch.equal(w, served[n]) for n, w in trainer.served_weights(again.policy).items()), "after a restart"
    trainer.sync_bf16(again)
    assert all(torch.equal(w, served[n]) for n, w in trainer.served_weights(again.policy).items())


def test_dithering_is_unbiased_and_does_not_change_bf16_values():
    exact = torch.randn(100_000).to(torch.bfloat16)
    assert torch.equal(trainer.dithered(exact.float(), 7), exact)
    assert torch.equal(
        trainer.dithered(torch.tensor([torch.inf, -torch.inf, 0.0]), 0).float(),
        torch.tensor([torch.inf, -torch.inf, 0.0]),
    )
    for share in (0.1, 0.5, 0.9):
        value = torch.full((300_000,), 1.0 + share * 2**-7)  # between the bf16 values 1 and 1 + 2^-7
        found = trainer.dithered(value, 3).float()
        assert set(found.tolist()) == {1.0, 1.0 + 2**-7}
        assert abs(found.mean().item() - value[0].item()) < 0.01 * 2**-7
    whole = trainer.dithered(torch.full((5000,), 1.003), 1)
    assert not torch.equal(whole, trainer.dithered(torch.full((5000,), 1.003), 2)), "each tensor has its own noise"
    assert torch.equal(trainer.dithered(torch.full((50, 100), 1.003), 1).view(-1), whole)
    longer = trainer.dithered(torch.full((3, trainer.CHUNK), 1.003), 1)
    assert torch.equal(longer.view(-1)[:5000], whole), "the noise of a weight depends only on its index"
    assert not torch.equal(longer[0], longer[1]), "each chunk has its own noise"


def test_the_speed_of_each_dtype_is_measured(tiny_model):
    found = measure_gflops(tiny_model, [0], 256)
    assert set(found) == {torch.bfloat16, torch.float32} and all(0.1 < v < 1e5 for v in found.values())


def test_a_restart_keeps_its_dtype_unless_the_other_is_twice_as_fast(tmp_path):
    bf16, fp32, last = torch.bfloat16, torch.float32, tmp_path / "dtype"
    assert faster_dtype({bf16: 3, fp32: 2}, last) == bf16 and faster_dtype({bf16: 2, fp32: 3}, last) == fp32
    last.write_text(str(fp32))
    assert faster_dtype({bf16: 3, fp32: 2}, last) == fp32
    assert faster_dtype({bf16: 5, fp32: 2}, last) == bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_several_rows_add_up_in_fp32(tiny_model, dtype):
    state = load(tiny_model, dtype=dtype)
    for _ in range(300):  # bf16 can't represent 257
        sum(p.sum() for p in state.policy.parameters()).backward()
    assert all(torch.equal(m.grad, torch.full_like(m, 300.0)) for m in state.masters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_an_embedding_are_those_of_dense_ones(tmp_path, tied, dtype):
    state = load(make_tiny_model(tmp_path, tied), dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for ids in ([5, 6, 5], [7, 5]):
        for model in (state.policy, plain):
            model(torch.tensor([ids])).logits[..., :9].float().logsumexp(-1).sum().backward()
    for master, (name, p) in zip(state.masters, plain.named_parameters(), strict=True):
        gap, size = (master.grad - p.grad.float()).norm(), p.grad.float().norm()
        assert gap < (1e-5 if dtype == torch.float32 else 0.03) * size, name


def test_only_listed_checkpoints_are_kept(tmp_path):
    """Removed: old ones, half-written ones, and complete ones that never became the current one."""
    for name in ("step-000007.part", "step-000003", "step-000005", "step-000006"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    checkpoint.remove_others(tmp_path, [("", 3), ("", 5)])
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000005"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_can_be_reverted(tiny_model, dtype):
    """Weights, moments and gradients are then as before the step, also if it is the first one."""
    state, other = load(tiny_model, dtype=dtype), load(tiny_model, dtype=dtype)
    for seed in (1, 2):
        served = trainer.served_weights(state.policy)
        train_a_step(state, 100 + seed)
        for t in [*state.policy.parameters(), *state.masters]:  # as after a row that ran out of memory
            t.grad = torch.full_like(t, 7.0)
        trainer.restore(state)
        assert not any(p.grad is not None and p.grad.any() for p in [*state.policy.parameters(), *state.masters])
        assert all(torch.equal(w, served[n]) for n, w in trainer.served_weights(state.policy).items())
        assert all(torch.equal(w, served[n]) for n, w in trainer.snapshot_weights(state).items())
        for s in (state, other):
            train_a_step(s, seed)
        trainer.snapshot(state)
        for a, b in zip(trainer.mutable(state), trainer.mutable(other), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_no_checkpoint_is_begun_without_disk_space(tiny_model, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="MiB needed"):
        save(trained_once(tiny_model), tmp_path, size=1 << 60)
    assert not (tmp_path / "checkpoints").exists()


def test_a_failed_checkpoint_leaves_no_files(tiny_model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(checkpoint.CheckpointError, match="No space left"):
        save(trained_once(tiny_model), tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_temperature_without_do_sample_does_not_prevent_checkpoints(tmp_path):
    """transformers loads such a generation_config.json, but would not write it."""
    folder = make_tiny_model(tmp_path / "model")
    (folder / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    save(trained_once(folder), tmp_path)
    assert load(checkpoint.folder_of(tmp_path, "", 1), folder).step == 1


def test_the_error_names_a_damaged_file(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    check_folder(folder)
    state = load(folder)
    train_a_step(state, 1)
    save(state, tmp_path)
    saved = checkpoint.folder_of(tmp_path, "", 1)
    for file in (folder / "model.safetensors", saved / "trainer.pt"):
        file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UsageError, match="model.safetensors is damaged.*; do this"):
        check_folder(folder, "; do this")
    start = make_tiny_model(tmp_path / "start")
    for _ in range(2):  # truncated, then missing
        with pytest.raises(UsageError, match="(?s)trainer.pt is damaged: .*rollback"):
            load(saved, start)
        (saved / "trainer.pt").unlink(missing_ok=True)
    assert load(saved).step == 0, "as a model to begin with, it is a model like any other"
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="no config.json or .*safetensors"):
        check_folder(folder)


def test_a_models_fingerprint_depends_only_on_its_contents(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    known = fingerprint(folder)
    assert fingerprint(folder.rename(tmp_path / "moved")) == known
    assert fingerprint(make_tiny_model(tmp_path / "other", scale=0.06)) != known


LONG_ROW = """
import re, sys, torch, grpo
from transformers import LlamaConfig, LlamaForCausalLM
folder, tokens, branches = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).train()
for p in model.parameters():
    p.grad = torch.zeros_like(p)
model.gradient_checkpointing_enable({"use_reentrant": False})
answers = [[2 + i] * (600 // branches) for i in range(branches)]
row = next(grpo.collate([grpo.Answer([1] * (tokens - 600), answer) for answer in answers], 256, tokens))
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 2**20  # GiB
before = peak()  # (ru_maxrss would be that of the process we were forked from)
grpo.response_logps(model, row).sum().backward()
print(peak() - before)
"""


@pytest.mark.parametrize(("heads", "layers", "tokens", "branches"), [(9, 2, 4000, 1), (9, 8, 3000, 1), (3, 2, 8000, 3)])
def test_planned_memory_of_a_long_row_is_1_to_2_times_the_measured_memory(tmp_path, heads, layers, tokens, branches):
    dims = {"hidden_size": 64 * heads, "intermediate_size": 170 * heads, "num_attention_heads": heads}
    dims["num_key_value_heads"] = heads // 3
    LlamaConfig(vocab_size=50_000, num_hidden_layers=layers, **dims).save_pretrained(tmp_path)
    command = [sys.executable, "-c", LONG_ROW, tmp_path, str(tokens), str(branches)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    shape, setting = LlamaConfig.from_pretrained(tmp_path), memory.Setting("cpu", 4, 0, tokens, 256)
    measured, planned = float(done.stdout), memory.needs(shape, setting)[0]["row"]
    assert measured < planned < 2 * measured, (measured, planned)


def record_gradients(monkeypatch):
    """A list to which each later step adds its gradient, before it is clipped."""
    found, clip = [], torch.nn.utils.clip_grad_norm_

    def keep(masters, norm):
        found.append(torch.cat([m.grad.flatten() for m in masters]))
        return clip(masters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
    return found


def test_a_conversation_with_hints_gives_the_same_step_as_its_separate_turns(tiny_model, monkeypatch):
    """With trees, both models read fewer tokens; the gradient and the metrics are the same."""
    state, found, tokens, prompt, lessons = load(tiny_model, lr=1e-5), record_gradients(monkeypatch), [], [], []
    for k in range(4):
        prompt, answer = [*prompt, *range(20 * k, 20 * k + 15)], list(range(100 + k, 110 + k))
        hinted = [[*prompt[:-3], 200 + h, *prompt[-3:]] for h in range(k)]
        values = {"prompt_ids": prompt, "response_ids": answer, "logprobs": [-5.8] * 10, "versions": [(0, 0, 10)]}
        lessons.append(trainer.Lesson(turn(f"t{k}", **values), 1.0, hinted))
        prompt = prompt + answer
    for model in (state.policy, state.start):
        model.model.register_forward_pre_hook(
            lambda _, __, said: tokens.append(said["input_ids"].numel()), with_kwargs=True
        )
    config, metrics, seen = Config(row_tokens=60), [], []
    assert state.packs
    for state.packs in (True, False):
        trainer.restore(state)
        metrics.append(trainer.update(config, state, lessons))
        seen.append(sum(tokens) - sum(seen))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-5) and metrics[0]["teacher_gap"] > 0
    assert seen[0] < 0.6 * seen[1]


def test_rows_and_trees_fit_the_memory_and_the_attention_window(tiny_model):
    state = load(tiny_model)
    config = Config(row_tokens=256, max_train_tokens=4096, max_model_len=2048)
    assert trainer.row_limits(config, state) == (256, 2048)
    state.policy.config.sliding_window = 128  # a tree's mask would replace that of the window
    assert trainer.row_limits(config, state) == (128, 128)
    state.packs = False
    assert trainer.row_limits(config, state) == (1, 0)


def test_each_answer_has_the_same_weight_whatever_its_length(tiny_model, monkeypatch):
    """The batch's gradient is the mean of its answers' own gradients, in one row or in two."""
    state = load(tiny_model, lr=1e-5)
    lengths, found = (40, 5), record_gradients(monkeypatch)
    turns = [
        turn(f"t{n}", response_ids=list(range(10, 10 + n)), logprobs=[-5.8] * n, versions=[(0, 0, n)]) for n in lengths
    ]
    lessons = [trainer.Lesson(t, adv, []) for t, adv in zip(turns, (1.0, -0.5), strict=True)]
    for config in (Config(row_tokens=256), Config(row_tokens=1)):
        for batch in ([lessons[0]], [lessons[1]], lessons):
            trainer.restore(state)
            trainer.update(config, state, batch)
        one, other, both = found[-3:]
        torch.testing.assert_close(both, (one + other) / 2, rtol=1e-3, atol=1e-6)


def test_recomputing_long_rows_leaves_nothing_behind(tiny_model):
    """transformers adds a hook to the embedding each time that gradient checkpointing is switched on."""
    state, lesson, passes = load(tiny_model), trainer.Lesson(turn("t", no_rl=True), 1.0, []), Counter()
    state.policy.model.layers[0].register_forward_pre_hook(lambda *_: passes.update([row_tokens]))
    for row_tokens in (1, 256, 1, 256):
        trainer.update(Config(row_tokens=row_tokens), state, [lesson])
        assert not state.policy.is_gradient_checkpointing, "the probe generates next"
    assert passes == {1: 4, 256: 2}, "long rows are computed twice"
    assert not state.policy.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("row_tokens", [1, 256])
def test_the_models_dropout_is_off(tmp_path, row_tokens):
    """The engine samples without dropout, so training must compute the same log-probs."""
    folder = make_tiny_model(tmp_path)
    settings = json.loads((folder / "config.json").read_text()) | {"attention_dropout": 0.5}
    (folder / "config.json").write_text(json.dumps(settings))
    state, t = load(folder), turn("t")
    assert state.policy.config.attention_dropout == 0.5
    sampled = probe.token_logps(state.start, t.prompt_ids + t.response_ids)[len(t.prompt_ids) - 1 :].tolist()
    lesson = trainer.Lesson(replace(t, logprobs=sampled, temperature=1.0), 1.0, [])
    assert trainer.update(Config(row_tokens=row_tokens), state, [lesson])["dlogp"] < 1e-4


def test_the_learning_rate_rises_over_the_first_steps(tiny_model):
    """Adam's first update moves a weight by the whole learning rate; later ones depend on its gradients so far."""
    state = load(tiny_model, lr=1e-3)
    lesson = trainer.Lesson(turn(logprobs=[-5.8] * 3), 1.0, [])
    for step, expected in ((0, 2e-4), (2, 6e-4), (4, 1e-3), (50, 1e-3)):
        trainer.restore(state)  # Adam begins anew
        state.step = step
        before = [m.detach().clone() for m in state.masters]
        trainer.update(Config(), state, [lesson])
        moved = max((m.detach() - b).abs().max().item() for m, b in zip(state.masters, before, strict=True))
        assert moved == pytest.approx(expected, rel=0.01)
