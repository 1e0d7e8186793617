"""LoRA: the adapter's math and files, its versions in a real engine, and a program that trains one."""

import asyncio
import shutil
import signal
from types import SimpleNamespace

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import probe
import swap
import trainer
from config import Config
from durable import checkpoint
from durable.errors import UsageError
from durable.model import check_folder, check_rank, export
from machine.plan import make_plan
from tests.conftest import make_tiny_model
from tests.talking import ask, client, rated, rows, until, user

BOUND = 0.05
IDS = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(1)).tolist()


def load(folder, saved=None, rank=4):
    return trainer.load_state(Config(lora_rank=rank, lr=1e-2), saved, folder, "cpu", torch.bfloat16)


@torch.no_grad()
def change(state, seed):
    """Change the adapter clearly: mean |dlogp| to the one before is above 0.2 (asserted by the tests)."""
    g = torch.Generator().manual_seed(seed)
    for master in state.masters:
        master.add_(torch.randn(master.shape, generator=g) * 0.08)
    trainer.sync_bf16(state)


def logps(state):
    return probe.token_logps(state.policy, IDS)


# ---- the trainer's side ----


def test_a_new_adapter_equals_the_starting_weights_and_shares_their_tensors(tiny_model):
    state = load(tiny_model)
    assert torch.equal(logps(state), probe.token_logps(state.start, IDS)), "B is 0"
    linear = state.policy.model.layers[0].mlp.down_proj
    assert linear.base_layer.weight is state.start.model.layers[0].mlp.down_proj.weight, "one copy in memory"
    assert state.policy.get_output_embeddings().weight is state.start.get_output_embeddings().weight
    names = trainer.trained(state.policy)
    assert len(names) == 2 * 7 * 2 and all(".lora_" in name for name in names), "each linear layer but the head"
    first = probe.token_logps(state.start, IDS)
    change(state, 1)
    assert torch.equal(probe.token_logps(state.start, IDS), first), "judge, teacher and KL see the starting weights"
    assert (logps(state) - first).abs().mean() > 0.2


def test_the_gradients_of_a_and_b_follow_from_the_gradient_of_the_merged_weights(tiny_model):
    """The same loss with merged weights W + 2 B A, by the chain rule: dL/dB = 2 dL/dW A^T, dL/dA = 2 B^T dL/dW."""
    state = trainer.load_state(Config(lora_rank=4), None, tiny_model, "cpu", torch.float32)
    change(state, 2)
    ids = torch.tensor([IDS])
    state.policy(ids).logits.logsumexp(-1).sum().backward()
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    layer = state.policy.model.layers[1].self_attn.q_proj
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight  # (r, in), (out, r)
    for name, module in state.policy.named_modules():
        if hasattr(module, "base_layer"):
            plain.get_submodule(name).weight.data += 2 * module.lora_B.default.weight @ module.lora_A.default.weight
    plain(ids).logits.logsumexp(-1).sum().backward()
    whole = plain.model.layers[1].self_attn.q_proj.weight.grad
    grads = {id(p): m.grad for p, m in zip(trainer.trained(state.policy).values(), state.masters, strict=True)}
    torch.testing.assert_close(grads[id(b)], 2 * whole @ a.T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grads[id(a)], 2 * b.T @ whole, rtol=1e-3, atol=1e-3)


def test_a_checkpoint_can_be_loaded_by_peft_and_training_continues_from_it(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')  # as in many models' folders
    state = load(folder)
    change(state, 3)
    trainer.commit(state, 7, {"alice": 0.5}, state.probed)
    checkpoint.write(checkpoint.folder_of(tmp_path, "", 7), 0, lambda folder: trainer.save(state, folder))
    saved = checkpoint.folder_of(tmp_path, "", 7)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    theirs = probe.token_logps(PeftModel.from_pretrained(base, saved).base_model.model, IDS)
    assert (theirs - logps(state)).abs().mean() < 0.01, "peft computes with the adapter in fp32"
    export(saved, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    check_folder(tmp_path / "merged")
    merged = probe.token_logps(merged, IDS)
    assert (merged - logps(state)).abs().mean() < 0.02, "equal except for rounding to bf16"

    again = load(tiny_model, saved)
    assert (again.step, again.baselines) == (7, {"alice": 0.5}) and torch.equal(logps(again), logps(state))
    step, baselines, _ = trainer.load_checkpoint(again, None)
    assert (step, baselines) == (0, {}) and torch.equal(logps(again), probe.token_logps(again.start, IDS))
    trainer.restore(again)
    assert torch.equal(logps(again), logps(state)), "a rollback that failed"
    check_rank(saved, 4)
    for rank in (0, 8):
        with pytest.raises(UsageError, match=f"--lora_rank=4, not {rank}"):
            check_rank(saved, rank)


# ---- versions in the engine ----


@pytest.fixture(scope="module")
async def served(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("lora"))
    config = Config(max_model_len=512, tool_parser="", max_seqs=8, engine_memory=0.2, engine_cores=1, lora_rank=4)
    engine = swap.start_engine(swap.engine_args(config, folder, make_plan(config, folder)))
    yield SimpleNamespace(engine=engine, state=load(folder))
    swap.serving = {"": swap.Version(0)}
    swap.stop_engine(engine)


def push(served, step, expected):
    return swap.push(served.engine, trainer.served_weights(served.state.policy), step, (IDS, expected))


async def loaded(served):
    return await served.engine.engine_core.list_loras_async()


async def test_an_answer_keeps_its_adapter_and_old_adapters_are_unloaded(served):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(max_tokens=200, ignore_eos=True, temperature=1.0, logprobs=0)

    async def generate(name, **options):
        outputs = swap.generate(served.engine, "", {"prompt_token_ids": IDS}, params, name, **options)
        return [o async for o in outputs][-1].outputs[0]

    def agrees(answer, model):
        ids = [*IDS, *answer.token_ids]
        expected = probe.token_logps(model, ids)[-200:]
        got = torch.tensor([at[i].logprob for at, i in zip(answer.logprobs, answer.token_ids, strict=True)])
        return (got - expected).abs().mean() < BOUND

    answers = []
    policies = [
        load(served.state.start.name_or_path).policy for _ in range(3)
    ]  # loaded now, or the first answer would end too soon
    for step in (1, 2, 3):
        before = logps(served.state)
        change(served.state, step)
        assert (logps(served.state) - before).abs().mean() > 0.2
        gap, _ = await push(served, step, logps(served.state))
        assert gap < BOUND
        policies[step - 1].load_state_dict(served.state.policy.state_dict())
        answers.append(asyncio.create_task(generate(f"run-{step}")))
        await asyncio.sleep(0.1)
    assert not any(a.done() for a in answers) and len(await loaded(served)) == 3, "they overlap"
    first = await generate("first", lora_request=LoRARequest("policy" + swap.FIRST_WEIGHTS, 1, "none"))
    for step, (answer, policy) in enumerate(zip(await asyncio.gather(*answers), policies, strict=True), 1):
        assert [(s.version, s.start, s.end) for s in answer.weight_versions] == [(str(step), 0, 200)]
        assert agrees(answer, policy) and not agrees(answer, served.state.start)
    assert agrees(first, served.state.start) and first.weight_versions[0].version == "0"
    assert len(await loaded(served)) == 1


async def test_an_adapter_that_disagrees_with_the_trainer_is_never_served(served):
    before, known = swap.serving[""], await loaded(served)
    right = logps(served.state)
    change(served.state, 8)
    with pytest.raises(swap.PushError, match="disagree"):
        await push(served, 9, right)
    assert swap.serving[""] is before and await loaded(served) == known


async def test_an_adapter_for_a_layer_that_the_engine_lacks_is_refused(served):
    before, known = swap.serving[""], await loaded(served)
    strange = {k.replace("layers.1.", "layers.9."): w for k, w in trainer.served_weights(served.state.policy).items()}
    with pytest.raises(swap.PushError, match="no layer for .*layers.9.mlp.down_proj"):
        await swap.push(served.engine, strange, 9, (IDS, logps(served.state)))
    assert swap.serving[""] is before and await loaded(served) == known


# ---- the program ----


async def test_an_adapter_is_trained_served_resumed_and_rolled_back(fresh):
    options = {"batch_size": 1, "save_every": 1, "lora_rank": 4, "lr": 1e-2, "max_staleness": 20}
    program = fresh(**options).wait_ready()

    def logp(model):
        body = {"model": model, "messages": [user("q")], "max_tokens": 1, "temperature": 0, "logprobs": True}
        reply = httpx.post(f"{program.url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
        assert reply["model"] == model
        return reply["choices"][0]["logprobs"]["content"][0]["logprob"]

    first = logp("policy")
    assert logp("policy@base") == first
    for i in range(2):
        await rated(program, f"q{i}", -1, "Answer in one short sentence, please.")
        await until(lambda i=i: program.status()["step"] == i + 1)
    names = httpx.get(f"{program.url}/metrics").raise_for_status().text
    assert "vllm:num_requests_running" in names and "running_lora_adapters=" not in names, "one series for each step"
    trained = logp("policy")
    assert trained != first and logp("policy@base") == first
    c = client(program, "none").chat.completions
    asked = await c.create(model="policy@base", messages=[user("who were you?")], max_tokens=12)
    assert rows(program, "id = ?", asked.id)[0]["reason"] == "answered by the starting weights"

    program.process.send_signal(signal.SIGKILL)
    program.wait_end()
    dtype = (program.out / "last_dtype").read_text()
    program = fresh(**options).wait_ready()
    assert program.log().count(f"training in {dtype.removeprefix('torch.')}") == 2
    assert program.status()["step"] == 2 and logp("policy") == trained and logp("policy@base") == first
    reply = await ask(client(program, "none"), [user("and now?")])
    assert rows(program, "id = ?", reply.id)[0]["versions"].startswith("[[2, 0,")
    rolled_back, ids = asyncio.Event(), []

    async def keep_asking(tokens):
        while not rolled_back.is_set():
            options = {"max_tokens": tokens, "extra_body": {"ignore_eos": True}}
            ids.append((await ask(client(program, "none"), [user(f"a question {len(ids)}")], **options)).id)

    # Different lengths, so that the answers don't all end when the weights change.
    asking = [asyncio.create_task(keep_asking(200 + 70 * i)) for i in range(4)]
    await asyncio.sleep(0.5)
    headers = {"Authorization": f"Bearer {(program.out / 'admin_key').read_text().strip()}"}
    async with httpx.AsyncClient(timeout=60, headers=headers) as http:
        (await http.post(f"{program.url}/admin/rollback", json={"step": 0})).raise_for_status()
    rolled_back.set()
    await asyncio.gather(*asking)
    answers = [rows(program, "id = ?", i)[0] for i in ids]
    assert all(row["reason"] for row in answers if row["versions"].startswith("[[2, 0,")), answers
    assert "generated by weights that were undone" in [row["reason"] for row in answers]
    assert logp("policy") == first
    await rated(program, "q9")
    await until(lambda: program.status()["step"] == 1)
    program.stop()
    other = fresh()
    other.wait_end()
    assert "was trained with --lora_rank=4, not 0" in other.log()[-300:]
