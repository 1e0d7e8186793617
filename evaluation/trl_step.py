"""One training step of TRL's AsyncGRPOTrainer on given samples, timed. speed_step.py runs it in a venv with TRL.

    PEER/bin/python evaluation/trl_step.py SAMPLES MODEL bf16|fp32

TRL 1.16.0 packs samples that share a prefix as a tree, as we do. Its attention for that is a CUDA kernel from the model
hub, so torch's own attention is called for the same segments here. The sampler and the transfer of weights are replaced
through TRL's own protocols: the samples are ready, and nothing serves. Prints one line of JSON.
"""

import json
import os
import queue
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import numpy as np
import torch
import torch.nn.functional as F
import trl.experimental.async_grpo.async_grpo_trainer as async_trainer
import trl.experimental.async_grpo.packing as packing
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

STEPS = 3  # the first one warms up
MICRO = 8  # samples in a micro-batch, TRL's default


def tree_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, scaling: float, **tree: Any
) -> tuple[Tensor, None]:
    """TRL's tree attention by torch: each segment attends to the keys and values on its path from the root."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q_ends, k_ends = tree["tree_cu_seqlens_q"].tolist(), tree["tree_cu_seqlens_k"].tolist()
    parts = []
    for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        path = tree["tree_kv_index"][k0:k1]
        q, k, v = query[:, :, q0:q1], key.index_select(2, path), value.index_select(2, path)
        seen = None if q1 - q0 == k1 - k0 else torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - q1 + q0)
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, scale=scaling))
    return torch.cat(parts, 2).transpose(1, 2), None


class Ready:
    """TRL's rollout worker, with samples that are there already."""

    def __init__(self, samples: list[dict]) -> None:
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        groups: dict[tuple, int] = {}
        for step in range(STEPS + 2):
            for s in samples:
                prompt, answer = s["prompt_ids"], s["response_ids"]
                group = groups.setdefault((step, *prompt), len(groups))
                self.rollout_buffer.put(
                    RolloutSample(
                        prompt=[],
                        completion=[],
                        input_ids=np.array(prompt + answer),
                        completion_mask=np.array([0] * len(prompt) + [1] * len(answer)),
                        old_log_probs=np.array([0.0] * len(prompt) + s["logps"], dtype=np.float32),
                        advantage=s["adv"],
                        model_version=10**6,
                        group_id=group,
                        metrics={"reward": 0.0},
                    )
                )

    def __getattr__(self, name: str) -> Callable:
        return lambda *_: None


class Nowhere:
    """TRL's weight transfer, to no engine."""

    def send_weights(self, weights: Iterable) -> None:
        for _ in weights:
            pass

    def __getattr__(self, name: str) -> Callable:
        return lambda *_: None


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        self.begun = time.process_time()

    def on_step_end(self, *_, **__) -> None:
        self.steps.append(time.process_time() - self.begun)


def main(samples: str, model: str, dtype: str) -> None:
    torch.set_num_threads(1)
    packing.tree_attention = tree_attention
    async_trainer.get_peak_flops_per_device = lambda *_: None  # it asks CUDA for the device's name
    rows, clock = json.load(open(samples)), Clock()
    with tempfile.TemporaryDirectory() as out:
        config = AsyncGRPOConfig(
            output_dir=out,
            use_cpu=True,
            max_steps=STEPS,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=max(1, len(rows) // MICRO),
            token_budget=0,
            num_generations=4,
            bf16=dtype == "bf16",
            dtype="float32",
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            learning_rate=1e-6,
        )
        AsyncGRPOTrainer(
            model=model,
            reward_funcs=lambda **_: [0.0],
            args=config,
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "x"}]}] * MICRO),
            rollout_worker=Ready(rows),
            weight_transfer=Nowhere(),
            callbacks=[clock],
        ).train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": min(clock.steps[1:]), "peak": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
