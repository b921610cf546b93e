"""What a run was started with, in words and digests that are the same in another process."""

from __future__ import annotations

import functools
from typing import Any

from pyro.infer import ELBO
from pyro.optim import PyroOptim

from ppvae.data.loader import Columns


def columns_digest(columns: Columns) -> str:
    """The SHA-256 of each column of the data."""
    from ppvae import data as datasets

    return " ".join(p.digest if hasattr(p, "digest") else datasets.digest(p) for p in columns.parts)


def describe_setting(thing: Any) -> str:
    """An optimizer, schedule or objective in words that are the same in another process."""
    if isinstance(thing, functools.partial):
        inside = ", ".join([*map(describe_setting, thing.args), *_keywords(thing.keywords)])
        return f"{describe_setting(thing.func)}({inside})"
    if isinstance(thing, PyroOptim):
        options = thing.pt_optim_args
        shown = describe_setting(options) if callable(options) else ", ".join(_keywords(options))
        return f"{type(thing).__name__}({describe_setting(thing.pt_optim_constructor)}, {shown})"
    if isinstance(thing, ELBO):
        try:
            usual = vars(type(thing)())
        except TypeError:  # an objective that needs arguments: all of them are told
            usual = {}
        own = {k: v for k, v in vars(thing).items() if k[0] != "_" and (k not in usual or repr(usual[k]) != repr(v))}
        own.pop("max_plate_nesting", None)  # found out on the way
        told = _keywords({k: v for k, v in own.items() if not isinstance(v, dict | list | tuple)})
        return type(thing).__name__ + (f"({', '.join(told)})" if told else "")
    if type(thing).__repr__ is object.__repr__:  # which would tell an address in memory
        return getattr(thing, "__qualname__", f"{type(thing).__qualname__}({', '.join(_keywords(vars(thing)))})")
    return getattr(thing, "__qualname__", None) or repr(thing)


def _keywords(options: dict[str, Any]) -> list[str]:
    return [f"{k}={describe_setting(v) if callable(v) else repr(v)}" for k, v in sorted(options.items())]
