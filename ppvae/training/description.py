"""Settings of a run as text that is the same in another process: optimizers, schedulers, objectives."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from pyro.infer import ELBO
from pyro.optim import PyroOptim


def describe_setting(setting: Any) -> str:
    """An optimizer, scheduler or objective as text, without addresses in memory.

    >>> import torch
    >>> describe_setting(functools.partial(torch.optim.Adam, lr=0.001))
    'Adam(lr=0.001)'
    """
    if isinstance(setting, functools.partial):
        arguments = ", ".join([*map(describe_setting, setting.args), *_keywords(setting.keywords)])
        return f"{describe_setting(setting.func)}({arguments})"
    if isinstance(setting, PyroOptim):
        options = setting.pt_optim_args
        arguments = describe_setting(options) if callable(options) else ", ".join(_keywords(options))
        return f"{type(setting).__name__}({describe_setting(setting.pt_optim_constructor)}, {arguments})"
    if isinstance(setting, ELBO):
        try:
            defaults = vars(type(setting)())
        except TypeError:  # an objective without default arguments: all of them are listed
            defaults = {}
        changed = {
            k: v for k, v in vars(setting).items()
            if k[0] != "_" and k != "max_plate_nesting" and (k not in defaults or repr(defaults[k]) != repr(v))
        }  # fmt: skip
        listed = _keywords({k: v for k, v in changed.items() if not isinstance(v, dict | list | tuple)})
        return type(setting).__name__ + (f"({', '.join(listed)})" if listed else "")
    if type(setting).__repr__ is object.__repr__:  # which would show an address in memory
        return getattr(setting, "__qualname__", f"{type(setting).__qualname__}({', '.join(_keywords(vars(setting)))})")
    return getattr(setting, "__qualname__", None) or repr(setting)


def _keywords(options: Mapping[str, Any]) -> list[str]:
    return [f"{k}={describe_setting(v) if callable(v) else repr(v)}" for k, v in sorted(options.items())]
