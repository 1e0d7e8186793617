"""Every option of run.py with its default. The comment next to each is its --help."""

import math
import sys
from dataclasses import dataclass, fields
from typing import Literal

import tyro


@dataclass(frozen=True)
class Program:
    """The program."""

    out: str = "out"  # folder of the journal, the metrics and the checkpoints
    host: str = "127.0.0.1"  # address to listen on; any other than loopback needs a key in OUT/keys
    port: int = 8000  # port to listen on
    ssl_certfile: str = ""  # TLS: the server's certificate, and what leads to its authority; empty: plain HTTP
    ssl_keyfile: str = ""  # TLS: its private key
    origins: str = ""  # web pages that may call from a browser, comma-separated, such as http://localhost:3000
    max_waiting: int = 10000  # turns that wait for the judge or the trainer; more are dropped
    keep_days: float = 0.0  # days after which texts and tokens of turns that are done with are removed; 0: never
    expire: float = 3600.0  # seconds after which an answer that got no next message is dropped


@dataclass(frozen=True)
class Engine:
    """The model and its engine."""

    model: str = ""  # folder of a Hugging Face model; empty: SmolLM2-135M-Instruct, prepared once
    name: str = "policy"  # the model name that clients ask for
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0  # of the sampler
    max_model_len: int = 8192  # longest prompt plus answer, in tokens
    max_seqs: int = 64  # answers generated at once
    tool_parser: str = "auto"  # vLLM's parser of this model's tool calls; auto: by its chat template; empty: none
    reasoning_parser: str = ""  # and of its thinking, which then goes out as reasoning_content; empty: none
    engine_memory: float = 0.0  # GiB: KV cache on a CPU, all of the engine on a GPU; 0: from what is free
    engine_cores: int = 0  # CPU cores for the engine, the rest for the trainer; 0: half


@dataclass(frozen=True)
class Judge:
    """The judge."""

    judge_url: str = ""  # OpenAI-compatible endpoint of the judge; empty: the served model itself
    judge_model: str = ""  # its model name (the key is read from JUDGE_API_KEY)
    judge_style: Literal["auto", "chat", "head"] = "auto"  # head: for a model too small to follow instructions
    votes: int = 3  # of a chat judge whose endpoint gives no log-probs


@dataclass(frozen=True)
class Turns:
    """Which turns are trained on."""

    max_staleness: int = 8  # samples from weights older than this many steps are dropped
    max_train_tokens: int = 16384  # longer samples are served, not trained on; memory is planned for one of this length
    user_share: float = 0.5  # largest part of a batch from one user while other users' turns wait
    session_share: float = 1.0  # largest part of a batch from one conversation; more is dropped
    truncated_share: float = 1.0  # the same for answers that max_tokens cut off; 0: none is trained on


@dataclass(frozen=True)
class Step:
    """The step."""

    batch_size: int = 1  # judged turns per step
    batch_wait: float = 60.0  # seconds without a further turn after which a smaller batch is trained on; 0: never
    row_tokens: int = 0  # tokens per packed row, a micro-batch; a longer sample has a row of its own; 0: by the device
    lora_rank: int = 0  # train an adapter of this rank on the frozen model; 0: all weights
    adapters: Literal["shared", "user"] = "shared"  # user: each API key's user has an adapter of their own
    lr: float = 0.0  # of Adam, constant; 0: 2.5e-5, for an adapter 3e-4
    beta1: float = 0.9  # of Adam
    beta2: float = 0.98  # of Adam
    grad_clip: float = 1.0  # largest gradient norm
    steps: int = 0  # stop training after this many steps, keep serving; 0: never
    save_every: int = 50  # steps between checkpoints; one is always written at a clean stop
    keep: int = 3  # checkpoints to keep, the newest


@dataclass(frozen=True)
class Losses:
    """The losses."""

    w_rl: float = 1.0  # weight of the PPO-clip loss on the score; 0: learn from hints alone
    w_opd: float = 1.0  # weight of the distillation loss on the hint; 0: learn from scores alone
    kl: float = 0.1  # weight of the KL to the starting weights; 0: off
    baseline: Literal["none", "mean", "group"] = "none"  # of the reward: 0, running mean per user, same prompt
    clip_low: float = 0.2  # PPO clip below
    clip_high: float = 0.28  # PPO clip above
    dual_clip: float = 3.0  # bound on the loss of a bad token
    opd_k: int = 20  # tokens at each place that teacher and student are compared on; 0: the sampled one
    opd_clip: float = 3.0  # largest |log pi_T - log pi_0| that counts; 0: no bound
    teacher: Literal["start", "policy"] = "start"  # who reads the hint: the frozen first weights, or those in training


@dataclass(frozen=True)
class Config(Program, Engine, Judge, Turns, Step, Losses):
    """All of them, in one flat record."""

    def __post_init__(self) -> None:
        """ValueError names the option that is wrong."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"--{f.name}={value}: expected a finite number that is not negative")
        for name in ("batch_size", "votes", "keep", "max_seqs", "max_model_len", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)}: expected at least 1")
        for name in ("expire", "grad_clip"):
            if not getattr(self, name):
                raise ValueError(f"--{name}=0: expected more than 0")
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"--{name}={getattr(self, name)}: expected less than 1")
        if self.lora_rank > 512:
            raise ValueError(f"--lora_rank={self.lora_rank}: expected at most 512, vLLM serves no more")
        if self.adapters == "user" and not self.lora_rank:
            raise ValueError("--adapters=user needs --lora_rank")
        if not self.w_rl and not self.w_opd:
            raise ValueError("--w_rl and --w_opd: at least one must be above 0")
        if self.port > 65535:
            raise ValueError(f"--port={self.port}: expected at most 65535")
        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            raise ValueError("--ssl_certfile and --ssl_keyfile: give both, or none")
        if self.judge_url and not self.judge_model:
            raise ValueError("--judge_url needs --judge_model, the name of the model there")
        for name in ("user_share", "session_share", "truncated_share"):
            least = 1 / self.batch_size if name == "session_share" else 0
            if not least <= getattr(self, name) <= 1:
                raise ValueError(f"--{name}={getattr(self, name)}: expected a part from {least:g} to 1")


@dataclass(frozen=True)
class Groups:
    """As --help shows them."""

    program: Program
    engine: Engine
    judge: Judge
    turns: Turns
    step: Step
    losses: Losses


def parse(argv: list[str]) -> Config:
    """SystemExit after a message that names the option that is unknown or wrong, and after --help."""
    description = "Serve a model, and train it on its talks."
    groups = tyro.cli(tyro.conf.OmitArgPrefixes[Groups], args=argv, use_underscores=True, description=description)
    try:
        return Config(**{name: value for group in vars(groups).values() for name, value in vars(group).items()})
    except ValueError as e:
        sys.exit(str(e))
