"""How the machine is used: device, cores, memory, and the faster dtype. Decided and printed at the start."""

import math
import os
import threading
import timeit
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from transformers import AutoConfig, PretrainedConfig

from config import Config
from durable.errors import UsageError
from machine import memory

LAST_DTYPE = "last_dtype"  # a file in --out: the dtype of the last start


@dataclass(frozen=True)
class Plan:
    device: str  # cpu or cuda
    dtype: torch.dtype  # that the engine and the trainer compute in
    engine_cores: list[int]
    trainer_cores: list[int]
    engine: float  # GiB: KV cache on a CPU, the whole engine on a GPU
    row_tokens: int  # of a packed row
    judge_style: str  # head or chat
    report: str  # what is printed at the start


def make_plan(config: Config, folder: Path) -> Plan:
    """The plan for the model in `folder`. Engine and trainer have separate cores, unless the engine takes all.

    UsageError if there is too little memory; it names options that would fit."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device=cuda: torch finds no GPU")
    cores = sorted(os.sched_getaffinity(0))
    n = min(config.engine_cores or max(1, len(cores) // 2), len(cores))
    engine_cores, trainer_cores = cores[:n], cores[n:] or cores
    shape, longest = AutoConfig.from_pretrained(folder), min(config.max_train_tokens, config.max_model_len)
    row_tokens = config.row_tokens or (256 if device == "cpu" else memory.free_row_tokens(shape, longest))
    check_positions(shape, config.max_model_len)
    # bf16 if it is faster than fp32, as on every GPU
    gflops = {} if device == "cuda" else measure_gflops(folder, trainer_cores, row_tokens)
    # vLLM's CPU kernel for gated delta nets (Qwen3-Next) takes bf16 alone.
    gated = "linear_attention" in (getattr(shape.get_text_config(), "layer_types", None) or ())
    dtype = faster_dtype(gflops, Path(config.out) / LAST_DTYPE) if gflops and not gated else torch.bfloat16
    host_free = free_memory()
    free = torch.cuda.mem_get_info()[0] / 2**30 if device == "cuda" else host_free
    setting = memory.Setting(
        device, dtype.itemsize, config.lora_rank, longest, row_tokens, config.adapters, config.max_model_len
    )
    least = memory.least_cache(shape, setting)
    if device == "cpu" and 0 < config.engine_memory < least:
        why = f"a request of --max_model_len={config.max_model_len} tokens needs a KV cache of {least:.2f} GiB"
        raise UsageError(f"--engine_memory={config.engine_memory:g}: {why}")
    needed, host = with_cache(shape, setting, free, config.engine_memory)
    if not fits(needed, host, setting, free, host_free):
        where = (
            f"{free:.1f} free on {device}"
            + (", of which a tenth must stay free" if device == "cuda" else "")
            + (f", {host_free:.1f} on the host" if host else "")
        )
        needs = " and ".join(memory.itemised(sizes) for sizes in (needed, host) if sizes)
        raise UsageError(f"{needs} needed, {where}: {what_fits(shape, setting, config.engine_memory, free, host_free)}")
    small = not config.judge_url and 2 * needed["policy"] / dtype.itemsize < 1  # GiB of weights in bf16
    speeds = ", ".join(f"{str(dtype)[6:]} {value:.0f}" for dtype, value in gflops.items())
    measured = f", measured GFLOP/s: {speeds}" if speeds else ""
    report = [
        f"device    {device}; serving and training in {str(dtype)[6:]}{measured}",
        f"cores     {engine_cores} engine, {trainer_cores} trainer",
        f"memory    {memory.itemised(needed)}; free {free:.1f}",
    ]
    report += [f"host      {memory.itemised(host)}"] if host else []
    return Plan(
        device=device,
        dtype=dtype,
        engine_cores=engine_cores,
        trainer_cores=trainer_cores,
        engine=needed["KV cache"] + (needed["engine"] if device == "cuda" else 0),
        row_tokens=row_tokens,
        judge_style=config.judge_style if config.judge_style != "auto" else "head" if small else "chat",
        report="\n".join(report),
    )


def check_positions(shape: PretrainedConfig, context: int) -> None:
    """UsageError if vLLM and transformers would compute the model's positions differently (Phi-3.5, Phi-4-mini). With a
    longer context than the original one, vLLM scales the positions of all texts, transformers those of long ones."""
    rope = getattr(shape.get_text_config(), "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or math.inf
    if rope.get("rope_type") == "longrope" and context > original:
        why = "beyond that, engine and trainer would compute its positions differently"
        raise UsageError(f"--max_model_len={context}: this model needs --max_model_len={original} or less; {why}")


def free_memory(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Free GiB on the host, with the page cache, which the kernel can free. In a container with a limit (cgroup v2), no
    more than the limit allows."""
    free = psutil.virtual_memory().available
    limit = (group / "memory.max").read_text().strip() if (group / "memory.max").exists() else "max"
    if limit != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"]) - int(stat["active_file"])
        free = min(free, int(limit) - used)
    return free / 2**30


def with_cache(
    shape: PretrainedConfig, setting: memory.Setting, free: float, engine_memory: float
) -> tuple[memory.Sizes, memory.Sizes]:
    """`memory.needs` and the KV cache. By default the cache gets a quarter of the remaining memory on a CPU, at most
    4 GiB, and nearly all of it on a GPU, but always enough for one request."""
    device, host = memory.needs(shape, setting)
    left, least = free - sum(device.values()), max(0.5, memory.least_cache(shape, setting))
    if setting.device == "cpu":
        cache = engine_memory or max(least, min(4.0, left / 4))
    else:
        cache = max(1.0, least, engine_memory - device["engine"] if engine_memory else left - 0.1 * free)
    return device | {"KV cache": cache}, host


def fits(device: memory.Sizes, host: memory.Sizes, setting: memory.Setting, free: float, host_free: float) -> bool:
    """A tenth of a GPU is left free: for what fragmentation and the engine's reload of its largest tensor take."""
    most = free if setting.device == "cpu" else 0.9 * free
    return sum(device.values()) <= most + 1e-6 and sum(host.values()) <= host_free


def what_fits(
    shape: PretrainedConfig, setting: memory.Setting, engine_memory: float, free: float, host_free: float
) -> str:
    """Options with which the model fits, for a message."""
    if options := fitting_options(shape, setting, engine_memory, free, host_free):
        return options
    if engine_memory and fitting_options(shape, setting, 0.0, free, host_free):
        return "a smaller --engine_memory is needed"
    if fitting_options(shape, replace(setting, context=0), engine_memory, free, host_free):
        return "a smaller --max_model_len is needed"
    return "a smaller --model is needed"


def fitting_options(
    shape: PretrainedConfig, setting: memory.Setting, engine_memory: float, free: float, host_free: float
) -> str:
    """The first options with which the model fits, of those for its adapter and its longest sample; "" if none do."""
    for rank in (0, 32) if not setting.lora_rank else (setting.lora_rank,):
        for tokens in [n for n in (setting.tokens, 8192, 4096, 2048, 1024) if n <= setting.tokens]:
            row_tokens = min(setting.row_tokens, memory.free_row_tokens(shape, tokens))
            other = replace(setting, lora_rank=rank, tokens=tokens, row_tokens=row_tokens)
            device, host = with_cache(shape, other, free, engine_memory)
            if fits(device, host, other, free, host_free):
                options = [f"--lora_rank={rank}"] if rank != setting.lora_rank else []
                options += [f"--max_train_tokens={tokens}"] if tokens != setting.tokens else []
                given = setting.row_tokens > memory.free_row_tokens(shape, setting.tokens)  # by an option
                options += [f"--row_tokens={row_tokens}"] if given else []
                return f"{' '.join(options)} needs {sum(device.values()):.1f} GiB"
    return ""


def measure_gflops(folder: Path, cores: list[int], tokens: int) -> dict[torch.dtype, float]:
    """GFLOP/s of bf16 and fp32 on the trainer's cores, for the forward and backward pass of one of the model's MLP
    matrices. Which is faster, and by how much, depends on the processor (0.5x to 4x). The engine's ratio is not the
    same, but where bf16 is emulated, engine and trainer are both several times faster in fp32."""
    c = AutoConfig.from_pretrained(folder).get_text_config()
    wide = memory.layer_numbers(c) // 10 - c.hidden_size

    def once(dtype: torch.dtype) -> float:
        x = torch.randn(tokens, c.hidden_size, dtype=dtype, requires_grad=True)  # (L, D)
        w = torch.randn(wide, c.hidden_size, dtype=dtype, requires_grad=True)  # (I, D)
        ones = torch.ones(tokens, wide, dtype=dtype)
        seconds = min(timeit.repeat(lambda: F.linear(x, w).backward(ones), number=1, repeat=7))
        return 6 * tokens * wide * c.hidden_size / seconds / 1e9

    # In a thread of its own, as the trainer's will be: core binding and OpenMP team belong to a thread.
    with ThreadPoolExecutor(1, "measure", bind_thread, (cores,)) as thread:
        return {dtype: thread.submit(once, dtype).result() for dtype in (torch.bfloat16, torch.float32)}


def faster_dtype(gflops: dict[torch.dtype, float], last: Path) -> torch.dtype:
    """The faster dtype. A restart keeps the one in the file `last`, unless the other is twice as fast: measurements
    vary, and the same weights would give other log-probs in the other dtype."""
    used = last.read_text() if last.exists() else ""
    return max(gflops, key=lambda dtype: gflops[dtype] * (2 if str(dtype) == used else 1))


def bind_thread(cores: list[int]) -> None:
    """Bind this thread, and the OpenMP team it will start, to these cores, at a lower priority than serving."""
    os.sched_setaffinity(0, cores)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
    torch.set_num_threads(len(cores))
