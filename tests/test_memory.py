"""The memory plan: its counts against real models, its items by mode, and the error if a model doesn't fit."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig

import trainer
from config import Config
from durable.errors import UsageError
from evaluation.memory import shape
from machine import memory, plan


def setting(device="cuda", lora_rank=0, tokens=16384, width=2):
    return memory.Setting(device, width, lora_rank, tokens, 1024)


def test_parameter_counts_match_the_model_and_its_adapter(tiny_model):
    state = trainer.load_state(Config(lora_rank=4), None, tiny_model, "cpu", torch.float32)
    counted = memory.parameters(AutoConfig.from_pretrained(tiny_model), 4)
    assert tuple(map(sum, counted)) == (
        sum(p.numel() for p in state.start.parameters()),
        sum(m.numel() for m in state.masters),
    )
    assert tuple(map(sum, memory.parameters(shape("4B"), 0))) == (4_022_468_096, 0)  # Qwen3-4B


def test_an_adapter_needs_no_second_model_and_little_for_adam_and_the_snapshot():
    full, lora = memory.needs(shape("4B"), setting()), memory.needs(shape("4B"), setting(lora_rank=32))
    assert full[0]["starting weights"] == full[0]["policy"] == lora[0]["policy"] and "starting weights" not in lora[0]
    assert full[1]["snapshot"] == pytest.approx(63.4, abs=0.1), "1.5 times Adam, each tensor rounded up to a power of 2"
    assert sum(full[0].values()) > 100 and sum(lora[0].values()) < 40
    assert lora[0]["Adam"] + lora[0]["masters"] + lora[1]["snapshot"] < 2
    on_cpu, host = memory.needs(shape("0.5B"), setting("cpu"))
    assert {"snapshot", "processes", "engine"} < on_cpu.keys() and not host
    assert on_cpu["snapshot"] == pytest.approx(1.5 * on_cpu["Adam"])
    users = memory.needs(shape("4B"), dataclasses.replace(setting(lora_rank=32), adapters="user"))
    assert users[1]["idle adapters"] == pytest.approx(33 * lora[0]["adapter"])
    assert memory.needs(shape("0.5B"), setting("cpu", width=4))[0]["engine"] == pytest.approx(2 * on_cpu["engine"])
    assert full[0]["engine"] == pytest.approx(full[0]["policy"] + 2)


def test_a_packed_row_needs_no_more_memory_than_the_longest_sample():
    for name in ("0.5B", "4B"):
        rows = memory.free_row_tokens(shape(name), 16384)
        longest = setting(tokens=16384)
        least = memory.row_numbers(shape(name), dataclasses.replace(longest, row_tokens=1))
        assert memory.row_numbers(shape(name), dataclasses.replace(longest, row_tokens=rows)) == least
        assert memory.row_numbers(shape(name), dataclasses.replace(longest, row_tokens=4 * rows)) > least


def test_the_advice_names_options_that_fit():
    advice = lambda name, free, **options: plan.what_fits(shape(name), setting(**options), 0, free, 64)  # noqa: E731
    assert advice("4B", 79).startswith("--lora_rank=32 needs ")
    assert advice("4B", 34).startswith("--lora_rank=32 --max_train_tokens=8192 needs ")
    assert advice("4B", 34, lora_rank=16).startswith("--max_train_tokens=8192 needs ")
    assert advice("0.5B", 21, device="cpu").startswith("--lora_rank=32 needs ")
    assert advice("8B", 15) == "a smaller --model is needed"
    large_cache = plan.what_fits(shape("0.5B"), setting("cpu", lora_rank=32), 100, 21, 64)
    assert large_cache == "a smaller --engine_memory is needed"


def test_a_tenth_of_a_gpu_stays_free():
    there = setting("cuda", lora_rank=32)
    least = sum(memory.needs(shape("0.5B"), there)[0].values()) + 1  # with the smallest KV cache
    for free, fits in ((least / 0.89, True), (least / 0.91, False)):
        device, host = plan.with_cache(shape("0.5B"), there, free, 0)
        assert plan.fits(device, host, there, free, 64) == fits
    assert plan.fits({"all": 10.0}, {}, setting("cpu"), 10.0, 0.0)


def test_positions_that_vllm_and_transformers_compute_differently_are_refused():
    """Phi-3.5: with a long context, vLLM scales all positions, transformers only those of long texts."""
    scaling = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [8.0] * 48}
    phi = AutoConfig.for_model("phi3", original_max_position_embeddings=4096, rope_scaling=scaling)
    plan.check_positions(phi, 4096)
    with pytest.raises(UsageError, match="needs --max_model_len=4096 or less"):
        plan.check_positions(phi, 8192)
    plan.check_positions(shape("4B"), 32768)


def test_the_kv_cache_has_space_for_one_request():
    for name, layers, heads, size in (("4B", 36, 8, 128), ("135M", 30, 3, 64)):
        long = dataclasses.replace(setting("cpu"), context=32768)
        assert memory.least_cache(shape(name), long) == 2 * layers * (32768 + 256) * heads * size * 2 / 2**30
        for engine_memory, device in ((0, "cpu"), (0, "cuda"), (1, "cuda")):
            there = dataclasses.replace(long, device=device, lora_rank=16)
            cache = plan.with_cache(
                shape(name), there, sum(memory.needs(shape(name), there)[0].values()), engine_memory
            )
            assert cache[0]["KV cache"] >= memory.least_cache(shape(name), long)
    windows = AutoConfig.for_model("gemma3_text", num_hidden_layers=6, num_key_value_heads=1, head_dim=64)
    full, sliding = windows.layer_types.count("full_attention"), windows.sliding_window + 8192
    assert (full, windows.layer_types.count("sliding_attention")) == (1, 5)
    tokens = 32768 + 5 * sliding + 6 * 256
    assert memory.least_cache(windows, long) == 2 * tokens * 64 * 2 / 2**30


def test_the_kv_cache_of_other_layers_is_not_counted():
    long = dataclasses.replace(setting("cpu"), context=32768)
    attention, kinds = 6, ["conv"] * 10 + ["full_attention"] * 6
    lfm2 = AutoConfig.for_model("lfm2", num_hidden_layers=16, layer_types=kinds)
    size = lfm2.hidden_size // lfm2.num_attention_heads
    numbers = 2 * attention * (32768 + 256) * lfm2.num_key_value_heads * size
    assert memory.least_cache(lfm2, long) == numbers * 2 / 2**30
    assert [memory.least_cache(AutoConfig.for_model(name), long) for name in ("mamba", "deepseek_v3")] == [0, 0]
    whole, window = (AutoConfig.for_model("mistral", sliding_window=w) for w in (None, 4096))
    assert memory.least_cache(window, long) * 2.6 < memory.least_cache(whole, long)


def test_an_engine_memory_that_is_too_small_for_one_request_is_refused(tmp_path):
    shape("0.5B").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"--engine_memory=0.1: a request of --max_model_len=32768 tokens needs a KV"):
        plan.make_plan(Config(device="cpu", engine_memory=0.1, max_model_len=32768), tmp_path)


def test_free_memory_is_limited_by_the_container(tmp_path):
    free = plan.free_memory(tmp_path)  # no limit
    for name, text in (
        ("max", f"{1 << 30}\n"),
        ("current", f"{900 << 20}\n"),
        ("stat", f"inactive_file {60 << 20}\nactive_file {40 << 20}\n"),
    ):
        (tmp_path / f"memory.{name}").write_text(text)
    assert plan.free_memory(tmp_path) == (1024 - 900 + 100) / 1024 < free
    (tmp_path / "memory.max").write_text("max\n")
    assert plan.free_memory(tmp_path) == pytest.approx(free, rel=0.2)


def test_a_model_that_does_not_fit_is_refused_with_a_list_of_its_needs(tmp_path):
    shape("8B").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"GiB \(policy .*Adam .*\) needed, [\d.]+ free on cpu: a smaller --model"):
        plan.make_plan(Config(device="cpu"), tmp_path)
