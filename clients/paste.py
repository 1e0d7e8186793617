"""What to paste into a client so that it talks to this server.

python -m clients.paste --client=openai --key=KEY
"""

import json
import shlex
from dataclasses import dataclass
from typing import Literal

import tyro


def openclaw(url: str, model: str, key: str, context: int) -> str:
    """For ~/.openclaw/openclaw.json. In a short context its usual prompt of 12,000 tokens doesn't fit: it gets four
    tools, and a prompt of 2,100 tokens."""
    entry = {
        "id": model,
        "name": model,
        "reasoning": True,  # otherwise it doesn't send thinking back, and the model doesn't see its own thinking
        "input": ["text"],
        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
        "contextWindow": context,
        "maxTokens": 4096 if context >= 32_768 else context // 16,
        # The headers name the session of each request; nothing depends on them.
        "compat": {"sendSessionAffinityHeaders": True, "requiresStringContent": True, "maxTokensField": "max_tokens"},
    }
    provider = {"baseUrl": url, "apiKey": key, "api": "openai-completions", "timeoutSeconds": 1800, "models": [entry]}
    defaults: dict = {"model": {"primary": f"rl/{model}"}}
    settings = {"models": {"mode": "replace", "providers": {"rl": provider}}, "agents": {"defaults": defaults}}
    if context < 32_768:
        defaults |= {"skipBootstrap": True, "skills": [], "heartbeat": {"every": "0m"}}
        defaults["compaction"] = {"memoryFlush": {"enabled": False}}
        tools = {"allow": ["read", "write", "edit", "exec"], "deny": ["apply_patch", "process"], "toolSearch": False}
        settings["tools"] = tools
        # By default it sends no temperature, which means 1: small models then talk nonsense after such a long prompt.
        defaults["models"] = {f"rl/{model}": {"params": {"temperature": 0.7}}}
    return json.dumps(settings, indent=2)


def openai(url: str, model: str, key: str, context: int) -> str:
    return f'''from openai import OpenAI

client = OpenAI(base_url="{url}", api_key={json.dumps(key)})
talk = [{{"role": "user", "content": "Why is the sky blue?"}}]
answer = client.chat.completions.create(model="{model}", messages=talk)
print(answer.choices[0].message.content)
talk += [answer.choices[0].message, {{"role": "user", "content": "Too long, one sentence please."}}]
client.chat.completions.create(model="{model}", messages=talk)  # the first answer is now being judged'''


def curl(url: str, model: str, key: str, context: int) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Why is the sky blue?"}]})
    return (
        f"curl {url}/chat/completions -H {shlex.quote(f'Authorization: Bearer {key}')} "
        f"-H 'Content-Type: application/json' \\\n  -d {shlex.quote(body)}"
    )


def open_webui(url: str, model: str, key: str, context: int) -> str:
    """The headers name the chat of each request. docs/openwebui_feedback.py forwards its thumbs up and down."""
    return (
        f"OPENAI_API_BASE_URL={url} OPENAI_API_KEY={shlex.quote(key)} ENABLE_FORWARD_USER_INFO_HEADERS=true \\\n"
        "  DATA_DIR=./open-webui open-webui serve"
    )


CLIENTS = {"openclaw": openclaw, "openai": openai, "curl": curl, "open-webui": open_webui}


@dataclass(frozen=True)
class Options:
    client: Literal[*CLIENTS] = "openclaw"
    url: str = "http://127.0.0.1:8000/v1"  # the address that run.py prints
    model: str = "policy"  # its --name
    key: str = "none"  # an API key, if one is needed
    context: int = 8192  # its --max_model_len: tokens of prompt and answer together


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    print(CLIENTS[options.client](options.url, options.model, options.key, options.context))
