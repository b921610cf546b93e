"""Effect handlers of guides that are made of other programs: sites recorded, renamed, and put into their plates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor


class LatentSites(Messenger):
    """Records contexts and values of a program's latents and subsamples, and renames the latents to auxiliary sites."""

    def __init__(self, names: Mapping[str, Any], suffix: str = ""):
        super().__init__()
        self.names, self.suffix = {f"{name}{suffix}": name for name in names}, suffix
        self.contexts: dict[str, Any] = {}
        self.values: dict[str, Tensor] = {}
        self.subsamples: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if f"{name}{self.suffix}" not in self.names or msg["is_observed"] or isinstance(msg["fn"], _Subsample):
            return
        self.contexts[name] = msg["cond_indep_stack"], msg["scale"], msg["mask"]
        if self.suffix:
            msg["name"] = f"{name}{self.suffix}"
            msg["infer"] = {**(msg["infer"] or {}), "is_auxiliary": True}

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            self.subsamples[msg["name"]] = msg["value"]
        elif msg["name"] in self.names:
            self.values[self.names[msg["name"]]] = msg["value"]

    def context(self, name: str) -> SiteContext:
        return SiteContext(*self.contexts[name])


class SiteContext(Messenger):
    """Puts sites into the plates, scale and mask of another one."""

    def __init__(self, frames: Any, scale: Any, mask: Any):
        super().__init__()
        self.frames, self.scale, self.mask = frames, scale, mask

    def _pyro_sample(self, msg: Any) -> None:
        msg["cond_indep_stack"] = (*self.frames, *msg["cond_indep_stack"])
        msg["scale"], msg["mask"] = self.scale * msg["scale"], self.mask
        BroadcastMessenger._pyro_sample(msg)


class GivenValues(Messenger):
    """Gives latents and subsamples their values."""

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self.values_by_name = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values_by_name and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values_by_name[msg["name"]], True
