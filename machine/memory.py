"""What training and serving a model need, in GiB by item: computed from its shape, before anything is loaded.

A table of it: python -m evaluation.memory
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

import lora

VERSIONS = 4  # of a shared adapter in one batch of the engine; a request for a further one waits
USERS = 16  # with an adapter each, in one batch and at the trainer; those who were away longest are put on the disk


def in_a_batch(adapters: str) -> int:
    """How many adapters the engine computes with at once."""
    return USERS if adapters == "user" else VERSIONS


Sizes = dict[str, float]  # GiB by what it is for


@dataclass(frozen=True)
class Setting:
    """What the needs of a model depend on."""

    device: str  # cpu or cuda
    width: int  # bytes of a number in the trainer's arithmetic
    lora_rank: int  # 0: all weights are trained
    tokens: int  # of the longest sample
    row_tokens: int  # of a packed row
    adapters: str = "shared"  # or user


def needs(shape: PretrainedConfig, setting: Setting) -> tuple[Sizes, Sizes]:
    """All but the KV cache, on the device and on the host; on a CPU all of it is on the device."""
    weights, adapter = parameters(shape, setting.lora_rank)
    trained, width = adapter or weights, setting.width
    if setting.adapters == "user":  # the one that all begin with, each user's, and one more until another leaves
        trained *= USERS + 2
    cpu = setting.device == "cpu"
    device = {
        "policy": weights * width,
        "first weights": 0 if adapter else weights * width,  # with an adapter: the policy without it
        "adapter": trained * width if adapter else 0,
        "masters": 4 * trained,  # fp32
        "gradients": 4 * trained + (2 * trained if width == 2 else 0),  # fp32, and those of a row
        "Adam": 8 * trained,
        "row": width * row_numbers(shape, setting) + 24 * 256 * shape.get_text_config().vocab_size,
        # The CPU's engine packs a copy of its own.
        "engine": (4 if cpu else 2) * weights + 2 * in_a_batch(setting.adapters) * adapter + (0 if cpu else 2 * 2**30),
    }
    host = {"snapshot": 12 * trained, "processes": 2 * 2**30}
    host |= {"pushed copy": 2 * trained} if cpu else {"loading": 2 * weights}
    device, host = ({what: n / 2**30 for what, n in sizes.items() if n} for sizes in (device, host))
    return (device | host, {}) if cpu else (device, host)


def parameters(shape: PretrainedConfig, lora_rank: int) -> tuple[int, int]:
    """How many numbers the model has, and its adapter: rank * (in + out) for each linear layer but the head."""
    model = lora.without_weights(shape)
    total = sum(p.numel() for p in model.parameters())
    return total, lora_rank * sum(m.in_features + m.out_features for m in lora.adapted_layers(model).values())


def row_numbers(shape: PretrainedConfig, setting: Setting) -> int:
    """Numbers that the forward and backward pass of the longest row keeps: with each layer's input kept and the rest
    recomputed for a long sample, or a packed row with all of it kept (see `trainer.update`); and a mask, see
    `grpo.tree_mask`. Fitted to Llamas."""
    c = shape.get_text_config()
    per_token = 4 * c.hidden_size * c.num_hidden_layers + layer_numbers(shape)  # and malloc's gaps
    long = setting.tokens * (per_token + setting.tokens)
    row = min(setting.tokens, setting.row_tokens)
    short = row * (layer_numbers(shape) * c.num_hidden_layers + row)
    # The head's gradient, from a chunk of places and in all (see `grpo.token_logps`); a frozen one has none.
    head = 0 if setting.lora_rank else 2 * c.vocab_size * c.hidden_size
    return max(long, short) + head


def free_row_tokens(shape: PretrainedConfig, tokens: int) -> int:
    """The longest packed row, a power of 2, that needs no more memory than a sample of `tokens` does anyway."""
    c = shape.get_text_config()
    most = tokens * (4 * c.hidden_size / layer_numbers(shape) + 1 / c.num_hidden_layers)
    return 1 << max(8, int(most).bit_length() - 1)


def layer_numbers(shape: PretrainedConfig) -> int:
    """Numbers per token that one layer keeps for its backward pass."""
    c = shape.get_text_config()
    inner = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    return 10 * (c.hidden_size + (max(inner) if isinstance(inner, list) else inner))


def itemised(sizes: Sizes) -> str:
    items = ", ".join(f"{what} {gib:.1f}" for what, gib in sizes.items() if gib >= 0.05)
    return f"{sum(sizes.values()):.1f} GiB ({items})"
