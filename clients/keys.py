"""Who may talk to the server: API keys, and where requests without one may come from."""

import hashlib
import os
import re
import secrets
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from durable.atomic import replacing
from durable.errors import UsageError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def users_of(entries: Iterable[str]) -> dict[str, str]:
    """API key -> user name, from "user:key" or "key", which is a user of its own. UsageError names a wrong entry."""
    users: dict[str, str] = {}
    for entry in entries:
        name, _, key = entry.strip().rpartition(":")
        if not re.fullmatch(r"[!-~]+", key) or key in users:
            raise UsageError(
                f"API key of {name or entry!r}: empty, given twice, or not of printable ASCII without spaces"
            )
        users[key] = name or "key-" + hashlib.sha256(key.encode()).hexdigest()[:8]
    return users


def own_keys(file: Path) -> list[str]:
    """The entries of a file with a "user:key" in each line, for its owner's eyes only; made where it is missing, with
    one key that is printed this once."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = "sk-" + secrets.token_urlsafe(24)
        with replacing(file) as part, open(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as f:
            f.write(f"me:{key}\n")
        print(f"your API key, kept in {file} (add lines user:key for others): {key}", flush=True)
    return [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]


def from_elsewhere(headers: Mapping[str, str], origins: Collection[str] = ()) -> str | None:
    """The non-loopback Origin or Host of a request, None if there is none. Keyless requests that have one are rejected:
    they are a web page's in somebody's browser (CSRF, DNS rebinding) or come from another machine. `origins`: of the
    pages that may call."""
    for name, prefix in (("origin", ""), ("host", "//")):
        try:
            if name == "origin" and headers.get(name) in origins:
                continue
            if name in headers and urlsplit(prefix + headers[name]).hostname not in LOOPBACK:
                return f"{name} {headers[name]}"
        except ValueError:
            return f"{name} {headers[name]}"
    return None
