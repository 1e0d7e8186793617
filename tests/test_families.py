"""Which model families can be trained, checked on tiny random models."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from durable.errors import UsageError
from durable.model import check_folder
from machine import arithmetic

SIZE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_local_experts": 4}
PACKED = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma3_text",
    "olmo2",
    "smollm3",
    "glm4",
    "qwen3_moe",
    "phi3",
    "gpt_oss",
]
NOT_PACKED = ["lfm2", "qwen3_next"]
REFUSED = ["granite", "cohere", "gemma2"]


def tiny(family: str):
    torch.manual_seed(0)
    extra = {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3} if family == "lfm2" else {}
    if family == "qwen3_next":
        extra = {k: 8 for k in ("linear_key_head_dim", "linear_value_head_dim")}
        extra |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "shared_expert_intermediate_size": 32}
    if family == "granite":
        extra = {"logits_scaling": 4.0}
    config = AutoConfig.for_model(family, **SIZE | EXPERTS | extra)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for p in model.parameters():  # with the usual 0.02, a leak between samples would be too small to see
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


IDS = torch.randint(3, 128, (60,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize(("family", "packs"), [*[(f, True) for f in PACKED], *[(f, False) for f in NOT_PACKED]])
def test_samples_share_a_row_only_if_the_model_does_not_mix_them(family, packs):
    assert arithmetic.check_arithmetic(tiny(family), IDS) is packs


@pytest.mark.parametrize("family", NOT_PACKED)
@pytest.mark.parametrize("n", [60, 75, 90])
def test_a_mix_of_samples_is_seen_in_bf16(family, n):
    """A convolution mixes only the first few positions of a sample."""
    for seed in range(3):
        ids = torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
        assert not arithmetic.check_arithmetic(tiny(family).bfloat16(), ids)


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_scales_or_caps_its_logits_is_refused(family):
    with pytest.raises(UsageError, match="scaled, capped or shifted"):
        arithmetic.check_arithmetic(tiny(family), IDS)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: edit_config(f, quantization_config={"quant_method": "awq", "bits": 4}), "quantized"),
        (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "can't be loaded"),
        (lambda f: [file.unlink() for file in f.glob("chat_template*")], "no chat template: it is a base model"),
        (lambda f: edit_config(f, model_type="none_such"), "can't be loaded"),
        (lambda f: edit_config(f, num_hidden_layers=1), "different tensors"),
        (lambda f: edit_config(f, num_hidden_layers=9), "different tensors"),
    ],
)
def test_a_model_folder_that_cannot_be_used_is_refused_at_once(tiny_model, tmp_path, spoil, reason):
    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    check_folder(folder)
    spoil(folder)
    with pytest.raises(UsageError, match=reason):
        check_folder(folder)
