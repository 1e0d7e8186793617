"""The memory that training and serving a model needs, in GiB by item: computed from its shape before it is loaded.

To print a table: python -m evaluation.memory
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

import lora
from durable.model import without_weights

VERSIONS = 4  # of a shared adapter, in one batch of the engine; a request for another version waits
USERS = 16  # users whose adapters stay in the trainer, and as many more in the engine; others' are loaded from disk


def in_a_batch(adapters: str) -> int:
    """How many adapters one batch of the engine can use."""
    return USERS if adapters == "user" else VERSIONS


Sizes = dict[str, float]  # item -> GiB


@dataclass(frozen=True)
class Setting:
    """What the memory depends on, besides the model's shape."""

    device: str  # cpu or cuda
    width: int  # bytes per number in the plan's dtype
    lora_rank: int  # 0: all weights are trained
    tokens: int  # of the longest sample
    row_tokens: int  # of a packed row
    adapters: str = "shared"  # or user
    context: int = 0  # tokens of the longest request


def needs(shape: PretrainedConfig, setting: Setting) -> tuple[Sizes, Sizes]:
    """Everything but the KV cache, on the device and on the host. On a CPU, all is on the device."""
    tensors, adapter_tensors = parameters(shape, setting.lora_rank)
    weights, adapter = sum(tensors), sum(adapter_tensors)
    trained, width = adapter or weights, setting.width
    # The initial state, one per user, and one more until another is unloaded
    states = USERS + 2 if setting.adapters == "user" else 1
    trained *= states
    cpu = setting.device == "cpu"
    idle = 2 * USERS + 1 if setting.adapters == "user" else VERSIONS  # adapters that the engine keeps on the host
    in_engine = in_a_batch(setting.adapters) + (idle if cpu else 0)
    # torch rounds each tensor in pinned memory up to a power of 2.
    pinned = 3 * states * sum(1 << (4 * n - 1).bit_length() for n in adapter_tensors or tensors)
    device = {
        "policy": weights * width,
        "starting weights": 0 if adapter else weights * width,  # with an adapter: the policy without it
        "adapter": trained * width if adapter else 0,
        "masters": 4 * trained,  # fp32
        "gradients": 4 * trained + (2 * trained if width == 2 else 0),  # fp32, and at most a row's bf16
        "Adam": 8 * trained,
        # The row also has 24 bytes for each logit of one chunk of positions (`grpo.CHUNK`).
        "row": width * row_numbers(shape, setting) + 24 * 256 * shape.get_text_config().vocab_size,
        # On a CPU the engine also packs its own copy of the weights.
        "engine": (2 if cpu else 1) * width * weights + width * in_engine * adapter + (0 if cpu else 2 * 2**30),
    }
    host = {"snapshot": 12 * trained if cpu else pinned, "processes": (1.1 if cpu else 2) * 2**30}
    host |= {"pushed copy": 2 * trained} if cpu else {"loading": 2 * weights, "idle adapters": width * idle * adapter}
    device, host = ({what: n / 2**30 for what, n in sizes.items() if n} for sizes in (device, host))
    return (device | host, {}) if cpu else (device, host)


def parameters(shape: PretrainedConfig, lora_rank: int) -> tuple[list[int], list[int]]:
    """The sizes of the model's tensors, and of its adapter's: two matrices for each linear layer but the head."""
    model = without_weights(shape)
    layers = lora.adapted_layers(model).values() if lora_rank else ()
    adapter = [lora_rank * n for layer in layers for n in (layer.in_features, layer.out_features)]
    return [p.numel() for p in model.parameters()], adapter


def row_numbers(shape: PretrainedConfig, setting: Setting) -> int:
    """Numbers kept for the backward pass of the largest row. A long sample keeps only each layer's input and recomputes
    the rest; a packed row keeps all (see `trainer.recompute_activations`). Both have a mask (see `grpo.tree_mask`). The
    factors are fitted to Llama models."""
    c = shape.get_text_config()
    per_token = 4 * c.hidden_size * c.num_hidden_layers + layer_numbers(shape)  # with malloc's gaps
    long = setting.tokens * (per_token + setting.tokens)
    row = min(setting.tokens, setting.row_tokens)
    short = row * (layer_numbers(shape) * c.num_hidden_layers + row)
    # The head's gradient, of one chunk of positions and in total (see `grpo.token_logps`); a frozen head has none.
    head = 0 if setting.lora_rank else 2 * c.vocab_size * c.hidden_size
    return max(long, short) + head


def least_cache(shape: PretrainedConfig, setting: Setting) -> float:
    """The smallest KV cache that vLLM starts with, in GiB: one request of the longest length. In a layer with a sliding
    window it keeps the window and the tokens of one step of the engine (2048 by default; 8192 to be safe). 0 for models
    whose layers differ in more than that, or have other caches."""
    c = shape.get_text_config()
    try:
        heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    except (AttributeError, RuntimeError):  # a state-space model; a value that depends on the layer
        return 0.0
    if hasattr(c, "kv_lora_rank"):
        return 0.0
    window = getattr(c, "sliding_window", None)
    kinds = getattr(c, "layer_types", None) or [f"{'sliding' if window else 'full'}_attention"] * c.num_hidden_layers
    most = {"sliding_attention": min(setting.context, (window or setting.context) + 8192), "linear_attention": 0}
    # Layers of other kinds, such as convolutions, have no such cache. 256: vLLM needs another block.
    tokens = sum(most.get(kind, setting.context) + 256 for kind in kinds if "attention" in kind or "hybrid" in kind)
    return 2 * tokens * heads * head_dim * setting.width / 2**30


def free_row_tokens(shape: PretrainedConfig, tokens: int) -> int:
    """The longest packed row, a power of 2, that needs no more memory than a sample of `tokens`."""
    c = shape.get_text_config()
    most = tokens * (4 * c.hidden_size / layer_numbers(shape) + 1 / c.num_hidden_layers)
    return 1 << max(8, int(most).bit_length() - 1)


def layer_numbers(shape: PretrainedConfig) -> int:
    """Numbers per token that one layer keeps for the backward pass."""
    c = shape.get_text_config()
    inner = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    return 10 * (c.hidden_size + (max(inner) if isinstance(inner, list) else inner))


def itemised(sizes: Sizes) -> str:
    items = ", ".join(f"{what} {gib:.1f}" for what, gib in sizes.items() if gib >= 0.05)
    return f"{sum(sizes.values()):.1f} GiB ({items})"
