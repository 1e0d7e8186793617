"""LoRA (arXiv 2106.09685): two small matrices are trained for each linear layer of a frozen base, W x + 2 B (A x).

The base is the starting weights. Without the adapter it is also the KL's reference, the frozen teacher and a small
model's judge, so the trainer needs only one copy.
"""

import copy
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from durable.errors import UsageError

SCALE = 2  # of the product B A, alpha / rank in peft's terms


def with_adapter(base: PreTrainedModel, rank: int, seed: int) -> PreTrainedModel:
    """A model that shares the tensors of `base` and has a new adapter: A random, B zero, in base's dtype."""
    shared = {id(t): t for t in [*base.parameters(), *base.buffers()]}
    policy = copy.deepcopy(base, shared)  # new modules: other threads use `base` without an adapter
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy.add_adapter(LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=list(adapted_layers(base))))
    return policy


def adapted_layers(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """The layers that get an adapter, by name: all linear layers except the head."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


def write(weights: dict[str, Tensor], rank: int, folder: Path, base: str) -> None:
    """Write an adapter in peft's format. `weights`: by name in the model. `base`: the base model's folder."""
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in weights}
    config = LoraConfig(
        r=rank, lora_alpha=SCALE * rank, target_modules=layers, base_model_name_or_path=base, inference_mode=True
    )
    config.save_pretrained(folder)
    named = {f"base_model.model.{name.replace('.default.', '.')}": w.contiguous() for name, w in weights.items()}
    save_file(named, folder / "adapter_model.safetensors")


def read(folder: Path) -> dict[str, Tensor]:
    """An adapter that `write` wrote: its tensors by their names in peft's file. UsageError if it is damaged."""
    try:
        return load_file(folder / "adapter_model.safetensors")
    except SafetensorError as e:
        raise UsageError(f"{folder} is damaged: {e}; the admin can roll back to an earlier checkpoint") from e
