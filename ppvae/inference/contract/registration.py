"""Parameter registration: one name for two tensors, a name that does not exist, a module that is never registered."""

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.params.param_store import ParamStoreDict
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints

from ppvae.errors import ContractError, site_error
from ppvae.inference.param_store import unconstrained, unwrap
from ppvae.inference.sites import graph_leaves
from ppvae.inference.tracing import Program, node_log_prob


def _name_conflict(name: str) -> ContractError:
    return ContractError(
        f"parameter {name!r} is registered already for another module, or loaded from a file: Pyro would silently keep "
        f"the old parameters; give each module a name of its own, or call pyro.clear_param_store(); to take loaded "
        f"values, call model and guide once before, and pyro.module with update_module_params=True"
    )


class CheckRegistration(Messenger):
    """Checks param sites: refuses one name for two tensors and, where `create` is false, names that do not exist.

    Of sample sites it refuses distributions that are torch's and not Pyro's.

    `pyro.module` called again under a used name silently keeps the old parameters, so that the new module would never
    be trained; an evaluation that creates a parameter would report on an initial value. `params` collects the
    unconstrained tensors by name.
    """

    def __init__(self, create: bool):
        super().__init__()
        self.create = create
        self.params: dict[str, Tensor] = {}
        self._local: dict[str, tuple[Tensor, Any]] = {}
        self._unconstrained: dict[int, tuple[PyroModule, dict[str, Any]]] = {}

    def __enter__(self) -> Any:
        self._hook = nn.modules.module.register_module_forward_pre_hook(self._record_unconstrained)
        return super().__enter__()

    def __exit__(self, kind: Any, *exception: Any) -> Any:
        self._hook.remove()
        result = super().__exit__(kind, *exception)
        conflict = ""
        for module, before in self._unconstrained.values():
            for name, p in before.items():
                if module._parameters[name] is not p:  # replaced by Pyro with the store's tensor of that name
                    module._parameters[name], conflict = p, name.removesuffix("_unconstrained")
        if conflict and kind is None:
            raise _name_conflict(conflict)
        return result

    def _record_unconstrained(self, module: nn.Module, _: Any) -> None:
        """Records the unconstrained parameters that a PyroModule has before its call."""
        if isinstance(module, PyroModule) and id(module) not in self._unconstrained:
            unconstrained = {n: p for n, p in module._parameters.items() if n.endswith("_unconstrained")}
            self._unconstrained[id(module)] = (module, unconstrained)

    def _pyro_sample(self, msg: Any) -> None:
        """Refuses a distribution of torch's own, which Pyro cannot draw from or, where the guide does, cannot scale."""
        fn = msg["fn"]
        if isinstance(fn, torch.distributions.Distribution) and not isinstance(fn, dist.Distribution):
            kind = type(fn)
            raise site_error(
                msg["name"],
                "a distribution of Pyro",
                f"{kind.__module__.rpartition('.')[0] or kind.__module__}.{kind.__name__}",
                "import it from pyro.distributions, which has those of torch under the same names; derive one of your "
                "own from pyro.distributions.TorchDistribution",
            )

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        if _is_module_local(msg):
            return
        init = msg["args"][1] if len(msg["args"]) > 1 else msg["kwargs"].get("init_tensor")
        stored = pyro.get_param_store()._params.get(name)
        if stored is not None:
            if isinstance(init, nn.Parameter) and stored is not init and not _updates_module():
                raise _name_conflict(name)
        elif not self.create and not isinstance(init, nn.Parameter):
            raise ContractError(
                f"parameter {name!r} does not exist: evaluating a pair must not create parameters; "
                f"evaluate run.model and run.guide of the run that trained it, or train the pair first"
            )

    def _pyro_post_param(self, msg: Any) -> None:
        name = msg["name"]
        self.params[name] = unconstrained(msg["value"])
        if _is_module_local(msg):
            self._local[name] = self.params[name], msg["kwargs"].get("constraint", constraints.real)

    def store_module_local(self) -> None:
        """Puts the parameters that Pyro keeps out of its store (`module_local_params`) into the current one."""
        store = pyro.get_param_store()
        for name, (p, constraint) in self._local.items():
            store._params[name], store._constraints[name], store._param_to_name[p] = p, constraint, name


def _is_module_local(msg: Any) -> bool:
    """Whether a param site is the attribute of a PyroModule under `pyro.settings.set(module_local_params=True)`."""
    return not isinstance(getattr(msg["fn"], "__self__", None), ParamStoreDict)


def _updates_module() -> bool:
    """Whether `pyro.module` is being called with update_module_params, and gives a module the store's parameters."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not pyro.module.__code__:
        frame = frame.f_back
    return frame is not None and bool(frame.f_locals["update_module_params"])


def check_registered(
    model: Program,
    guide: Program,
    registered: Mapping[str, Tensor],
    model_nodes: Mapping[str, Any],
    guide_nodes: Mapping[str, Any],
    batch: tuple[Any, ...],
) -> None:
    """Every parameter that the log-densities depend on is registered; SVI would leave any other untrained, silently."""
    known = {id(p) for p in registered.values()} | {id(t) for t in batch}
    roots = [node_log_prob(node).sum() for node in (*model_nodes.values(), *guide_nodes.values())]
    for variable in graph_leaves(*roots):
        if id(variable) not in known:
            where = _variable_name(variable, model, guide)
            raise ContractError(
                f"a parameter of shape {list(variable.shape)}{where}: expected every parameter that the pair uses to "
                f"be registered; found it in none of pyro.param, pyro.module. SVI would never train it: call "
                f"pyro.module('name', network) in the function that uses it"
            )


def _variable_name(variable: Tensor, *functions: Callable[..., Any]) -> str:
    """The name of an unregistered parameter, as " (module.parameter)", from closures and globals; empty if unknown."""
    for function in functions:
        fn = unwrap(function)
        code = getattr(fn, "__code__", None)
        if code is None:
            continue
        cells = dict(zip(code.co_freevars, (c.cell_contents for c in fn.__closure__ or ()), strict=False))
        places = cells | {n: fn.__globals__[n] for n in code.co_names if n in fn.__globals__}
        for place, module in places.items():
            if isinstance(module, nn.Module):
                for name, p in module.named_parameters():
                    if p is variable:
                        return f" ({place}.{name})"
    return ""
