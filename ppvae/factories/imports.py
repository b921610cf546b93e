"""Modules of users, by file or by import path: what holds a pair, a part or an objective."""

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from ppvae.errors import PpvaeError, UsageError, did_you_mean
from ppvae.factories.user_code import admit_object, admit_place, guard_folder, import_file

_loaded: dict[Path, tuple[bytes, ModuleType]] = {}  # files that were imported, with their source


def import_named(text: str, *, fresh: bool = False) -> Any:
    """The object of "file.py:name" or "package.module:name"; the name may be dotted. `fresh` as for `import_place`.

    Raises:
        UsageError: it cannot be imported, or there is no such name; the message names the nearest.

    >>> import_named("ppvae.errors:UsageError").__name__
    'UsageError'
    """
    place, _, name = text.partition(":")
    admit_place(text)
    found = import_place(place, fresh=fresh)
    for part in name.split("."):
        if not hasattr(found, part):
            hint = did_you_mean(part, (n for n in vars(found) if not n.startswith("_")))
            raise UsageError(f"{text}: {place} has no {part!r}{hint}")
        found = getattr(found, part)
    admit_object(portable_name(text), found)
    return found


def import_place(place: str, *, fresh: bool = False) -> ModuleType:
    """The module of a Python file, or of an import path; the working folder, and that of the file, are searched too.

    A file is run once, so that a pair and a part of one file share their classes; again where its source has changed,
    or where `fresh`, as for a new pair with parameters of its own.

    Raises:
        UsageError: it cannot be found or imported.
    """
    path = Path(place)
    try:
        if path.suffix == ".py" or path.exists():
            if not path.is_file():
                raise UsageError(f"{place}: expected a Python file, found none")
            return _import_file(path.resolve(), fresh)
        if importlib.util.find_spec(place.partition(".")[0]) is None:
            guard_folder(Path.cwd())
            add_to_import_path([str(Path.cwd())])
        return importlib.import_module(place)
    except PpvaeError:
        raise
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{place}: could not be imported ({error}). Give a file, as in pairs.py:my_pair, or an importable module, "
            f"as in ppvae.models:vae"
        ) from error
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())[:200]
        raise UsageError(f"{place}: could not be imported ({type(error).__name__}: {text})") from error


def _import_file(path: Path, fresh: bool) -> ModuleType:
    source = path.read_bytes()
    add_to_import_path([str(path.parent)])  # for imports inside its functions
    if not fresh and path in _loaded and _loaded[path][0] == source:
        return _loaded[path][1]
    module = import_file(path)
    _loaded[path] = source, module
    return module


def add_to_import_path(folders: Iterable[str]) -> None:
    """Appends folders to `sys.path`, which holds none twice."""
    sys.path += [folder for folder in folders if folder not in sys.path]


def portable_name(text: str) -> str:
    """The same name with the absolute path of its file, so that it is valid in another working folder.

    >>> portable_name("ppvae.models:vae")
    'ppvae.models:vae'
    """
    place, colon, name = text.partition(":")
    return f"{Path(place).resolve()}{colon}{name}" if Path(place).is_file() else text


def working_folder_of(names: Iterable[str]) -> list[str]:
    """The working folder, in a list, where a name's module was imported from it; an empty list where none was."""
    here = Path.cwd()
    for text in names:
        top = text.partition(":")[0].partition(".")[0]
        package = None if top == "ppvae" else sys.modules.get(top)
        file = getattr(package, "__file__", None) or next(iter(getattr(package, "__path__", [])), None)
        if file is not None and here in (Path(file).parent, Path(file).parent.parent) and "site-packages" not in file:
            return [str(here)]
    return []
