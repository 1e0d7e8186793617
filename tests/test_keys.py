"""Who may use the server, and what they can see of other users."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from starlette.responses import JSONResponse

import server
from clients import keys
from clients.keys import Keys, User
from durable.errors import UsageError
from tests.conftest import ROOT


def test_a_key_is_made_once_and_kept_private(tmp_path, capsys):
    made = Keys(tmp_path, needed=True)
    ((key, user),) = made.users().items()
    assert re.fullmatch(r"sk-[\w-]{32}", key) and user == User("me") and key in capsys.readouterr().out
    for name in ("keys", "admin_key"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    again = Keys(tmp_path, needed=True)
    assert again.users() == made.users() and again.admin == made.admin and not capsys.readouterr().out


def test_each_line_of_the_key_file_is_parsed():
    text = "alice:key-a\n\n# a comment\n  bob:key-b untrained \nAnn Lee:a:b\nkey-c\nuntrained\n"
    known = keys.users_of(text)
    assert [(k, u.name, u.trained) for k, u in known.items()][:2] == [("key-a", "alice", True), ("key-b", "bob", False)]
    assert known["b"].name == "Ann Lee:a" and known["key-c"].name.startswith("key-") and known["untrained"].trained


@pytest.mark.parametrize("line", ["alice:", "alice: key", "two words", "bob:key-a", "alice:ключ", "a:b untrained x"])
def test_an_invalid_line_in_the_key_file_is_an_error(line):
    with pytest.raises(UsageError, match="line 2: an API key must"):
        keys.users_of(f"alice:key-a\n{line}\n")


def test_the_key_file_is_read_again_when_it_changes(tmp_path, capsys):
    """While the file is invalid or missing, the earlier keys stay valid."""
    file = tmp_path / "keys"
    found = Keys(tmp_path, needed=False)
    assert found.users() is None
    admin(tmp_path, "--add=alice")
    assert [u.name for u in found.users().values()] == ["alice"]
    admin(tmp_path, "--add=bob")
    admin(tmp_path, "--revoke=alice")
    ((key, user),) = found.users().items()
    assert user == User("bob") and not capsys.readouterr().err
    for broken in (lambda: file.write_text("x:\n"), lambda: file.write_bytes(b"\xff\n"), file.unlink):
        broken()
        assert list(found.users()) == list(found.users()) == [key]
        assert re.fullmatch(rf"{file}: .*; the previous keys stay valid\n", capsys.readouterr().err)
    file.write_text("")
    assert found.users() == {}
    with pytest.raises(UsageError, match="no key in"):
        Keys(tmp_path, needed=False)


def admin(out: Path, *options: str) -> str:
    command = [sys.executable, "-m", "durable.admin", "key", f"--out={out}", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or done.stderr.strip()


def test_keys_are_added_and_revoked_on_the_command_line(tmp_path):
    key = admin(tmp_path / "new", "--add=alice")
    file = tmp_path / "new" / "keys"
    assert keys.users_of(file.read_text()) == {key: User("alice")}
    assert [stat.S_IMODE(p.stat().st_mode) for p in (file, file.parent)] == [0o600, 0o700]
    file.write_text(f"# mine\n{file.read_text().strip()} untrained")
    assert admin(file.parent, "--add=b.b@c-d").startswith("sk-")
    assert file.read_text().startswith(f"# mine\nalice:{key} untrained\nb.b@c-d:sk-")
    assert "1 keys of alice are revoked" in admin(file.parent, "--revoke=alice") and key not in file.read_text()
    for wrong in (["--revoke=alice"], ["--add=a:b"], ["--add=#a"], [], ["--add=a", "--revoke=b"]):
        assert "--add" in (said := admin(file.parent, *wrong)) or "no key of that user" in said


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ({}, None),
        ({"Host": "localhost:8000", "Origin": "http://127.0.0.1:3000"}, None),
        ({"Sec-Fetch-Site": "none"}, None),
        ({"Sec-Fetch-Site": "same-origin"}, None),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://page.example"}, None),  # listed in --origins
        ({"Sec-Fetch-Site": "cross-site"}, "web page"),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"}, "web page"),
        ({"Origin": "http://evil.example"}, "origin http://evil.example"),
        ({"Origin": "null"}, "origin null"),
        ({"Host": "evil.example"}, "host evil.example"),
        ({"Host": "[::1"}, "host"),
        ({"Forwarded": "for=1.2.3.4"}, "proxy"),
        ({"X-Forwarded-For": "1.2.3.4"}, "proxy"),
        ({"X-Forwarded-Anything": ""}, "proxy"),
        ({"X-Real-IP": "1.2.3.4"}, "proxy"),
        ({"Via": "1.1 nginx"}, "proxy"),
    ],
)
async def test_without_keys_only_programs_on_this_machine_are_served(tmp_path, headers, why):
    async with captured(tmp_path, origins=["http://page.example"]) as http:
        reply = await http.get("/status", headers=headers)
        assert reply.status_code == (403 if why else 200)
        if why:
            said = reply.json()["error"]["message"]
            assert why in said and f"add one to {tmp_path}/keys" in said
        (tmp_path / "keys").write_text("alice:key-a\n")
        assert (await http.get("/status", headers=headers)).status_code == 401
        key = {"Authorization": "Bearer key-a"}
        assert (await http.get("/status", headers=headers | key)).json() == {"user": "alice"}


async def test_without_a_key_no_body_is_read(tmp_path):
    """The page's own files need no key, but a POST to their paths does: anybody could fill the memory with bodies."""
    (tmp_path / "keys").write_text("alice:key-a\n")
    async with captured(tmp_path) as http:
        for path in server.OPEN_PATHS:
            assert (await http.get(path)).status_code == (await http.head(path)).status_code == 200
            assert (await http.post(path, content=b"x")).status_code == 401


async def test_metrics_need_the_admins_key(tmp_path):
    async with captured(tmp_path) as http:
        assert (await http.get("/metrics")).status_code == 200
        (tmp_path / "keys").write_text("local:key-a\n")  # the name "local" gives no rights
        with_key = lambda path, key: http.get(path, headers={"X-Api-Key": key})  # noqa: E731
        for path in ("/metrics", "/metrics/", "/metrics?name=x"):
            refused = await with_key(path, "key-a")
            assert refused.status_code == 403 and f"{tmp_path}/admin_key" in refused.json()["error"]["message"]
            assert (await with_key(path, (tmp_path / "admin_key").read_text().strip())).status_code == 200
        assert (await with_key("/metrics", "wrong")).status_code == 401


def captured(out: Path, origins=()) -> httpx.AsyncClient:
    """A client of a small app behind Capture. The app returns the name of the user."""

    async def app(scope, receive, send):
        await JSONResponse({"user": scope["state"]["user"].name})(scope, receive, send)

    p = SimpleNamespace(keys=Keys(out, needed=False), config=SimpleNamespace(web_origins=list(origins)), db=None)
    transport = httpx.ASGITransport(server.Capture(app, p))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


async def test_a_websocket_is_closed(tmp_path):
    async def app(scope, receive, send):
        raise AssertionError("reached")

    sent = []

    async def send(message):
        sent.append(message)

    p = SimpleNamespace(keys=Keys(tmp_path, needed=False), config=SimpleNamespace(web_origins=[]), db=None)
    capture = server.Capture(app, p)
    await capture({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_a_key_is_not_accepted_as_an_argument(tmp_path):
    command = [sys.executable, str(ROOT / "run.py"), "--key=x", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode and "--key" in done.stderr + done.stdout
