"""Pushes to a running vLLM engine: exact, verified, refused when wrong. With tied and untied heads."""

import asyncio
import resource
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import probe
import server
import swap
from config import Config
from durable import journal
from machine.plan import make_plan
from tests.conftest import make_tiny_model

BOUND = 0.05


async def start(folder, dtype):
    """An engine for the model in `folder`, and the trainer's copy of its weights."""
    config = Config(max_model_len=512, tool_parser="", max_seqs=8, engine_memory=0.2, engine_cores=1)
    plan = replace(make_plan(config, folder), dtype=dtype)
    engine = swap.start_engine(swap.engine_args(config, folder, plan))
    await engine.update_weight_version("0")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    return SimpleNamespace(engine=engine, model=model, ids=ids)


@pytest.fixture(scope="module", params=["tied", "tied, the head is in the file", "untied"])
async def served(request, tmp_path_factory):
    """In bf16 if untied."""
    tied = request.param != "untied"
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), tied)
    if "file" in request.param:
        saved = load_file(folder / "model.safetensors")
        saved["lm_head.weight"] = saved["model.embed_tokens.weight"].clone()
        save_file(saved, folder / "model.safetensors", {"format": "pt"})
    served = await start(folder, torch.float32 if tied else torch.bfloat16)
    yield served
    swap.stop_engine(served.engine)


async def push(served, new, old, logps, version=9):
    """Push as run.py does. `new`, `old`: weights by name. `logps`: the trainer's, of served.ids, by the new weights."""
    try:
        swap.serving[""] = swap.Version(version - 1)
        await swap.begin_load(served.engine, new)
        return await swap.push(served.engine, new, version, (served.ids, logps))
    except swap.PushError:
        if swap.served_step("") != version - 1:
            await swap.restore_weights(served.engine, old, version - 1)
        raise


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def change(model, seed):
    """Change the weights clearly: mean |dlogp| to the ones before is above 0.3 (asserted by the test)."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=g).to(p) * 0.05)


async def test_after_a_push_the_engine_agrees_with_the_trainer(served):
    for version in (1, 2, 3):
        before, old = weights(served.model), probe.token_logps(served.model, served.ids)
        change(served.model, version)
        new = probe.token_logps(served.model, served.ids)
        assert (new - old).abs().mean() > 0.3
        gap, pause = await push(served, weights(served.model), before, new, version)
        assert gap < BOUND and 0 < pause[1] - pause[0] < 10
        print(f"mean |dlogp| after push {version}: {gap:.4f}; to the weights before: {(new - old).abs().mean():.2f}")
        assert await served.engine.get_weight_version() == str(version)


async def test_a_push_that_lacks_a_tensor_is_refused(served):
    before, old = weights(served.model), probe.token_logps(served.model, served.ids)
    lacking = {k: w for k, w in before.items() if k != "model.layers.1.mlp.down_proj.weight"}
    with pytest.raises(swap.PushError, match="layers.1.mlp.down_proj"):  # the engine counts the tensors
        await push(served, lacking, before, old)
    got = await swap.prompt_logps(served.engine, served.ids)
    assert (got - old).abs().mean() < BOUND


async def test_on_a_cpu_weights_that_lack_a_tensor_are_never_served(served):
    """They are loaded into a copy of the model."""
    old = probe.token_logps(served.model, served.ids)
    changed = {name: w + 1 for name, w in weights(served.model).items() if "mlp.down_proj" not in name}
    await swap.begin_load(served.engine, changed)
    with pytest.raises(swap.PushError, match="layers.1.mlp.down_proj"):
        await swap.load_all(served.engine, changed, 9)
    got = await swap.prompt_logps(served.engine, served.ids)
    assert (got - old).abs().mean() < BOUND
    await swap.restore_weights(served.engine, weights(served.model), 9)


async def test_weights_whose_step_was_refused_are_replaced_by_the_next(served):
    """They are in the engine's second copy, but are not served."""
    refused = {name: w + 1 for name, w in weights(served.model).items()}
    await swap.begin_load(served.engine, refused)
    before, old = weights(served.model), probe.token_logps(served.model, served.ids)
    assert (await swap.prompt_logps(served.engine, served.ids) - old).abs().mean() < BOUND
    change(served.model, 7)
    await push(served, weights(served.model), before, probe.token_logps(served.model, served.ids))


async def test_a_push_that_disagrees_is_refused_and_the_old_weights_stay(served):
    before, old = weights(served.model), probe.token_logps(served.model, served.ids)
    other = AutoModelForCausalLM.from_config(served.model.config).to(torch.bfloat16)
    with pytest.raises(swap.PushError, match="disagree"):
        await push(served, weights(other), before, old)
    got = await swap.prompt_logps(served.engine, served.ids)
    assert (got - old).abs().mean() < BOUND


async def test_a_push_too_large_for_shared_memory_is_refused(served):
    before, old = weights(served.model), probe.token_logps(served.model, served.ids)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(swap.PushError, match="OSError"):
            await push(served, before, before, old)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    got = await swap.prompt_logps(served.engine, served.ids)
    assert (got - old).abs().mean() < BOUND


@pytest.mark.parametrize(("errored", "kind"), [(False, swap.PushError), (True, swap.EngineDied)])
def test_a_push_to_an_engine_that_has_died_is_not_the_pushs_fault(errored, kind):
    """Its turns must not be blamed for it: the program starts again, and trains on them."""
    for error in (OSError("no space"), swap.EngineDied("it hangs")):
        with (
            pytest.raises(swap.EngineDied if isinstance(error, swap.EngineDied) else kind),
            swap.push_errors(SimpleNamespace(errored=errored)),
        ):
            raise error


async def test_a_gpus_engine_is_not_resumed_with_a_mix_of_weights(monkeypatch):
    done = []

    class Engine:
        vllm_config = SimpleNamespace(device_config=SimpleNamespace(device_type="cuda"), lora_config=None)

        async def pause_generation(self, **_):
            done.append("pause")

        async def collective_rpc(self, *_, **__):
            raise RuntimeError("CUDA out of memory")

        async def resume_generation(self):
            done.append("resume")

    monkeypatch.setattr(swap, "serving", {"": swap.Version(0)})
    with pytest.raises(swap.EngineDied, match="only in part: RuntimeError: CUDA out of memory"):
        await swap.load_all(Engine(), {"w": torch.zeros(4)}, 1)
    assert done == ["pause"]


async def test_a_prompt_that_comes_while_the_engine_pauses_shares_no_cache(served, monkeypatch):
    """It may still be computed with the old weights. Neither earlier nor later prompts may use its KV cache."""
    salt = lambda: swap.salted({}, "ann")["cache_salt"]  # noqa: E731
    before, pause, during = salt(), served.engine.pause_generation, []

    async def pausing(**options):
        during.append(salt())
        await pause(**options)

    monkeypatch.setattr(served.engine, "pause_generation", pausing)
    await swap.load(served.engine, weights(served.model), 9)
    assert len({before, *during, salt()}) == 3


async def test_the_worker_does_not_grow_with_each_push(served):
    def used():  # bytes of the engine's processes; those of earlier engines have ended
        return sum(process.memory_info().rss for process in psutil.Process().children(recursive=True))

    pushed, sizes = weights(served.model), []
    for _ in range(3):
        for _ in range(20):
            await swap.load(served.engine, pushed, 9)
        sizes.append(used() / 2**20)
    print(f"MiB after 20, 40, 60 pushes: {sizes}")
    assert sizes[2] - sizes[1] < 10  # a copy of the model that stayed would be 2.5 MiB


async def test_a_running_answer_continues_across_a_swap(served):
    """It pauses for the swap, then completes, with the token spans of both versions."""
    from vllm import SamplingParams

    before = weights(served.model)
    version = int(await served.engine.get_weight_version())
    params = SamplingParams(max_tokens=300, ignore_eos=True, temperature=1.0, logprobs=0)

    async def generate():
        return [o async for o in served.engine.generate({"prompt_token_ids": served.ids}, params, f"run-{version}")][-1]

    running = asyncio.create_task(generate())
    await asyncio.sleep(0.3)
    change(served.model, 11)
    new = probe.token_logps(served.model, served.ids)
    await push(served, weights(served.model), before, new, version + 1)
    answer = (await running).outputs[0]
    assert len(answer.token_ids) == 300 and answer.finish_reason == "length"
    assert [s.version for s in answer.weight_versions] == [str(version), str(version + 1)]
    assert answer.weight_versions[-1].end == 300


async def test_a_new_answer_never_reads_the_old_weights_cache(served, tmp_path):
    """On a busy engine `reset_prefix_cache` does nothing; the recorder's salt must keep the caches separate."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    version = int(await served.engine.get_weight_version())

    async def load_adapter(user):
        pass

    values = {"engine": served.engine, "db": journal.open_journal(tmp_path / "j.db")}
    recorder = server.Recorder(SimpleNamespace(**values, owner_of=lambda user: "", load_adapter=load_adapter))
    final = {"output_kind": RequestOutputKind.FINAL_ONLY}
    busy = SamplingParams(max_tokens=250, ignore_eos=True, **final)
    short = SamplingParams(max_tokens=1, temperature=1.0, logprobs=20, **final)

    async def generate(params, name):
        prompt = {"prompt_token_ids": served.ids}
        return [o async for o in recorder.generate(prompt, params, f"{name}-{version}")][-1]

    running = asyncio.create_task(generate(busy, "busy"))
    await generate(short, "before")  # its prompt is in the prefix cache now
    before = weights(served.model)
    change(served.model, 13)
    new = probe.token_logps(served.model, served.ids)
    await push(served, weights(served.model), before, new, version + 1)
    version += 1
    got = (await generate(short, "after")).outputs[0].logprobs[0]
    with torch.no_grad():
        expected = served.model(torch.tensor([served.ids])).logits[0, -1].float().log_softmax(-1)
    assert not running.done(), "the engine was not busy: the test shows nothing"
    assert sum(abs(at.logprob - expected[i].item()) for i, at in got.items()) / len(got) < BOUND
    await running


async def test_experts_are_not_loaded_again_on_a_cpu(tmp_path):
    """vLLM's CPU backend packs them only once: afterwards they would be garbage."""
    settings = AutoConfig.from_pretrained(make_tiny_model(tmp_path)).to_dict()
    del settings["model_type"], settings["architectures"]
    config = AutoConfig.for_model("qwen3_moe", **settings, num_experts=4, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    served = await start(tmp_path, torch.float32)
    expected = await swap.prompt_logps(served.engine, served.ids)
    with pytest.raises(swap.PushError, match="mixture of experts again: use --lora_rank"):
        await push(served, weights(served.model), weights(served.model), expected)
    got = await swap.prompt_logps(served.engine, served.ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    swap.stop_engine(served.engine)
