"""Fixtures: a tiny random model, and the real program that serves it. Nothing under test is mocked."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch

from clients.keys import write_private
from tests import talking

ROOT = Path(__file__).parent.parent

# ChatML with tools as Qwen and Hermes models write them.
CHAT_TEMPLATE = """{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined %}<think:{{ enable_thinking }}:{{ reasoning_effort }}>
{% endif %}{% endif %}"""


def make_tiny_model(folder: Path, tied: bool = True, scale: float = 0.05) -> Path:
    """A random Llama of 0.4 M parameters with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        initializer_range=scale,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list) -> None:
    """The longest files first: with two workers, one of them would otherwise wait for the last file."""
    first = ("test_program.py", "test_users.py", "test_apis.py", "test_page.py", "test_lora.py")
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Program:
    """run.py as a user starts it."""

    def __init__(self, model: Path, out: Path, **config) -> None:
        self.model, self.out, self.port = model, out, free_port()
        out.mkdir(parents=True, exist_ok=True)
        values = {"model": model, "out": out, "port": self.port, "max_model_len": 2048, "engine_memory": 0.5}
        values |= {"batch_wait": 0} | config  # tests expect full batches
        self.url = f"http://127.0.0.1:{self.port}"
        if keys := values.pop("key", "").split(",") if "key" in values else []:  # "user:key,user:key"
            write_private(out / "keys", "\n".join(keys))
        self.key = keys[0].rpartition(":")[2] if keys else ""
        with open(out / "run.log", "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "run.py"), *[f"--{k}={v}" for k, v in values.items()]],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its own process group, so that a test can send it Ctrl-C
            )

    def log(self) -> str:
        return (self.out / "run.log").read_text()

    def wait_ready(self, timeout: float = 240) -> "Program":
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log()[-4000:]
            try:
                httpx.get(f"{self.url}/health", timeout=2).raise_for_status()
                return self
            except httpx.TransportError:
                time.sleep(0.5)
        raise TimeoutError(self.log()[-4000:])

    def status(self) -> dict:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.get(f"{self.url}/status", headers=headers, timeout=30).raise_for_status().json()

    def metrics(self) -> list[dict]:
        path = self.out / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def stop(self) -> float:
        """Send SIGTERM. Return the seconds until the program ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait_end()

    def wait_end(self) -> float:
        started = time.monotonic()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return time.monotonic() - started


def descendants(root: int) -> list[tuple[int, int]]:
    """(pid, parent) of all processes below `root`."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found, front = [], {root}
    while front:
        below = [(pid, parent) for pid, parent in parents.items() if parent in front]
        found += below
        front = {pid for pid, _ in below}
    return found


def engine_processes(program: "Program") -> list[int]:
    """The pids of the engine's processes: on a CPU there is one."""
    found = []
    for pid, _ in descendants(program.process.pid):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if "VLLM" in Path(f"/proc/{pid}/comm").read_text():
                found.append(pid)
    return found


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.fixture(scope="session")
def program(tiny_model, tmp_path_factory):
    """The real server with a small batch, shared by the tests that only talk to it."""
    program = Program(tiny_model, tmp_path_factory.mktemp("out"), batch_size=4, key="alice:key-a,bob:key-b", lr=1e-4)
    yield program.wait_ready()
    program.stop()


@pytest.fixture
def fresh(tiny_model, tmp_path):
    started = []

    def start(**config):
        started.append(Program(tiny_model, tmp_path / "out", **config))
        return started[-1]

    yield start
    for p in started:
        if p.process.poll() is None:
            p.process.kill()
            p.process.wait()


@pytest.fixture(autouse=True)
async def close_clients():
    """Close the clients of each test. The garbage collector would close a client's sockets first, and only later
    remove their file descriptors from the event loop. By then other sockets may have the same descriptors (vLLM's, in
    test_swap). The event loop would stop watching those, and they would wait forever."""
    yield
    while talking.opened:
        await talking.opened.pop().close()
