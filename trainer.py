"""Training: fp32 masters, Adam, one step on a batch, snapshot and restore, checkpoints.

The served weights and those that the trainer computes with have the same bf16 values. fp32 masters accumulate updates
that are too small for bf16, and `dithered` rounds them so that each update is served in full, on average. With LoRA
only the adapter has masters and is trained.
"""

import pickle
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

import distill
import grpo
import lora
from config import Config
from durable import guard
from durable.errors import UsageError
from durable.journal import Turn
from durable.model import load_model
from machine.arithmetic import check_arithmetic
from probe import Probe, make_probe

# Steps until the learning rate is reached. Adam's first updates move every weight by the whole learning rate, its later
# ones by a fraction of it: without a warm-up, the first complaints led to answers of five words about nothing.
WARMUP = 5
ROLL_BACK = "; python -m durable.admin rollback goes back to an earlier checkpoint"


class Stopped(Exception):
    """The program is stopping. The step was abandoned between two rows, and no weight has changed."""


@dataclass
class State:
    """Everything that training changes, and the frozen starting weights that it is compared with."""

    tokenizer: PreTrainedTokenizerBase  # goes into checkpoints; the folder it came from may be gone by then
    policy: PreTrainedModel  # the model in training; whatever its dtype, its values are the served bf16 ones
    start: PreTrainedModel  # the frozen starting weights: for the KL, the teacher, and a small model's judge
    initial_masters: list[Tensor]  # the masters before the first step, for a return to step 0
    masters: list[Tensor]  # fp32, in the order of `trained`
    adam: torch.optim.Adam
    probe: Probe
    packs: bool  # may samples share a row? See machine/arithmetic.py
    lora_rank: int  # 0: full training
    probed: dict[str, float] = field(default_factory=dict)  # `probe.measure` of the weights that are served
    kept: list[Tensor] = field(default_factory=list)  # the last `snapshot` of `mutable`, on the CPU
    owner: str = ""  # the user whose adapter it is; "": shared
    step: int = 0
    baselines: dict[str, float] = field(default_factory=dict)  # running mean reward, see grpo.baseline_key
    stopping: threading.Event = field(default_factory=threading.Event)  # set by the event loop, read between rows


@dataclass
class Lesson:
    """A judged answer, its advantage and its hints."""

    turn: Turn
    adv: float
    hinted: list[list[int]]  # the prompt with each candidate hint
    hints: list[str] = field(default_factory=list)  # these candidates as texts
    used: int = 0  # the candidate that it was trained on

    @property
    def answer(self) -> grpo.Answer:
        """The sample to train on. An answer that is trained on its hint only may have been sampled in any way. So its
        recorded log-probs are not used, and its temperature is 1."""
        t = self.turn
        old_logps, temperature = (None, 1.0) if t.no_rl else (t.logprobs, t.temperature)
        return grpo.Answer(t.prompt_ids, t.response_ids, old_logps, self.adv, temperature)


# ---- one step ----


def update(config: Config, state: State, lessons: Sequence[Lesson]) -> dict[str, float]:
    """One step of Adam on a batch, row by row. Returns the step's metrics (docs/method.md has a table of them).

    guard.Refused from `guard.check_batch`, Stopped if `state.stopping` is set. Both are raised before a master changes.
    """
    turns = [lesson.turn for lesson in lessons]
    n, sums, dlogp_max = sum(len(t.response_ids) for t in turns), Counter[str](), 0.0
    size = max(len(turns), config.batch_size)  # a batch that is not full weighs less
    per_token = torch.tensor([1 / size / len(t.response_ids) for t in turns], device=state.policy.device)  # (B,)
    answers = [lesson.answer for lesson in lessons]
    for row in grpo.collate(answers, *row_limits(config, state), state.policy.device):
        if state.stopping.is_set():
            raise Stopped
        recompute_activations(state.policy, row["ids"].numel() > config.row_tokens)
        loss, of_row = row_loss(config, state, row, lessons)
        # The mean over answers of each answer's mean over tokens: a mean over all tokens would favour long answers. The
        # factor T: a gradient through logits / T is 1 / T times as large, so turns with a low T would dominate.
        (loss * per_token[row["sample"]] * row["temperature"]).sum().backward()  # to the masters, see `optimizer`
        dlogp_max = max(dlogp_max, of_row.pop("dlogp_max"))
        sums.update(of_row)  # a Counter adds
    recompute_activations(state.policy, False)
    norm = torch.nn.utils.clip_grad_norm_(state.masters, config.grad_clip).item()
    # The other turns' recorded log-probs are not used (see `Lesson.answer`), so their |dlogp| is 0.
    n_sampled = max(1, sum(len(t.response_ids) for t in turns if not t.no_rl))
    dlogp = sums["dlogp"] / n_sampled
    guard.check_batch(sums["loss"] / n, norm, dlogp)
    for group in state.adam.param_groups:
        group["lr"] = state.adam.defaults["lr"] * min(1.0, (state.step + 1) / WARMUP)
    state.adam.step()
    state.adam.zero_grad()
    sync_bf16(state)
    return {
        "tokens": n,
        "grad_norm": norm,
        **{k: sums[k] / n for k in ("loss", "kl", "nll", "clipped")},
        "dlogp": dlogp,
        "dlogp_max": dlogp_max,
        "hinted": sum(bool(lesson.hinted) for lesson in lessons) / len(turns),
        "teacher_gap": sums["gap"] / max(1, sums["n_hinted"]),
        "repeated": sum(grpo.repetition(t.response_ids) for t in turns) / len(turns),
    }


def recompute_activations(policy: PreTrainedModel, on: bool) -> None:
    """Switch this on for a long row: the backward pass then computes the activations again, which takes less memory and
    a third more time. Switch it off before the model generates: with it on, there is no KV cache."""
    if on and not policy.is_gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        # Only these layers must be in training mode; in the others it would switch dropout on. (The layers of OPT and
        # XGLM apply dropout themselves, so their long rows still get it.)
        for module in policy.modules():
            module.training = isinstance(module, GradientCheckpointingLayer)
    elif not on and policy.is_gradient_checkpointing:
        policy.eval().gradient_checkpointing_disable()
        policy.disable_input_require_grads()  # `enable` adds a hook, which `disable` doesn't always remove


def row_limits(config: Config, state: State) -> tuple[int, int]:
    """The most tokens in a packed row, and in a tree with branches. Memory is planned for a sample as long as such a
    tree. A tree's mask replaces the model's own mask, so the tree must fit the model's attention window."""
    if not state.packs:
        return 1, 0
    shape = state.policy.config.get_text_config()
    windows = [getattr(shape, name, None) for name in ("sliding_window", "attention_chunk_size")]
    tree = min(config.max_train_tokens, config.max_model_len, *filter(None, windows))
    return min(config.row_tokens, tree), tree


def row_loss(config: Config, state: State, row: grpo.Row, lessons: Sequence[Lesson]) -> tuple[Tensor, dict[str, float]]:
    """L = w_rl L_rl + w_opd L_opd + kl L_kl per response token (N,), and metrics of the row: sums, and dlogp_max."""
    hinted = any(lessons[i].hinted for i in row["sample"].unique().tolist())
    clip = (config.clip_low, config.clip_high)
    head, start_head = (m.get_output_embeddings().weight for m in (state.policy, state.start))  # (V, D)
    hidden, ids = grpo.response_hidden(state.policy, row), row["target"][:, None]  # (N, D), (N, 1)
    if hinted:
        # First the sampled token, for L_rl, then the tokens for L_opd: with opd_k = 0, the sampled one again.
        likely = distill.top_k(hidden.detach(), head, config.opd_k) if config.opd_k else ids  # (N, K)
        ids = torch.cat([ids, likely], 1)  # (N, 1 + K)
    if config.kl or hinted:
        start_hidden, candidates = read_start(config, state, row, lessons)  # (N, D), for each sample and hint (T, D)
        # (N, 1 or 1 + K), (N, 1 or 1 + K), (N,)
        logps, plain, kl = grpo.compare_with_start(hidden, head, start_hidden, start_head, ids)
    else:
        logps = grpo.token_logps(hidden, head, ids)  # (N, 1)
    logp = logps[:, 0]
    # NaN marks the tokens of turns that are trained on their hint only: for them rho is 1 and the advantage 0.
    old_logp = torch.where(row["old_logp"].isnan(), logp.detach(), row["old_logp"])  # (N,)
    loss = config.w_rl * grpo.ppo_clip_loss(logp, old_logp, row["adv"], *clip, config.dual_clip)  # (N,)
    log_ratio = logp.detach() - old_logp  # (N,)
    ratio = log_ratio.exp()  # (N,)
    sums = {
        "nll": -logp.sum().item(),
        "dlogp": log_ratio.abs().sum().item(),
        "dlogp_max": log_ratio.abs().max().item(),
        "clipped": ((ratio < 1 - clip[0]) | (ratio > 1 + clip[1])).sum().item(),
    }
    if hinted:
        student = logps[:, 1:].detach()  # (N, K)
        teacher, hint_mask, used = distill.teacher_logps(start_head, row, likely, candidates, plain[:, 1:])
        for i, candidate in used.items():
            lessons[i].used = candidate
        if config.opd_k:
            opd = distill.top_k_loss(logps[:, 1:], student, teacher, config.opd_clip, *clip)  # (N,)
        else:  # the paper's first version: an advantage for the sampled token
            adv = distill.advantage(student, teacher, config.opd_clip).squeeze(-1)  # (N,)
            opd = grpo.ppo_clip_loss(logp, old_logp, adv, *clip, config.dual_clip)  # (N,)
        loss = loss + config.w_opd * hint_mask * opd
        sums["gap"] = (hint_mask * (teacher - student).abs().mean(-1)).sum().item()
        sums["n_hinted"] = hint_mask.sum().item()
    if config.kl:
        loss = loss + config.kl * kl
        sums["kl"] = kl.detach().sum().item()
    return loss, sums | {"loss": loss.sum().item()}


def read_start(
    config: Config, state: State, row: grpo.Row, lessons: Sequence[Lesson]
) -> tuple[Tensor, dict[int, list[Tensor]]]:
    """The forward pass of the starting weights, without a gradient: the row's hidden states (N, D), and for each sample
    with hints the hidden states of its answer after each hinted prompt (T, D). A turn and its hinted prompts share a
    prefix up to the hint, so they can be one tree."""
    members = row["sample"].unique_consecutive().tolist()
    answers = [lessons[i].answer for i in members]
    answers += [lessons[i].answer._replace(prompt=prompt) for i in members for prompt in lessons[i].hinted]
    found = iter(grpo.hidden_states(state.start, answers, *row_limits(config, state)))
    plain = torch.cat([next(found) for _ in members])
    return plain, {i: [next(found) for _ in lessons[i].hinted] for i in members if lessons[i].hinted}


# ---- from the masters to the served weights ----


def trained(policy: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that training changes, by name: all of the model's, or the adapter's."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


# Weights that `dithered` rounds at a time: these and their noise fit the processor's cache. Another number would change
# the noise, and so what a checkpoint serves.
CHUNK = 1 << 18


@cache
def noise(device: torch.device) -> Tensor:
    """2 CHUNK random numbers of 16 bits, as int32: hashes of their index, so that they are the same everywhere."""
    bits = torch.arange(2 * CHUNK, dtype=torch.int32)
    bits = (bits ^ bits >> 16) * 0x7FEB352D  # int32 products wrap around
    bits = (bits ^ bits >> 15) * 0x297A2D39
    return (bits >> 16 & 0xFFFF).to(device)


@torch.no_grad()
def dithered(master: Tensor, number: int) -> Tensor:
    """Stochastic rounding of a master to bf16, with fixed noise: add 16 random bits to the low bits, then truncate. Any
    shape, fp32 -> bf16.

    Rounding to the nearest value would serve only 2 to 8 % of the first updates at lr 1e-5, and the rest later all at
    once: masters start on bf16 values, and a weight would move only after half a bf16 step. Dithering is unbiased, and
    it keeps values that bf16 can represent. The random bits depend only on the weight's index in the tensor and on the
    tensor's `number`: the same masters give the same values at each push, after a restart, and on every device.
    """
    flat = master.detach().contiguous().view(-1)
    out = torch.empty_like(flat, dtype=torch.bfloat16)
    for at in range(0, len(flat), CHUNK):
        bits = flat[at : at + CHUNK].view(torch.int32)
        begin = (number * 0x9E3779B1 + at // CHUNK * 0x85EBCA6B) % CHUNK  # another place for each tensor and chunk
        added = bits + noise(flat.device)[begin : begin + len(bits)]
        out[at : at + CHUNK] = added.bitwise_and_(-0x10000).view(torch.float32)
    return out.view(master.shape)


@torch.no_grad()
def sync_bf16(state: State) -> None:
    """Round the masters to the bf16 values that are served, and put them into the policy."""
    for k, (master, p) in enumerate(zip(state.masters, trained(state.policy).values(), strict=True)):
        p.copy_(dithered(master, k))


def served_weights(policy: PreTrainedModel) -> dict[str, Tensor]:
    """The policy's tensors by name, in bf16 for the engine. This is exact, as they hold bf16 values. They are not
    copies if the policy is in bf16."""
    return {name: p.detach().to(torch.bfloat16) for name, p in trained(policy).items()}


# ---- snapshot and restore, checkpoints ----


def mutable(state: State) -> list[Tensor]:
    """The tensors that a step changes: the masters, and for each Adam's two moments and step count."""
    return [*state.masters, *[t for m in state.masters for t in state.adam.state[m].values()]]


def snapshot(state: State) -> None:
    """Copy the tensors that a step changes. `restore` returns to this copy, and `save` writes it."""
    if not state.kept:
        state.kept = [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in mutable(state)]
    copy_tensors(mutable(state), state.kept)


def restore(state: State) -> None:
    """Return to the last snapshot."""
    copy_tensors(state.kept, mutable(state))
    recompute_activations(state.policy, False)
    state.policy.zero_grad()  # a row that ran out of memory may have left gradients
    state.adam.zero_grad()
    sync_bf16(state)


@torch.no_grad()
def copy_tensors(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    for s, t in zip(source, target, strict=True):
        t.copy_(s)


def snapshot_weights(state: State) -> dict[str, Tensor]:
    """The served bf16 values of the last snapshot, by name, on the CPU."""
    # Not strict: after the masters, `kept` has Adam's state.
    return {name: dithered(t, k) for k, (name, t) in enumerate(zip(trained(state.policy), state.kept, strict=False))}


def save(state: State, folder: Path) -> None:
    """Write the last snapshot: a Hugging Face folder, or peft's format for an adapter, with the trainer's state in
    trainer.pt."""
    if state.lora_rank:
        lora.write(snapshot_weights(state), state.lora_rank, folder, state.start.name_or_path)
    else:
        state.policy.save_pretrained(folder, state_dict=snapshot_weights(state))
        config = AutoConfig.from_pretrained(folder)
        config.dtype = torch.bfloat16  # of the weights in the file; the trainer may compute in another dtype
        config.save_pretrained(folder)
    state.tokenizer.save_pretrained(folder)
    rest = {"step": state.step, "baselines": state.baselines, "probed": state.probed}
    torch.save({"state": state.kept} | rest, folder / "trainer.pt")


def load_checkpoint(state: State, folder: Path | None) -> tuple[int, dict[str, float], dict[str, float]]:
    """Load a checkpoint (None: the starting weights) into the masters, Adam and the policy. Returns its step, baselines
    and results on the probe. Until `commit`, `restore` undoes this.

    UsageError if its file is damaged."""
    if folder is None:
        # Adam's state begins at 0; these zeros take no memory.
        zeros = [torch.zeros((), device=t.device).expand_as(t) for t in mutable(state)[len(state.initial_masters) :]]
        saved = {"state": [*state.initial_masters, *zeros], "step": 0, "baselines": {}, "probed": state.probe.first}
    else:
        try:
            # mmap: otherwise the whole file would be in memory beside the last snapshot.
            saved = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
            raise UsageError(f"{folder}/trainer.pt is damaged: {e}{ROLL_BACK}") from e
    copy_tensors(saved["state"], mutable(state))
    sync_bf16(state)
    # A checkpoint of an earlier version has no results on the probe.
    return saved["step"], saved["baselines"], saved.get("probed") or state.probe.measure(state.policy)[0]


def commit(state: State, step: int, baselines: dict[str, float], probed: dict[str, float]) -> None:
    """Make the current weights those of `step`: `restore` will return to them."""
    snapshot(state)
    state.step, state.baselines, state.probed = step, baselines, probed


def load_state(config: Config, folder: Path | None, start: Path, device: str, dtype: torch.dtype) -> State:
    """The trainer's state, from the checkpoint in `folder` if any. `start`: the folder of the starting weights.

    `dtype`: of the arithmetic. UsageError if a file is damaged.
    """

    def load() -> PreTrainedModel:
        model = load_model(start, torch.bfloat16).to(device)
        # `to(bfloat16)` would also round the rotary frequencies, which are computed in fp32.
        return model if dtype == torch.bfloat16 else model.to(dtype)

    tokenizer = AutoTokenizer.from_pretrained(start)
    first = load().eval().requires_grad_(False)
    try:
        probe = make_probe(first, tokenizer)
    except guard.Refused as e:
        raise UsageError(f"--model={start}: {e}") from e
    packs = check_arithmetic(first, probe.ids)
    policy = lora.with_adapter(first, config.lora_rank, config.seed) if config.lora_rank else load()
    masters, adam = optimizer(config, policy)
    initial_masters = [m.detach().clone() for m in masters] if config.lora_rank else list(first.parameters())
    state = State(tokenizer, policy, first, initial_masters, masters, adam, probe, packs, config.lora_rank)
    return begin(state, folder)


def of_user(config: Config, shared: State, owner: str, folder: Path | None) -> State:
    """The state of a user's own adapter on the shared base: from their checkpoint in `folder`, or new."""
    policy = lora.with_adapter(shared.start, config.lora_rank, config.seed)
    masters, adam = optimizer(config, policy)
    return begin(replace(shared, policy=policy, masters=masters, adam=adam, kept=[], owner=owner), folder)


def optimizer(config: Config, policy: PreTrainedModel) -> tuple[list[Tensor], torch.optim.Adam]:
    """fp32 masters of the trained tensors, and their Adam. Each backward pass through the policy adds to the masters'
    gradients."""
    # A row uses few of the embedding's vectors. A dense gradient would be filled and added for the whole vocabulary.
    policy.get_input_embeddings().sparse = True
    masters = [p.detach().float().clone().requires_grad_() for p in trained(policy).values()]
    lr = config.lr or (3e-4 if config.lora_rank else 3e-5)
    # fused: updates in place, without temporary copies of all weights
    adam = torch.optim.Adam(masters, lr=lr, betas=(config.beta1, config.beta2), fused=True)
    for p, m in zip(trained(policy).values(), masters, strict=True):
        p.register_post_accumulate_grad_hook(partial(move_grad, m))
        # Make Adam's state now, as its first step would, so that `restore` works before the first step.
        step = torch.zeros((), device=m.device)
        adam.state[m] = {"step": step, "exp_avg": torch.zeros_like(m), "exp_avg_sq": torch.zeros_like(m)}
    return masters, adam


def move_grad(master: Tensor, p: Tensor) -> None:
    """Add a tensor's gradient to its master's, in fp32: bf16 is too coarse for sums over many rows."""
    master.grad = p.grad.to_dense().float() if master.grad is None else master.grad.add_(p.grad)
    p.grad = None


def begin(state: State, folder: Path | None) -> State:
    """Load the checkpoint in `folder` (None: the starting weights), and take the first snapshot."""
    commit(state, *load_checkpoint(state, folder))
    return state
