"""Access to the server: API keys, and where requests without a key may come from."""

import hashlib
import hmac
import os
import re
import secrets
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from durable.atomic import replacing
from durable.errors import UsageError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ADMIN = "admin_key"  # a file in OUT: its key gives access to all users' data


@dataclass(frozen=True)
class User:
    name: str
    trained: bool = True  # are answers to this key trained on?


OURS = User("")  # the program itself and the admin; their requests are not recorded
ANYBODY = User("local")  # everybody, if no key is needed


def sees_all(user: User) -> bool:
    return user is OURS or user is ANYBODY  # not by name: a key's user may have the same name


def users_of(text: str) -> dict[str, User]:
    """API key -> user, from lines "user:key", or "key" for a user of its own. A space and "untrained" may follow. Keys
    have no spaces. UsageError names an invalid line."""
    users: dict[str, User] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        entry, untrained = re.subn(r"(?<=\S)\s+untrained\s*$", "", line.strip())
        name, _, key = entry.rpartition(":")
        if not re.fullmatch(r"[!-~]+", key) or key in users:
            raise UsageError(f"line {number}: an API key must be unique, not empty, and printable ASCII without spaces")
        users[key] = User(name or "key-" + hashlib.sha256(key.encode()).hexdigest()[:8], not untrained)
    return users


def write_private(file: Path, text: str) -> None:
    """Write a file that only its owner can read."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with replacing(file) as part, open(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as f:
        f.write(text)


def add(file: Path, user: str) -> str:
    """Append a new key for this user to the file, and return it."""
    if not re.fullmatch(r"[\w.@-]+", user):
        raise UsageError(f"--add={user}: expected only letters, digits and . _ - @")
    key = "sk-" + secrets.token_urlsafe(24)
    known = file.read_text() if file.exists() else ""
    write_private(file, known + ("\n" if known and not known.endswith("\n") else "") + f"{user}:{key}\n")
    return key


def revoke(file: Path, user: str) -> int:
    """Remove all keys of this user. Returns how many there were."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    kept = [line for line in lines if user not in [u.name for u in users_of(line).values()]]
    if len(kept) == len(lines):
        raise UsageError(f"--revoke={user}: no key of that user in {file}")
    write_private(file, "".join(kept))
    return len(lines) - len(kept)


class Keys:
    """The keys in OUT/keys, which is read again when it changes, the admin's key, and the program's own."""

    def __init__(self, out: Path, needed: bool) -> None:
        """`needed`: if the file is missing, create it with one key, and print that once. UsageError if a file can't be
        used."""
        self.file, self.stamp = out / "keys", None
        self.own = secrets.token_urlsafe(24)  # for requests of the program to itself
        self.known: dict[str, User] | None = None  # None: no key is needed
        if needed and not self.file.exists():
            print(f"your API key, kept in {self.file}: {add(self.file, 'me')}", flush=True)
        if not (out / ADMIN).exists():
            write_private(out / ADMIN, secrets.token_urlsafe(24) + "\n")
        try:
            self.admin = (out / ADMIN).read_text().strip()
            if self.file.exists():
                self.stamp, self.known = self.stamp_now(), users_of(self.file.read_text())
        except (UsageError, OSError, ValueError) as e:
            raise UsageError(f"{out}: {e}") from e
        if self.known == {} or not self.admin:
            empty = self.file if self.known == {} else out / ADMIN
            raise UsageError(f"no key in {empty}: remove the file, or add a key")

    def user_of(self, headers: Mapping[str, str]) -> User | None:
        """The user whose key a request has. For any other request ANYBODY if no key is needed, otherwise None."""
        users = self.users()
        bearer = re.sub(r"(?i)^bearer\s+", "", headers.get("authorization", "")).strip()
        given = [bearer.encode(), headers.get("x-api-key", "").encode()]
        known = {self.own: OURS, self.admin: OURS, **(users or {})}
        found = [user for key, user in known.items() for g in given if hmac.compare_digest(key.encode(), g)]
        return found[0] if found else ANYBODY if users is None else None

    def stamp_now(self) -> tuple[int, int, int] | None:
        try:
            found = self.file.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def users(self) -> dict[str, User] | None:
        """API key -> user; None if no key is needed. If the file becomes unreadable or is removed, the keys stay as
        they were, so nobody gets in that way."""
        if (stamp := self.stamp_now()) != self.stamp:
            self.stamp = stamp
            try:
                self.known = users_of(self.file.read_text())
            except (UsageError, OSError, ValueError) as e:
                print(f"{self.file}: {e}; the previous keys stay valid", file=sys.stderr, flush=True)
        return self.known


def why_not_keyless(headers: Mapping[str, str], origins: Collection[str] = ()) -> str | None:
    """Why a request without a key is refused although none is needed; None if it isn't refused. It must come from a
    program on this machine, not through a proxy or from a web page in somebody's browser (CSRF, DNS rebinding).
    `origins`: those of web pages that may call."""
    for name in headers:
        if name.lower() in ("forwarded", "x-real-ip", "via") or name.lower().startswith("x-forwarded-"):
            return f"it came through a proxy ({name})"
    allowed = headers.get("origin") in origins
    if not allowed and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return "it was sent by another site's web page (Sec-Fetch-Site)"
    for name, prefix, how in (("origin", "", "came from"), ("host", "//", "was sent to")):
        if name in headers and not (name == "origin" and allowed):
            try:
                known = urlsplit(prefix + headers[name]).hostname in LOOPBACK
            except ValueError:
                known = False
            if not known:
                return f"it {how} {name} {headers[name]}"
    return None
