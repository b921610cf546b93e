"""Python files of users: run from the source that was digested, and, for a saved run, only where that is trusted.

A file that a user names is run as it is, and its digest is kept for the run's configuration. A run that is loaded names
files, too: these, and the modules that they import from their folder, are run if they are those that the run recorded
and the user trusts them (`ppvae.run_folder.trust`). Compiled files beside a source, `__pycache__`, are never read.

What a run names is called with arguments that lie in its folder. So it must be defined in such a file or be one of
ppvae's own parts; a name of anything else, as `package.module:factory` of an installed package, is itself something
that the run recorded and the user trusts, by the SHA-256 of the name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from ppvae.errors import CheckpointError, UsageError
from ppvae.run_folder.trust import is_trusted, remember
from ppvae.storage import read_bytes, sha256

log = logging.getLogger("ppvae")


PARTS = ("models", "priors", "likelihoods", "posteriors", "nn", "distributions")  # rooms: their classes touch no file


class UntrustedCodeError(UsageError):
    """A run would run code that the user has not trusted.

    Attributes:
        path: a Python file, or the name of a function or class outside such files.
        digest: the SHA-256 of the file or of the name.
    """

    def __init__(self, path: Path | str, digest: str):
        self.path, self.digest = path, digest
        what = "run this file" if isinstance(path, Path) else "call this with arguments of its own"
        super().__init__(
            f"{path}: the run would {what}, which you have not trusted (SHA-256 {digest[:12]}...). Read it; "
            f"then pass --trust once (in Python load(..., trust=True)), or the pair: load(directory, model, guide)"
        )


@dataclass(frozen=True)
class _Policy:
    """What may be run: all, where the user named the files; else what a run recorded and the user trusts."""

    run: Path | None = None
    recorded: frozenset[str] | None = None  # digests; None for runs that recorded none
    trust: bool = False

    def admit(self, path: Path | str, content: bytes) -> None:
        digest = sha256(content)
        if self.run is not None and not self.trust:
            if self.recorded is not None and digest not in self.recorded:
                kind = "file" if isinstance(path, Path) else "name"
                raise CheckpointError(
                    f"{path}: is not a {kind} that {self.run} was trained with: no {kind} of SHA-256 {digest[:12]}... "
                    f"was recorded. Restore it from a copy, or pass --trust (trust=True) to run it as it is"
                )
            if not is_trusted(digest):
                raise UntrustedCodeError(path, digest)
        if self.trust:
            remember({str(path): digest})
        _digests[path] = digest


_digests: dict[Path | str, str] = {}  # of the files that this process has run, and of names outside them
_modules: set[str] = set()  # names of the modules that were run from these files
_policies: dict[Path, _Policy] = {}  # by folder, for the modules in it
_NAMED_BY_THE_USER = _Policy()
_current: ContextVar[_Policy] = ContextVar("policy", default=_NAMED_BY_THE_USER)


class _Loader(SourceFileLoader):
    """Runs the source that was admitted, and reads and writes no compiled file."""

    def __init__(self, fullname: str, path: str, policy: _Policy):
        super().__init__(fullname, path)
        self.policy = policy

    def get_code(self, fullname: str) -> CodeType | None:
        path = Path(self.path).resolve()
        content = read_bytes(path)
        self.policy.admit(path, content)
        _modules.add(fullname)
        return self.source_to_code(content, self.path)


class _Finder(MetaPathFinder):
    """Finds modules as Python does, and puts those in folders of users under their policy."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target)
        origin = None if spec is None or not spec.has_location or spec.origin is None else Path(spec.origin).resolve()
        if spec is None or origin is None or _is_installed(fullname, origin):
            return None
        policy = next((_policies[p] for p in origin.parents if p in _policies), None)
        if policy is None:
            return None
        if type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(fullname, str(spec.origin), policy)
        elif policy.run is not None:
            raise CheckpointError(f"{origin}: is no Python source, and {policy.run} may run nothing else. Remove it")
        return spec


def _is_installed(fullname: str, origin: Path) -> bool:
    """Whether a module is ppvae's own or in the environment, which may lie below a folder of the user."""
    places = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return fullname.partition(".")[0] == "ppvae" or bool(places & {*origin.parents})


def guard_folder(folder: Path) -> None:
    """Puts the modules of a folder, wherever they are imported from, under the policy of the present command."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _policies[folder.resolve()] = _current.get()


def import_file(path: Path) -> ModuleType:
    """Runs a Python file as a module of its own; its folder is on the import path meanwhile.

    Raises:
        UntrustedCodeError, CheckpointError: inside `code_of_run`, the file may not be run.
    """
    path = path.resolve()
    guard_folder(path.parent)
    name = f"ppvae_pair_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(name, str(path), _current.get()))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def admit_place(text: str) -> None:
    """Admits the module of a name "place:name" before it is imported: an installed one by the name.

    Raises:
        UntrustedCodeError, CheckpointError: inside `code_of_run`, it may not be imported.
    """
    policy, place = _current.get(), text.partition(":")[0]
    if policy.run is None or os.path.exists(place) or _is_part(place):
        return
    spec = importlib.util.find_spec(place.partition(".")[0])
    places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or ())]
    if spec is not None and not any(p in _policies for path in places for p in Path(path).resolve().parents):
        policy.admit(text, text.encode())


def admit_object(text: str, found: Any) -> None:
    """Admits what a name "place:name" leads to: by the name, unless place and object are in files that were admitted.

    Raises:
        UntrustedCodeError, CheckpointError: inside `code_of_run`, it may not be called.
    """
    module = found.__name__ if isinstance(found, ModuleType) else getattr(found, "__module__", None) or ""
    if not (_is_admitted(text.partition(":")[0]) and _is_admitted(module)):
        _current.get().admit(text, text.encode())


def _is_admitted(place: str) -> bool:
    """Whether a file or a module is a part of ppvae, or was run from a source that was admitted."""
    own = Path(place).resolve() in _digests if place.endswith(".py") else place in _modules
    return own or _is_part(place)


def _is_part(module: str) -> bool:
    room, _, rest = module.partition(".")
    return room == "ppvae" and rest.partition(".")[0] in PARTS


@contextlib.contextmanager
def code_of_run(
    folder: Path | None, config: Mapping[str, Any], trust: bool, recorded: Iterable[str] | None = None
) -> Iterator[None]:
    """Inside the block a run's code is run only if it recorded it and the user trusts it, or with `trust`.

    Args:
        recorded: the digests that the run's checkpoint holds; None where it holds none, and config.json has them.
    """
    code, pair = config.get("code"), config.get("pair") or {}
    if recorded is None and code is not None:
        recorded = map(str, code.values())
    recorded = None if recorded is None else frozenset(recorded)
    token = _current.set(_Policy(folder or Path("the run"), recorded, trust))
    before, own = dict(_policies), {Path(place).resolve() for place in sys.path}
    try:
        for place in (folder, *map(Path, pair.get("path") or ())):
            if place is not None:
                guard_folder(place)
        if recorded is None and _files_of(pair):
            log.warning("ppvae: %s: recorded no digest of its code: whether the code has changed is not known", folder)
        yield
    finally:
        _current.reset(token)
        for place in own & _policies.keys():  # what the user imports later from a folder of their own is the user's
            if place in before:
                _policies[place] = before[place]
            else:
                del _policies[place]


def recorded_code(pair: Any) -> dict[str, str]:
    """{path: SHA-256} of the Python files that an entry "pair" of a configuration names and of what they imported, and
    {name: SHA-256} of names outside them."""
    files = _files_of(pair)
    folders = {path.parent for path in files} | {Path(p).resolve() for p in _path_of(pair)}
    code = {str(p): digest for p, digest in _digests.items() if isinstance(p, Path) and folders & {*p.parents}}
    for path in files:
        code.setdefault(str(path), sha256(read_bytes(path)))
    code |= {name: _digests[name] for name in _texts_of(pair) if name in _digests}
    return dict(sorted(code.items()))


def _path_of(pair: Any) -> list[str]:
    return list(pair.get("path") or ()) if isinstance(pair, Mapping) else []


def _files_of(entry: Any) -> set[Path]:
    """The Python files named in an entry: "file.py", "file.py:name", at any depth."""
    places = (text.partition(":")[0] for text in _texts_of(entry))
    return {Path(place).resolve() for place in places if place.endswith(".py") and Path(place).is_file()}


def _texts_of(entry: Any) -> set[str]:
    """The strings in an entry, at any depth."""
    if isinstance(entry, Mapping):
        entry = list(entry.values())
    if isinstance(entry, list | tuple):
        return set().union(*map(_texts_of, entry))
    return {entry} if isinstance(entry, str) else set()
