"""Every option of run.py with its default. The comment next to an option is its --help text."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass
from typing import Literal

import tyro

from durable.errors import UsageError


@dataclass(frozen=True)
class Service:
    """The program."""

    out: str = "out"  # folder for journal, metrics and checkpoints
    host: str = "127.0.0.1"  # address to listen on; any other than loopback needs a key in OUT/keys
    port: int = 8000  # port to listen on
    ssl_certfile: str = ""  # TLS: the server's certificate chain; empty: plain HTTP
    ssl_keyfile: str = ""  # TLS: its private key
    origins: str = ""  # web pages that may call from a browser, comma-separated, such as http://localhost:3000
    max_waiting: int = 10000  # most turns that may wait; with --adapters=user, of each user; more are dropped
    keep_days: float = 0.0  # days after which texts and tokens of finished turns are removed; 0: never
    expire: float = 3600.0  # seconds after which an answer without a next message is dropped


@dataclass(frozen=True)
class Engine:
    """The model and the engine."""

    model: str = ""  # folder of a Hugging Face model; empty: SmolLM2-135M-Instruct, prepared once
    name: str = "policy"  # the model name that clients ask for
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one
    seed: int = 0  # random seed of the sampler and of new adapters
    max_model_len: int = 8192  # context length: tokens of prompt and answer together
    max_seqs: int = 64  # most answers generated at the same time
    tool_parser: str = "auto"  # vLLM's parser for this model's tool calls; auto: by its chat template; empty: none
    reasoning_parser: str = ""  # vLLM's parser for its thinking, which is sent as reasoning_content; empty: none
    engine_memory: float = 0.0  # GiB: KV cache on a CPU, the whole engine on a GPU; 0: by the free memory
    engine_cores: int = 0  # CPU cores for the engine, the rest for the trainer; 0: half


@dataclass(frozen=True)
class Judge:
    """The judge."""

    judge_url: str = ""  # OpenAI-compatible endpoint of the judge; empty: the served model itself
    judge_model: str = ""  # its model name (the key is read from JUDGE_API_KEY)
    judge_style: Literal["auto", "chat", "head"] = "auto"  # head: for a model too small to follow instructions
    votes: int = 3  # samples of a chat judge per hint, and per score if its endpoint gives no log-probs


@dataclass(frozen=True)
class Turns:
    """Which turns are trained on."""

    max_staleness: int = 8  # samples from weights more than this many steps old are dropped
    max_train_tokens: int = 16384  # longer samples are not trained on; memory is planned for min(this, max_model_len)
    user_share: float = 0.5  # largest fraction of a batch from one user while other users' turns wait
    session_share: float = 1.0  # largest fraction of a batch from one conversation; more is dropped
    truncated_share: float = 1.0  # the same for answers truncated by max_tokens; 0: none is trained on


@dataclass(frozen=True)
class Step:
    """The step."""

    batch_size: int = 1  # judged turns per step
    batch_wait: float = 60.0  # seconds without another turn after which a smaller batch is trained on; 0: never
    row_tokens: int = 0  # most tokens in a packed row (micro-batch); a longer sample gets its own row; 0: by the device
    lora_rank: int = 0  # train a LoRA adapter of this rank on the frozen model; 0: train all weights
    adapters: Literal["shared", "user"] = "shared"  # user: each user named in OUT/keys has their own adapter
    lr: float = 0.0  # learning rate of Adam, after a short warm-up; 0: 3e-5, or 3e-4 for an adapter
    beta1: float = 0.9  # of Adam
    beta2: float = 0.98  # of Adam
    grad_clip: float = 1.0  # largest gradient norm
    steps: int = 0  # stop training after this many steps and keep serving; 0: never
    save_every: int = 50  # steps between checkpoints; a clean stop always writes one
    keep: int = 3  # how many of the newest checkpoints to keep


@dataclass(frozen=True)
class Losses:
    """The losses."""

    w_rl: float = 1.0  # weight of the PPO-clip loss on the score; 0: learn from hints only
    w_opd: float = 1.0  # weight of the distillation loss on the hint; 0: learn from scores only
    kl: float = 0.1  # weight of the KL to the starting weights; 0: off
    baseline: Literal["none", "mean", "group"] = "none"  # of the reward: 0, the user's running mean, or the prompt's
    clip_low: float = 0.2  # the PPO ratio is clipped below at 1 - this
    clip_high: float = 0.28  # the PPO ratio is clipped above at 1 + this
    dual_clip: float = 3.0  # dual-clip PPO: with A < 0, the loss per token is at most this times -A
    opd_k: int = 20  # distill over the policy's k most likely tokens; 0: only the sampled token
    opd_clip: float = 3.0  # bound on |log pi_T - log pi_0|; 0: none


@dataclass(frozen=True)
class Config(Service, Engine, Judge, Turns, Step, Losses):
    """All options in one flat record."""

    def __post_init__(self) -> None:
        """UsageError names the invalid option."""

        def limit(holds: Callable[[float], bool], expected: str, *names: str) -> None:
            for name in names:
                if not holds(value := getattr(self, name)):
                    raise UsageError(f"--{name}={value}: expected {expected}")

        numbers = [f.name for f in fields(self) if isinstance(getattr(self, f.name), int | float)]
        limit(lambda value: 0 <= value < math.inf, "a finite number that is not negative", *numbers)
        counts = ("port", "batch_size", "votes", "keep", "max_seqs", "save_every")
        limit(lambda value: value >= 1, "at least 1", *counts)
        limit(lambda value: value >= 512, "at least 512, so that the probe fits", "max_model_len")
        limit(lambda value: value < 1, "less than 1", "beta1", "beta2")
        limit(lambda value: value > 1, "more than 1: at 1 or less, no complaint would have a gradient", "dual_clip")
        limit(lambda value: value <= 512, "at most 512, vLLM serves no more", "lora_rank")
        limit(lambda value: value <= 65535, "at most 65535", "port")
        limit(lambda value: value <= 1, "a fraction from 0 to 1", "user_share", "truncated_share")
        least = 1 / self.batch_size
        limit(lambda value: least <= value <= 1, f"a fraction from {least:g} to 1", "session_share")
        for name in ("expire", "grad_clip"):
            if not getattr(self, name):
                raise UsageError(f"--{name}=0: expected more than 0")
        if self.adapters == "user" and not self.lora_rank:
            raise UsageError("--adapters=user needs --lora_rank")
        if not self.w_rl and not self.w_opd:
            raise UsageError("--w_rl and --w_opd: at least one must be above 0")
        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            raise UsageError("--ssl_certfile and --ssl_keyfile: give both, or none")
        if self.judge_url and self.judge_style == "head":
            raise UsageError("--judge_style=head judges with the model's own weights: it takes no --judge_url")
        if self.judge_url and not self.judge_url.startswith(("http://", "https://")):
            raise UsageError(f"--judge_url={self.judge_url}: expected http://... or https://...")
        if self.judge_url and not self.judge_model:
            raise UsageError("--judge_url needs --judge_model, the model's name at that endpoint")

    @property
    def web_origins(self) -> list[str]:
        return [origin.strip().rstrip("/") for origin in self.origins.split(",") if origin.strip()]

    @property
    def url(self) -> str:
        """The address at which the program reaches itself."""
        anywhere = self.host in ("0.0.0.0", "::")
        host = "127.0.0.1" if anywhere else f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.ssl_certfile else 'http'}://{host}:{self.port}/v1"


# For --help: a group of options for each of the classes above.
GROUPS = {"program": Service, "engine": Engine, "judge": Judge, "turns": Turns, "step": Step, "losses": Losses}
Groups = make_dataclass("Groups", GROUPS.items(), frozen=True)


def parse(argv: list[str]) -> Config:
    """SystemExit after --help, and after a message that names an unknown or unreadable option. UsageError names an
    invalid one."""
    description = "Serve a model, and train it on its conversations."
    groups = tyro.cli(tyro.conf.OmitArgPrefixes[Groups], args=argv, use_underscores=True, description=description)
    values = {name: value for group in vars(groups).values() for name, value in vars(group).items()}
    return Config(**values | {"out": os.path.expanduser(values["out"])})  # a shell leaves the ~ of --out=~/x as it is
