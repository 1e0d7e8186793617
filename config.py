"""Every option of run.py with its default, and what of the machine goes where. run.py alone knows this file."""

import dataclasses
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

import clients
import policy


@dataclass(frozen=True)
class Config:
    model: str = ""  # folder of a Hugging Face model; empty: SmolLM2-135M-Instruct, prepared once
    name: str = "policy"  # the model name that clients ask for
    out: str = "out"  # journal, metrics and checkpoints
    host: str = "127.0.0.1"  # address to listen on; on any other than loopback a key is needed
    port: int = 8000  # port to listen on
    key: str = ""  # API keys, comma-separated, "key" or "user:key"; empty: none on loopback, else those in OUT/keys
    device: str = "auto"  # cpu, cuda or auto
    seed: int = 0  # of the sampler
    max_model_len: int = 8192  # longest prompt plus answer, in tokens
    max_seqs: int = 64  # answers generated at once
    tool_parser: str = "auto"  # vLLM's parser of this model's tool calls; auto: by its chat template; empty: none
    reasoning_parser: str = ""  # and of its thinking, which then goes out as reasoning_content; empty: none
    engine_memory: float = 0.0  # GiB: KV cache on a CPU, all of the engine on a GPU; 0: from what is there
    engine_cores: int = 0  # CPU cores for the engine, the rest for the trainer; 0: half
    batch_size: int = 2  # judged turns per step
    lr: float = 5e-5  # of Adam, constant
    beta1: float = 0.9  # of Adam
    beta2: float = 0.98  # of Adam
    grad_clip: float = 1.0  # largest gradient norm
    clip_low: float = 0.2  # PPO clip below
    clip_high: float = 0.28  # PPO clip above
    dual_clip: float = 3.0  # bound on the loss of a bad token
    kl: float = 0.1  # weight of the KL to the starting weights; 0: off
    w_rl: float = 1.0  # weight of the PPO-clip loss on the score; 0: learn from hints alone
    w_opd: float = 1.0  # weight of the distillation loss on the hint; 0: learn from scores alone
    opd_k: int = 20  # tokens at each place that teacher and student are compared on; 0: the sampled one
    teacher: str = "start"  # who reads the hint: start, the frozen first weights, or policy, those in training
    opd_clip: float = 1.0  # largest |log pi_T - log pi_0| that counts; 0: no bound
    baseline: str = "mean"  # of the reward: mean (running, per user), none (upstream's) or group (same prompt)
    max_staleness: int = 8  # samples from weights older than this many steps are dropped
    row_tokens: int = 256  # tokens per packed row, a micro-batch; a longer sample has a row of its own
    max_train_tokens: int = 16384  # longer samples are served, not trained on; memory is planned for one of this length
    steps: int = 0  # stop training after so many steps and go on serving; 0: never
    save_every: int = 50  # steps between checkpoints; one is always written at a clean stop
    keep: int = 3  # checkpoints that are kept, the newest
    user_share: float = 1.0  # largest part of a batch from one user; what is over it is dropped
    session_share: float = 1.0  # the same for one conversation
    truncated_share: float = 1.0  # the same for answers that max_tokens cut off; 0: none is trained on
    max_waiting: int = 10000  # turns that wait for the judge or the trainer; what comes on top is dropped
    judge_url: str = ""  # OpenAI-compatible endpoint of the judge; empty: the served model itself
    judge_model: str = ""  # its model name (the key is read from JUDGE_API_KEY)
    judge_style: str = "auto"  # chat; head, for a model too small to follow instructions; auto: head below 1 GiB
    votes: int = 3  # of a chat judge whose endpoint gives no log-probs
    expire: float = 3600.0  # seconds after which an answer that nobody went on from is dropped
    push_bound: float = 0.15  # largest mean |dlogp| between engine and trainer after a push
    print_client: str = ""  # print what to paste into a client (openclaw, openai, curl or open-webui), and end
    rollback: int = -1  # make the checkpoint of this step the current one, and end
    forget: str = ""  # remove this session from the journal, and end


def parse(argv: list[str]) -> Config:
    """Config from --key=value arguments. SystemExit names a key that does not exist or a value of the wrong type."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    values: dict[str, Any] = {}
    for arg in argv:
        name, given, text = arg.removeprefix("--").partition("=")
        if arg in ("--help", "-h"):
            meaning = dict(re.findall(r"^    (\w+): .*?  # (.*)$", Path(__file__).read_text(), re.MULTILINE))
            for f in fields.values():
                print(f"{f'  --{f.name}={f.default}':<28} {meaning[f.name]}")
            sys.exit(0)
        if not arg.startswith("--") or not given:
            sys.exit(f"{arg!r}: expected --key=value; python run.py --help lists the keys")
        if name not in fields:
            sys.exit(f"--{name}: no such key; python run.py --help lists them")
        try:
            values[name] = fields[name].type(text)
        except ValueError:
            sys.exit(f"--{name}={text}: expected {fields[name].type.__name__}")
    config = Config(**values)
    if config.w_rl <= 0 and config.w_opd <= 0:
        sys.exit("--w_rl and --w_opd: at least one must be above 0")
    if config.baseline not in ("mean", "none", "group"):
        sys.exit(f"--baseline={config.baseline}: expected mean, none or group")
    if config.judge_style not in ("auto", "chat", "head"):
        sys.exit(f"--judge_style={config.judge_style}: expected auto, chat or head")
    if config.teacher not in ("start", "policy"):
        sys.exit(f"--teacher={config.teacher}: expected start or policy")
    if config.print_client not in ("", *clients.CLIENTS):
        sys.exit(f"--print_client={config.print_client}: expected {', '.join(clients.CLIENTS)}")
    for name in ("batch_size", "votes", "keep", "row_tokens", "max_seqs"):
        if getattr(config, name) < 1:
            sys.exit(f"--{name}={getattr(config, name)}: expected at least 1")
    if config.expire <= 0:
        sys.exit(f"--expire={config.expire}: expected more than 0 seconds")
    for share in ("user_share", "session_share", "truncated_share"):
        least = 0 if share == "truncated_share" else 1 / config.batch_size
        if not least <= getattr(config, share) <= 1:
            sys.exit(f"--{share}={getattr(config, share)}: expected a part from {least:g} to 1")
    return config


def plan(config: Config, folder: Path) -> SimpleNamespace:
    """Device, cores and memory, decided once and printed: engine and trainer must not fight for the same core."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    cores = sorted(os.sched_getaffinity(0))
    n = min(config.engine_cores or max(1, len(cores) // 2), len(cores))
    weights = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 2**30  # GiB in bf16
    # bf16 where the processor is quicker with it, as every GPU is
    gflops = {} if device == "cuda" else policy.measure_gflops(folder, cores[n:] or cores, config.row_tokens)
    dtype = max(gflops, key=gflops.get) if gflops else torch.bfloat16
    width = dtype.itemsize
    row = policy.row_memory(folder, min(config.max_train_tokens, config.max_model_len), config.row_tokens, width)
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
        sys.exit(
            f"{needed:.1f} GiB needed, {free:.1f} free on {device}: a smaller --model, or --engine_memory or "
            "--max_train_tokens lower"
        )
    small = not config.judge_url and weights < 1
    return SimpleNamespace(
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
