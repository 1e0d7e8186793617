"""The plan of the machine: device, cores, memory, and the faster dtype. Decided at the start, and printed."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from config import Config
from durable.errors import UsageError


@dataclass(frozen=True)
class Plan:
    device: str  # cpu or cuda
    dtype: torch.dtype  # of the trainer's arithmetic
    gflops: dict[torch.dtype, float]  # as measured; empty on a GPU
    engine_cores: list[int]
    trainer_cores: list[int]
    engine: float  # GiB: KV cache on a CPU, all of the engine on a GPU
    needed: float  # GiB in all
    free: float  # GiB
    judge_style: str  # head or chat

    def __str__(self) -> str:
        gflops = ", ".join(f"{str(dtype)[6:]} {value:.0f}" for dtype, value in self.gflops.items())
        return (
            f"device    {self.device}; training in {self.dtype}{f', measured GFLOP/s: {gflops}' if gflops else ''}\n"
            f"cores     {self.engine_cores} engine, {self.trainer_cores} trainer\n"
            f"memory    {self.needed:.1f} GiB needed, {self.free:.1f} free; engine {self.engine:.1f}"
        )


def plan(config: Config, folder: Path) -> Plan:
    """The plan for the model in `folder`: engine and trainer must not compete for the same core.

    UsageError where there is too little memory."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    cores = sorted(os.sched_getaffinity(0))
    n = min(config.engine_cores or max(1, len(cores) // 2), len(cores))
    weights = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 2**30  # GiB in bf16
    # bf16 where the processor is quicker with it, as every GPU is
    gflops = {} if device == "cuda" else measure_gflops(folder, cores[n:] or cores, config.row_tokens)
    dtype = max(gflops, key=gflops.get) if gflops else torch.bfloat16
    width = dtype.itemsize
    row = row_memory(folder, min(config.max_train_tokens, config.max_model_len), config.row_tokens, width)
    # policy and its frozen start, the pushed and the last good copy; fp32 masters, gradients and Adam's two moments
    trainer = weights * (2 * width / 2 + 2 + 2 * 4) + row + 0.5
    host = 2 * 3 * weights  # masters and moments as they were before the step, on the CPU
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0] / 2**30
        engine = config.engine_memory or 0.9 * free - trainer
        needed = trainer + max(engine, 1.3 * weights + 1)
    else:
        free = psutil.virtual_memory().available / 2**30  # with the page cache, which is given up when asked for
        engine = config.engine_memory or min(4.0, max(0.5, (free - trainer - host - 2 * weights) / 4))
        needed = trainer + host + engine + 2 * weights + 2.0  # the engine's weights, and its processes
    if needed > free:
        raise UsageError(
            f"{needed:.1f} GiB needed, {free:.1f} free on {device}: a smaller --model, or --engine_memory or "
            "--max_train_tokens lower"
        )
    small = not config.judge_url and weights < 1
    return Plan(
        device=device,
        dtype=dtype,
        gflops=gflops,
        engine_cores=cores[:n],
        trainer_cores=cores[n:] or cores,
        engine=engine,
        needed=needed,
        free=free,
        judge_style=config.judge_style if config.judge_style != "auto" else "head" if small else "chat",
    )


def row_memory(folder: Path, tokens: int, row_tokens: int, width: int) -> float:
    """GiB for the forward and backward pass of the longest row, `width` bytes a number: of so many `tokens`, with each
    layer's input kept and the rest recomputed, or of at most `row_tokens` with all of it kept (see `trainer.update`).
    Fitted to Llamas: SmolLM2-135M, 8,000 tokens, 2.4 GiB."""
    c = AutoConfig.from_pretrained(folder).get_text_config()
    inner = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    layer = 10 * (c.hidden_size + (max(inner) if isinstance(inner, list) else inner))
    long = tokens * (4 * c.hidden_size * c.num_hidden_layers + layer)  # an input, and what malloc leaves between them
    short = min(tokens, row_tokens) * layer * c.num_hidden_layers
    head = 2 * c.vocab_size * c.hidden_size  # its gradient, from a chunk of places and in all (see `grpo.token_logps`)
    logits = 4 * 256 * c.vocab_size
    return ((max(long, short) + head) * width + 6 * logits) / 2**30


def measure_gflops(folder: Path, cores: list[int], tokens: int) -> dict[torch.dtype, float]:
    """GFLOP/s of bf16 and fp32 on the trainer's cores, for the forward and backward pass of one of the model's MLP
    products. Which of the two is faster, and by how much, differs from processor to processor (0.5x to 4x)."""
    c = AutoConfig.from_pretrained(folder).get_text_config()
    wide = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    wide = max(wide) if isinstance(wide, list) else wide

    def once(dtype: torch.dtype) -> float:
        x = torch.randn(tokens, c.hidden_size, dtype=dtype, requires_grad=True)  # (L, D)
        w = torch.randn(wide, c.hidden_size, dtype=dtype, requires_grad=True)  # (I, D)
        seconds = []
        for _ in range(7):
            began = time.perf_counter()
            F.linear(x, w).backward(torch.ones(tokens, wide, dtype=dtype))
            seconds.append(time.perf_counter() - began)
        return 6 * tokens * wide * c.hidden_size / min(seconds) / 1e9

    # A thread of its own, as the trainer's will be: core binding and the OpenMP team belong to a thread.
    with ThreadPoolExecutor(1, "measure", bind_thread, (cores,)) as thread:
        return {dtype: thread.submit(once, dtype).result() for dtype in (torch.bfloat16, torch.float32)}


def bind_thread(cores: list[int]) -> None:
    """Keep this thread, and the OpenMP team it will start, on its cores and at a lower priority than serving."""
    os.sched_setaffinity(0, cores)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
    torch.set_num_threads(len(cores))
