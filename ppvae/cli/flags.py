"""Flags from typed dataclasses and signatures, read from TOML files and the command line, which goes first."""

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Annotated, Any, TypeVar

from ppvae.errors import CheckpointError, UsageError, did_you_mean
from ppvae.errors.ranges import check_known_ranges
from ppvae.factories.constructor_flags import Argument, ClassChoice, class_choice
from ppvae.storage import read_bytes

Settings = TypeVar("Settings")


def parse(
    cls: type[Settings],
    args: list[str],
    prog: str,
    description: str,
    extra: Mapping[str, Argument] | None = None,
    label: Callable[[str], str] | None = None,
) -> tuple[Settings, dict[str, Any]]:
    """Reads flags, and those of `--config file.toml` that the command line leaves out, as (settings, arguments).

    Args:
        extra: further arguments {name: (type, default, help)}. One with the name of a field gets the field's value.
            One whose type is a `choices.ClassChoice` becomes a flag that names the class and flags `--name.argument` of
            its constructor, and is returned as {"name": ..., argument: ...}.
        label: what messages on a range call an option of that name; by default its flag.

    Raises:
        UsageError: an unknown flag or key, with the nearest name; a value of the wrong type or out of its range; a
            required flag missing.
        HelpShown: `--help` was asked for and printed.
    """
    import tyro

    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    entries = {name: entry for name, entry in (extra or {}).items() if name not in fields}
    choices = {name: choice for name, (kind, _, _) in entries.items() if (choice := class_choice(kind)) is not None}
    args, path, content = _read_config(args, choices)
    chosen = {name: _choose(name, choice, entries[name][1], args, content) for name, choice in choices.items()}
    extra_cls = _make_dataclass(entries, chosen)
    known = _flags(cls) | _flags(extra_cls)
    for key in content:
        if key not in known:
            raise UsageError(f"{path}: unknown key {key!r}{did_you_mean(key, sorted(known))}")
    _check_flags(args, sorted(known), prog, {name: class_name for name, (class_name, _) in chosen.items()})
    flat = tyro.conf.arg(name="")
    options_cls = dataclasses.make_dataclass(
        "Options", [("settings", Annotated[cls, flat]), ("extra", Annotated[extra_cls, flat])]
    )
    stderr, stdout = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
            options: Any = tyro.cli(options_cls, args=[*_as_flags(content), *args], prog=prog, description=description)
    except SystemExit as stop:
        if stop.code in (0, None):
            print(stdout.getvalue(), end="")
            raise HelpShown from None
        raise UsageError(_one_line(stderr.getvalue() + stdout.getvalue(), prog)) from None
    arguments = {name: getattr(options.settings if name in fields else options.extra, name) for name in extra or {}}
    for name in choices:
        given = vars(getattr(options.extra, f"{name}_arguments"))
        with _naming_class(f"{flag(name)} {arguments[name]}"):
            check_flags_of(choices[name].constructor(arguments[name], name), given, f"{name}.")
        arguments[name] = {"name": arguments[name], **given}
    _check_settings(options.settings, label or flag)
    return options.settings, arguments


def flag(name: str) -> str:
    """The flag of an argument, or of an argument of a chosen class.

    >>> flag("data_seed"), flag("objective.num_particles")
    ('--data-seed', '--objective.num-particles')
    """
    return "--" + name.replace("_", "-")


def read_settings(cls: type[Settings], content: Mapping[str, Any], place: str) -> Settings:
    """The settings that a file holds as {name: value}, None for a default.

    Raises:
        CheckpointError: an unknown name, or a value of the wrong type or out of its range.
    """
    try:
        flags = _as_flags(_flatten({name: value for name, value in content.items() if value is not None}))
        return parse(cls, flags, place, "", label=str)[0]
    except UsageError as error:
        raise CheckpointError(f"{place}: {error}. Restore the file from a copy") from error


def check_flags_of(function: Any, given: Mapping[str, Any], group: str = "") -> None:
    """Checks the ranges of the flags of a function of ppvae, Pyro or torch; what a user's own takes is the user's.

    Args:
        group: the flag that chooses the function, with a dot, as `prior.`.
    """
    if str(getattr(function, "__module__", "")).partition(".")[0] in ("ppvae", "pyro", "torch"):
        check_known_ranges(given, lambda name: flag(group + name))


def _check_settings(settings: Any, label: Callable[[str], str], group: str = "") -> None:
    """Checks the ranges of all numbers of a command's options, those of groups of options counted in."""
    check_known_ranges(vars(settings), lambda name: label(group + name))
    for name, value in vars(settings).items():
        if dataclasses.is_dataclass(value):
            with _naming_class(f"{label(name)}.name {vars(value)['name']}"):
                _check_settings(value, label, f"{name}.")


@contextlib.contextmanager
def _naming_class(chosen: str) -> Iterator[None]:
    """Errors in the block say of which chosen class the argument is."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{error} (of {chosen})") from None


def _choose(
    name: str, choice: ClassChoice, default: Any, args: list[str], content: Mapping[str, Any]
) -> tuple[str, dict[str, Argument]]:
    """(the name of the class chosen by flag, file or default, the arguments of its constructor)."""
    option, key = flag(name), name.replace("_", "-")
    values = [a.split("=", 1)[1] for a in args if a.startswith(f"{option}=")]
    values += [value for before, value in pairwise(args) if before == option]
    if not values and key not in content and default is inspect.Parameter.empty:
        raise UsageError(f"{option}: expected one of {', '.join(sorted(choice.classes))}; found nothing")
    class_name = str((values or [content.get(key, getattr(default, "__qualname__", default))])[-1])
    return class_name, choice.flags(choice.constructor(class_name, key))


def _make_dataclass(entries: Mapping[str, Argument], chosen: Mapping[str, tuple[str, dict[str, Argument]]]) -> type:
    """A dataclass of arguments; the arguments of a chosen class are a dataclass inside it."""
    import tyro

    fields: list[Any] = []
    for name, (kind, default, text) in entries.items():
        choice = class_choice(kind)
        if choice is not None:
            kind, default = str, chosen[name][0]
            text = f"{text.rstrip('.')}: one of {', '.join(sorted(choice.classes))}; or your own, file.py:Class"
        described: Any = Annotated[kind, tyro.conf.arg(help=text or None)]
        if default is inspect.Parameter.empty:
            fields.append((name, described))
        else:
            fields.append((name, described, dataclasses.field(default_factory=functools.partial(copy.copy, default))))
        if choice is not None:
            flag = name.replace("_", "-")
            inner: Any = Annotated[_make_dataclass(chosen[name][1], {}), tyro.conf.arg(name=flag)]
            fields.append((f"{name}_arguments", inner, dataclasses.field(metadata={"flag": flag})))
    return dataclasses.make_dataclass("Pair", fields, kw_only=True)


def _check_flags(args: list[str], known: list[str], prog: str, chosen: Mapping[str, str]) -> None:
    for arg in args:
        if not arg.startswith("--") or arg == "--help":
            continue
        flag = arg.split("=")[0].removeprefix("--").replace("_", "-")
        if flag in known or re.sub(r"(^|\.)no-", r"\1", flag) in known:
            continue
        head, dot, _ = flag.partition(".")
        near = difflib.get_close_matches(flag, known, 1)
        hint = f"; did you mean --{near[0]}?" if near else f"; `{prog} --help` lists the options"
        if dot and head in chosen:
            accepted = [f"--{k}" for k in known if k.startswith(f"{head}.")]
            hint = f": {chosen[head]} takes {', '.join(accepted) or 'none'}{hint if near else ''}"
        raise UsageError(f"unknown option --{flag}{hint}")


class HelpShown(Exception):
    """Help was printed, and the command ends with status 0."""


def _flags(cls: Any, prefix: str = "") -> dict[str, Any]:
    flags: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        name = prefix + f.metadata.get("flag", f.name.replace("_", "-"))
        if dataclasses.is_dataclass(hints[f.name]):
            flags |= _flags(hints[f.name], f"{name}.")
        else:
            flags[name] = hints[f.name]
    return flags


def _read_config(args: list[str], choices: Iterable[str]) -> tuple[list[str], Path | None, dict[str, Any]]:
    """(the arguments without `--config FILE`, the file, its content as {flag: value}).

    A table of a choice may hold the class's name under `name`, as `[prior]` with `name = "MAF"`.
    """
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" not in args:
        return args, None, {}
    at = args.index("--config")
    if at + 1 >= len(args):
        raise UsageError("--config: expected a TOML file, found nothing after it")
    path = Path(args[at + 1])
    try:
        content = _flatten(tomllib.loads(read_bytes(path).decode()))
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror})") from error
    except RecursionError:
        raise UsageError(f"--config {path}: not options in TOML (nested too deeply)") from None
    except ValueError as error:
        raise UsageError(f"--config {path}: not TOML ({error})") from error
    names = {f"{key}.name": key for key in (name.replace("_", "-") for name in choices)}
    return args[:at] + args[at + 2 :], path, {names.get(key, key): value for key, value in content.items()}


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in content.items():
        name = prefix + key.replace("_", "-")
        if isinstance(value, Mapping):
            out |= _flatten(value, f"{name}.")
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


def _one_line(text: str, prog: str) -> str:
    """tyro's boxed message as one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [re.sub(r"[│╭╮╰╯─┃━]+", " ", line).strip() for line in text.splitlines()]
    lines = lines[1:] or lines  # the first one is the title, which the text repeats
    message = takewhile(lambda line: not line.startswith(("Argument helptext", "Got errors")), lines)
    kept = [line for line in message if line.strip("-") and "helptext" not in line and "--help" not in line]
    return f"{_expected_found(' '.join(kept))[:400]} (`{prog} --help` lists the options)"


def _expected_found(text: str) -> str:
    """tyro's message on the value of a flag in the words of those on its range: expected, found."""
    option, value = r"Error parsing (?P<option>--[^ :]+): ", r"(?P<found>['\"].*)"  # int() cuts long ones
    patterns = {
        rf"{option}invalid literal for int.*: {value}": "a whole number",
        rf"{option}could not convert string to float: {value}": "a number",
        rf"{option}no type matching (?P<kinds>.*) could be instantiated from \[ ?{value} ?\]\.": "",
        rf"{option}Could not find valid parse for arguments: \[ ?{value} ?\]": "numbers",
        rf"invalid choice {value} for argument '(?P<option>.*)'\. Expected one of \((?P<names>.*)\)\.": "one of ",
        r"Missing value for argument '(?P<option>.*)'\. Expected .*": "a value",
    }
    words = {"INT": "a whole number", "FLOAT": "a number", "[INT [INT ...]]": "whole numbers", "None": "None"}
    for pattern, expected in patterns.items():
        if (match := re.fullmatch(pattern, text)) is None:
            continue
        parts = match.groupdict()
        kinds = [kind.strip("{}") for kind in parts.get("kinds", "").split("|")]
        kinds.sort(key="None".__eq__)
        expected += " or ".join(words.get(kind, kind) for kind in kinds) + parts.get("names", "").replace("'", "")
        found = parts.get("found", "nothing")
        return f"{parts['option']}: expected {expected}, found {found if len(found) < 80 else f'{found[:40]}...'}"
    return text
