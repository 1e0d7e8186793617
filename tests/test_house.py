"""Rules that keep the code readable and the docs correct."""

import ast
import re
import shutil
import subprocess
import typing
from pathlib import Path

import pytest

import config
from durable import admin
from evaluation import talk
from tests.conftest import ROOT

FOLDERS = (".", "machine", "web", "durable", "clients", "evaluation")
SOURCES = [p for folder in FOLDERS for p in sorted((ROOT / folder).glob("*.py"))]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PURE_MATHS = ("grpo.py", "distill.py")  # a loss takes each float as its own parameter


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_fit_on_a_screen(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            parameters = [a.arg for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")]
            assert lines <= 80, f"{node.name} has {lines} lines"
            assert len(parameters) <= 6 or path.name in PURE_MATHS, f"{node.name} has {len(parameters)} parameters"


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_named_in_the_docs_exist(path: Path):
    text = path.read_text()
    named = re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|md|jsonl|json|png))`|`([\w/]+/)`", text)
    named = {file or folder for file, folder in named} | {
        n for n in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in n
    }
    ours = [n for n in named if not n.startswith("mine/") and n not in ("metrics.jsonl", "out/")]
    missing = [n for n in ours if not any((base / n).exists() for base in (ROOT, path.parent))]
    assert not missing


def commands() -> list[str]:
    """The commands in the docs that start one of our programs, without comments."""
    found = re.findall(
        r"(?:python|PY\)) ((?:run\.py|-m (?:evaluation|durable|clients)\.\w+)[^\n`#]*)",
        "\n".join(p.read_text() for p in DOCS),
    )
    return sorted({c.strip() for c in found})


def test_commands_in_the_docs_are_valid():
    seen = commands()
    assert len(seen) >= 8
    for command in seen:
        words = command.split()
        module = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
        arguments = [w.replace("…", "x") for w in words if w.startswith("--") and w != "--help"]
        if module == "run":
            config.parse(arguments)
        elif module == "evaluation.talk":
            talk.parse(arguments)
        elif module == "durable.admin":
            command_of = {c.__name__.lower(): c for c in typing.get_args(admin.Command)}
            known = set(command_of[words[2]].__dataclass_fields__)
            assert {a[2:].split("=")[0] for a in arguments} <= known, command
        else:
            assert (ROOT / (module.replace(".", "/") + ".py")).exists(), command


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_the_systemd_unit_is_valid(tmp_path):
    unit = (ROOT / "docs" / "nano-openclaw-rl.service").read_text()
    (tmp_path / "checked.service").write_text(unit.replace("%h/nano-openclaw-rl", str(ROOT)))
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "checked.service")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "checked.service" not in done.stderr, done.stderr  # an unknown key is a warning
