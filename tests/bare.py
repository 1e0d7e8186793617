"""A program with a journal, but without an engine or a trainer."""

from dataclasses import MISSING, fields
from types import SimpleNamespace

from config import Config
from program import Program


def program(db, **config):
    needed = [f.name for f in fields(Program) if f.default is MISSING and f.default_factory is MISSING]
    state = SimpleNamespace(step=0, baselines={}, owner="")
    return Program(**dict.fromkeys(needed) | {"config": Config(**config), "db": db, "states": {"": state}})
