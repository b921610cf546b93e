"""Settings of a run as text that is the same in another process: optimizers, schedulers, objectives."""

import functools
import re
from collections.abc import Mapping
from typing import Any

from pyro.infer import ELBO
from pyro.optim import PyroOptim

from ppvae.objectives.pyro_losses import LossFunction


def setting_text(setting: Any) -> str:
    """An optimizer, scheduler or objective as text, without addresses in memory.

    >>> import torch
    >>> setting_text(functools.partial(torch.optim.Adam, lr=0.001))
    'Adam(lr=0.001)'
    """
    if isinstance(setting, functools.partial):
        arguments = ", ".join([*map(setting_text, setting.args), *_keywords(setting.keywords)])
        return f"{setting_text(setting.func)}({arguments})"
    if isinstance(setting, PyroOptim):
        options = setting.pt_optim_args
        arguments = setting_text(options) if callable(options) else ", ".join(_keywords(options))
        return f"{type(setting).__name__}({setting_text(setting.pt_optim_constructor)}, {arguments})"
    if isinstance(setting, LossFunction):
        return setting_text(setting.function)
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


def renamed_since_0_1(text: Any) -> Any:
    """A setting that 0.1 wrote, in today's names: `Plus` is `AuxiliaryLoss`, its `of` is `objective`.

    >>> renamed_since_0_1("Plus(gradient=Pathwise(), of=ELBO(), separate=True, term=f)")
    'AuxiliaryLoss(factorizes_over_data=True, gradient=Pathwise(), objective=ELBO(), term=f)'
    """
    pattern = r"^Plus\((.*?)\bof=(.*)\bseparate=(True|False), "
    new = r"AuxiliaryLoss(factorizes_over_data=\3, \1objective=\2"
    return re.sub(pattern, new, text) if isinstance(text, str) else text


def _keywords(options: Mapping[str, Any]) -> list[str]:
    return [f"{k}={setting_text(v) if callable(v) else repr(v)}" for k, v in sorted(options.items())]
