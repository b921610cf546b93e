"""Flags from typed dataclasses and signatures: TOML below, the command line on top, the nearest name for a typo."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import inspect
import io
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from ppvae.errors import UsageError

Settings = TypeVar("Settings")


def parse(
    cls: type[Settings],
    args: list[str],
    prog: str,
    description: str,
    extra: Mapping[str, tuple[Any, Any, str]] | None = None,
) -> tuple[Settings, dict[str, Any]]:
    """Reads flags, and `--config file.toml` below them, into a dataclass and further arguments.

    Args:
        extra: further arguments {name: (type, default, help)}. One with the name of a field gets the field's value.

    Raises:
        UsageError: an unknown flag or key, with the nearest name; a value of the wrong type; a required flag missing.
        HelpShown: `--help` was asked for and printed.
    """
    import tyro

    own = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    rest = _dataclass({name: entry for name, entry in (extra or {}).items() if name not in own})
    args, defaults = _with_config((cls, rest), args)
    _check_flags(args, sorted(_flags(cls) | _flags(rest)), prog)
    flat = tyro.conf.arg(name="")
    both = dataclasses.make_dataclass("Options", [("own", Annotated[cls, flat]), ("rest", Annotated[rest, flat])])
    shown, printed = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(printed):
            found: Any = tyro.cli(both, args=[*_as_flags(defaults), *args], prog=prog, description=description)
    except SystemExit as done:
        if done.code in (0, None):
            print(printed.getvalue(), end="")
            raise HelpShown from None
        raise UsageError(_condensed(shown.getvalue() + printed.getvalue(), prog)) from None
    arguments = {name: getattr(found.own if name in own else found.rest, name) for name in extra or {}}
    return found.own, arguments


def _dataclass(extra: Mapping[str, tuple[Any, Any, str]]) -> type:
    import tyro

    fields: list[Any] = []
    for name, (kind, default, text) in extra.items():
        described: Any = Annotated[kind, tyro.conf.arg(help=text or None)]
        if default is inspect.Parameter.empty:
            fields.append((name, described))
        else:
            fields.append((name, described, dataclasses.field(default_factory=functools.partial(copy.copy, default))))
    return dataclasses.make_dataclass("Pair", fields, kw_only=True)


def _check_flags(args: list[str], known: list[str], prog: str) -> None:
    for arg in args:
        if not arg.startswith("--") or arg == "--help":
            continue
        flag = arg.split("=")[0].removeprefix("--").replace("_", "-")
        if flag not in known and re.sub(r"(^|\.)no-", r"\1", flag) not in known:
            near = difflib.get_close_matches(flag, known, 1)
            hint = f"; did you mean --{near[0]}?" if near else f"; `{prog} --help` lists the options"
            raise UsageError(f"unknown option --{flag}{hint}")


class HelpShown(Exception):
    """Help was printed; the command ends well."""


def _flags(cls: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        name = prefix + f.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[f.name]):
            found |= _flags(hints[f.name], f"{name}.")
        else:
            found[name] = hints[f.name]
    return found


def _with_config(classes: tuple[type, ...], args: list[str]) -> tuple[list[str], dict[str, Any]]:
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" not in args:
        return args, {}
    at = args.index("--config")
    if at + 1 >= len(args):
        raise UsageError("--config: expected a TOML file, found nothing after it")
    path = Path(args[at + 1])
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not TOML ({error})") from error
    flat = _flat(content)
    known = {name for cls in classes for name in _flags(cls)}
    for key in flat:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), 1)
            raise UsageError(f"{path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return args[:at] + args[at + 2 :], flat


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in content.items():
        name = prefix + key.replace("_", "-")
        if isinstance(value, Mapping):
            out |= _flat(value, f"{name}.")
        else:
            out[name] = value
    return out


def _as_flags(values: Mapping[str, Any]) -> list[str]:
    out: list[str] = []
    for key, value in values.items():
        if isinstance(value, bool):
            head, _, last = key.rpartition(".")
            out.append(f"--{head}{'.' if head else ''}{'' if value else 'no-'}{last}")
        else:
            out.append(f"--{key}")
            out += [str(v) for v in (value if isinstance(value, list) else [value])]
    return out


def _condensed(text: str, prog: str) -> str:
    """tyro's boxed message as one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [re.sub(r"[│╭╮╰╯─┃━]+", " ", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line.strip("-") and "helptext" not in line and "--help" not in line]
    if "Argument helptext" in text:
        lines = lines[: 1 + next((i for i, line in enumerate(lines) if line.startswith("Error parsing")), len(lines))]
    return f"{' '.join(lines)[:400]} (`{prog} --help` lists the options)"
