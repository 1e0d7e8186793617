"""The planned memory for models of a given shape, and the measured one.

    python -m evaluation.memory                                  the table of docs/lora.md, for GPUs
    python -m evaluation.memory --measure=135M --lora_rank=16    train a random model here: planned and measured peak

The measured peak is the memory of all of the program's processes (PSS) while it trains on two turns of --tokens, the
longest that memory is planned for.
"""

import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import httpx
import psutil
import torch
import tyro
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from durable.model import model_folder
from machine import memory
from machine.plan import fits, with_cache

# family, hidden size, MLP size, layers, heads, key-value heads, head size, vocabulary, tied embeddings
SHAPES = {
    "60M": ("llama", 512, 1536, 12, 8, 2, 64, 49152, True),
    "135M": ("llama", 576, 1536, 30, 9, 3, 64, 49152, True),  # SmolLM2-135M
    "0.5B": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),  # Qwen2.5-0.5B
    "4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),  # Qwen3-4B
    "8B": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),  # Qwen3-8B
}
GPUS = (24, 48, 80)  # GiB


def shape(name: str) -> PretrainedConfig:
    family, hidden, inner, layers, heads, kv_heads, head, vocabulary, tied = SHAPES[name]
    return AutoConfig.for_model(
        family,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    )


def table() -> str:
    """Markdown: GiB on one GPU without the KV cache, GiB left for the KV cache on each card, and GiB on the host."""
    caches = " | ".join(f"KV cache on {gpu} GiB" for gpu in GPUS)
    lines = [
        f"| model | training | longest sample | without KV cache | {caches} | host |",
        "|---" * (5 + len(GPUS)) + "|",
    ]
    for name, rank in product(("0.5B", "4B", "8B"), (0, 32)):
        for tokens in (16384, 4096, 2048) if rank else (16384,):
            c = shape(name)
            setting = memory.Setting("cuda", 2, rank, tokens, memory.free_row_tokens(c, tokens))
            needed, host = (sum(sizes.values()) for sizes in memory.needs(c, setting))
            plans = [(gpu, with_cache(c, setting, gpu, 0.0)[0]) for gpu in GPUS]
            cells = [f"{p['KV cache']:.0f}" if fits(p, {}, setting, gpu, 0.0) else "no" for gpu, p in plans]
            training = f"`--lora_rank={rank}`" if rank else "full"
            lines.append(f"| {name} | {training} | {tokens} | {needed:.0f} | {' | '.join(cells)} | {host:.0f} |")
    return "\n".join(lines)


def make_model(name: str, folder: Path) -> None:
    """Write a model of this shape with random weights and SmolLM2's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder(""))
    c = shape(name)
    c.eos_token_id, c.bos_token_id, c.pad_token_id = tokenizer.eos_token_id, None, tokenizer.pad_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(c, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def held(pid: int) -> float:
    """Memory of a process and its descendants in GiB, with shared memory counted once."""
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total / 2**30


def train_two_steps(program: subprocess.Popen, url: str, tokens: int) -> None:
    """Let the program train on two turns of `tokens` tokens, one per step, each with a correction."""
    with httpx.Client(base_url=url, timeout=600) as http:
        while program.poll() is None:
            try:
                http.get("/health").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(1)
        for step in (1, 2):
            question = {"role": "user", "content": f"{step} " + "word " * (tokens - 160)}
            body = {"model": "policy", "messages": [question], "max_tokens": 64, "ignore_eos": True}
            answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
            rating = {"completion_id": answer["id"], "score": -1, "text": "Answer in one short sentence, please."}
            http.post("/v1/feedback", json=rating).raise_for_status()
            while (status := http.get("/status").json())["step"] < step:
                if status["training"] != "on":
                    raise RuntimeError(f"no step was taken: {status}")
                time.sleep(0.5)


def measure(options: "Options") -> None:
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w+") as log:
        make_model(options.measure, Path(folder) / "model")
        command = [sys.executable, "run.py", f"--model={folder}/model", f"--out={folder}/out", "--batch_size=1"]
        command += [f"--port={options.port}", f"--max_model_len={options.tokens}", f"--lora_rank={options.lora_rank}"]
        command += ["--judge_style=chat", "--engine_memory=0.5"]  # the turns are rated, so the judge isn't asked
        program, url, peak = subprocess.Popen(command, stdout=log, stderr=log), f"http://127.0.0.1:{options.port}", 0.0
        talking = ThreadPoolExecutor(1).submit(train_two_steps, program, url, options.tokens)
        while not talking.done():
            peak = max(peak, held(program.pid)) if program.poll() is None else peak
            time.sleep(0.3)
        program.send_signal(signal.SIGTERM)
        program.wait(120)
        talking.result()  # an error of its own
        planned = re.search(r"memory +(([\d.]+) GiB.*)", Path(f"{folder}/log").read_text())
        if not planned:
            sys.exit(Path(f"{folder}/log").read_text()[-2000:])
        print(f"{options.measure}, --lora_rank={options.lora_rank}, {options.tokens} tokens: planned {planned[1]}")
        print(f"measured peak {peak:.1f} GiB, {100 * (float(planned[2]) / peak - 1):+.0f} % planned")


@dataclass(frozen=True)
class Options:
    measure: str = ""  # a shape: 60M, 135M, 0.5B, 4B, 8B; empty: print the table
    lora_rank: int = 0  # as for run.py
    tokens: int = 2048  # length of the turns that are trained on
    port: int = 8200


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__, use_underscores=True)
    measure(options) if options.measure else print(table())
