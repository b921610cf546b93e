"""A run folder runs no code unasked: files are run if the run recorded them and the user trusts them."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import py_compile
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ppvae
from ppvae.cli.main import main
from ppvae.errors import CheckpointError, UsageError
from ppvae.factories.user_code import UntrustedCodeError
from ppvae.run_folder import trust
from ppvae.run_folder.trust import is_trusted, trust_file
from ppvae.storage import sha256
from ppvae.training import checkpoint

PAIR = """
import pyro
import pyro.distributions as dist
import torch
from torch import nn

from {helper} import width
MARK


def pair(latent: int = 2):
    down, up = nn.Linear(latent, 64), nn.Linear(64, width * latent)

    def model(x):
        pyro.module("down", down)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=down(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("up", up)
        with pyro.plate("data", len(x)):
            loc, scale = up(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return model, guide
"""
EVALUATE = ["--num-particles", "30", "--head", "5", "--bracket", "0", "--no-report"]
numbers = iter(range(1000))


class Place:
    """A folder with a pair, a module that it imports, and a run of it; a mark shows which code was run."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.run = folder, folder / "run"
        self.helper = f"helper_{next(numbers)}"
        self.pair, self.sibling = folder / f"{name}_{next(numbers)}.py", folder / f"{self.helper}.py"
        self.mark = folder / "mark"
        self.write()

    def write(self, code: str = "", of_sibling: str = "") -> None:
        self.pair.write_text(PAIR.format(helper=self.helper).replace("MARK", code))
        self.sibling.write_text(f"width = 2\n{of_sibling}\n")

    @property
    def evil(self) -> str:
        return f"open({str(self.mark)!r}, 'w').close()"

    def fit(self) -> None:
        words = ["--epochs", "1", "--runs", str(self.folder), "--name", "run", "--no-report"]
        assert main(["fit", f"{self.pair}:pair", *words]) == 0
        sys.modules.pop(self.helper, None)

    def forget(self) -> None:
        """Another user, or another machine: nothing is trusted, and nothing imported."""
        trust_file().unlink(missing_ok=True)
        sys.modules.pop(self.helper, None)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "configuration"))
    made = Place(tmp_path, "mine")
    made.fit()
    return made


def edit_identity(run: Path, name: str, value: Any) -> None:
    """Replaces an entry of the identity in a run's checkpoint, and removes it where the value is None."""
    saved = checkpoint.read(run / "checkpoints")
    saved["identity"] |= {name: value}
    if value is None:
        del saved["identity"][name]
    checkpoint.save(run / "checkpoints", saved)


def evaluate(place: Place, *words: str) -> int:
    return main(["evaluate", str(place.run), *EVALUATE, *words])


def test_what_this_user_trained_is_trusted(place):
    config = json.loads((place.run / "config.json").read_text())
    assert config["code"] == {str(p): sha256(p.read_bytes()) for p in sorted((place.pair, place.sibling))}
    assert all(map(is_trusted, config["code"].values()))
    assert trust_file() == place.folder / "configuration" / "ppvae" / "trusted_code.txt"
    assert evaluate(place) == 0


def test_what_nobody_trusted_is_not_run(place, capsys):
    place.write(place.evil, place.evil)
    shutil.rmtree(place.run)
    place.fit()
    place.mark.unlink()
    place.forget()
    for command in ("evaluate", "examine", "generate"):
        assert main([command, str(place.run)]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"ppvae: error: {place.pair}: the run would run this file, which you have not trusted")
        assert len(error.splitlines()) == 1
    with pytest.raises(UntrustedCodeError, match=r"trust=True"):
        ppvae.load(place.run)
    assert not place.mark.exists()
    assert evaluate(place, "--trust") == 0  # the cure
    assert place.mark.exists()
    sys.modules.pop(place.helper, None)
    assert evaluate(place) == 0  # remembered
    place.forget()
    ppvae.load(place.run, trust=True)
    sys.modules.pop(place.helper, None)
    ppvae.load(place.run)


def test_the_digest_is_trusted_and_not_the_place(place):
    moved = place.folder / "elsewhere"
    moved.mkdir()
    for path in (place.pair, place.sibling):
        shutil.move(path, moved / path.name)
    config = json.loads((place.run / "config.json").read_text())
    config["pair"]["name"] = f"{moved / place.pair.name}:pair"
    (place.run / "config.json").write_text(json.dumps(config))
    sys.modules.pop(place.helper, None)
    assert evaluate(place) == 0


@pytest.mark.parametrize("which", ["pair", "sibling"])
def test_a_file_that_has_changed_is_not_run(place, capsys, which):
    place.write(*((place.evil, "") if which == "pair" else ("", place.evil)))
    sys.modules.pop(place.helper, None)
    assert evaluate(place) == 1
    error = capsys.readouterr().err.strip()
    path = getattr(place, which)
    assert error.startswith(f"ppvae: error: {path}: is not a file that {place.run} was trained with")
    assert len(error.splitlines()) == 1
    assert not place.mark.exists()
    sys.modules.pop(place.helper, None)
    assert evaluate(place, "--trust") == 0
    assert place.mark.exists()


def test_a_module_that_was_put_beside_the_pair_is_not_run(place, capsys):
    """It takes the place of an installed one, as the folder of a script does."""
    text = place.pair.read_text() + "\ntry:\n    import wave\nexcept ImportError:\n    pass\n"
    place.pair.write_text(text)
    shutil.rmtree(place.run)
    sys.modules.pop("wave", None)
    place.fit()
    sys.modules.pop("wave", None)
    (place.folder / "wave.py").write_text(place.evil)
    assert evaluate(place) == 1
    assert "wave.py: is not a file that" in capsys.readouterr().err
    assert not place.mark.exists()
    sys.modules.pop("wave", None)


def test_compiled_files_are_not_read(place):
    """__pycache__ with other code than the source, and the right times in it."""
    other = place.folder / "other.py"
    for path in (place.pair, place.sibling):
        other.write_text(place.evil + "\n" + path.read_text())
        cache = Path(importlib.util.cache_from_source(str(path)))
        py_compile.compile(
            str(other), cfile=str(cache), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )
    sys.modules.pop(place.helper, None)
    assert evaluate(place) == 0
    assert not place.mark.exists()


def test_what_is_no_source_is_not_run(place, capsys):
    place.sibling.unlink()
    other = place.folder / "other.py"
    other.write_text(place.evil + "\nwidth = 2\n")
    py_compile.compile(str(other), cfile=str(place.sibling.with_suffix(".pyc")))
    other.unlink()
    sys.modules.pop(place.helper, None)
    assert evaluate(place) == 1
    assert "is no Python source" in capsys.readouterr().err
    assert not place.mark.exists()


def test_a_module_in_the_run_folder_is_not_run(place, monkeypatch, capsys):
    config = json.loads((place.run / "config.json").read_text())
    config["pair"]["name"] = "evil_module_of_a_run:pair"
    (place.run / "config.json").write_text(json.dumps(config))
    (place.run / "evil_module_of_a_run.py").write_text(place.evil)
    monkeypatch.chdir(place.run)
    monkeypatch.syspath_prepend("")
    assert main(["evaluate", ".", *EVALUATE]) == 1
    assert "evil_module_of_a_run.py: is not a file that" in capsys.readouterr().err
    assert not place.mark.exists()


def test_a_run_that_recorded_no_digest_is_taken_with_one_line_once_it_is_trusted(place, caplog, capsys):
    config = json.loads((place.run / "config.json").read_text())
    del config["code"]
    (place.run / "config.json").write_text(json.dumps(config))
    edit_identity(place.run, "code", None)
    place.forget()
    assert evaluate(place) == 2
    assert evaluate(place, "--trust") == 0
    lines = [r.message for r in caplog.records if "recorded no digest of its code" in r.message]
    assert len(lines) == 2
    sys.modules.pop(place.helper, None)
    assert evaluate(place) == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("answers", ["y\ny\n", "\n", "n\n", "y\nno\n", ""])
def test_on_a_terminal_the_user_is_asked_once(place, monkeypatch, answers):
    place.forget()
    for name, stream in (("stdin", Terminal(answers)), ("stderr", Terminal())):
        monkeypatch.setattr(sys, name, stream)
    agreed = answers == "y\ny\n"
    assert evaluate(place) == (0 if agreed else 2)
    assert sys.stderr.getvalue().count("[y/N]") == len(answers.split()) or not answers.split()
    if agreed:
        monkeypatch.setattr(sys, "stdin", Terminal(""))
        sys.modules.pop(place.helper, None)
        assert evaluate(place) == 0


def test_where_it_cannot_be_remembered_one_line_says_so(place, monkeypatch, caplog):
    (place.folder / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place.folder / "file"))
    sys.modules.pop(place.helper, None)
    assert evaluate(place, "--trust") == 0
    assert any("could not be remembered" in r.message for r in caplog.records)


def test_the_folder_of_the_configuration(monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert trust.trust_file() == Path("~/.config/ppvae/trusted_code.txt").expanduser()


def test_installed_modules_are_imported_as_ever(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "configuration"))
    words = ["--epochs", "1", "--hidden", "4", "--runs", str(tmp_path), "--name", "run", "--no-report"]
    assert main(["fit", "ppvae.models:vae", *words]) == 0
    assert "code" not in json.loads((tmp_path / "run" / "config.json").read_text())
    assert not (tmp_path / "configuration").exists()
    assert main(["evaluate", str(tmp_path / "run"), *EVALUATE]) == 0


def test_an_error_in_a_trusted_file_is_one_line(tmp_path):
    path = tmp_path / "broken_pair.py"
    path.write_text("1 / 0")
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        ppvae.factories.pairs.resolve(str(path))


def test_another_process_asks_for_trust(place):
    """A fresh interpreter, as on the machine of the one who was sent the folder."""
    env = {**os.environ, "XDG_CONFIG_HOME": str(place.folder / "of_another_user"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ppvae", "evaluate", str(place.run), *EVALUATE]
    done = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 2
    assert "which you have not trusted" in done.stderr
    with pytest.raises(CheckpointError, match="not a run folder"):
        ppvae.load(place.folder)


CALLS = {  # what a folder might name, and the arguments; {evil} and {pickle} are files that would write {mark}
    "os:system": {"command": "touch {mark}"},
    "subprocess:call": {"args": ["touch", "{mark}"]},
    "runpy:run_path": {"path_name": "{evil}"},
    "builtins:open": {"file": "{mark}", "mode": "w"},
    "torch:load": {"f": "{pickle}", "weights_only": False},
    "{pair}:torch.load": {"f": "{pickle}", "weights_only": False},
    "{pair}:width.__class__.__base__": {},
    "ppvae.models.vae:torch.load": {"f": "{pickle}", "weights_only": False},
    "ppvae.factories.imports:import_place": {"place": "{evil}"},
    "ppvae.models:vae": {"likelihood": {"name": "torch.nn:Linear"}},
    "antigravity": {},
}


def test_a_forged_folder_calls_nothing_but_factories(place, capsys):
    """Config and checkpoint are both forged, so that they agree; the pair's own file is trusted."""
    evil, unpickled = place.folder / "evil.py", place.folder / "evil.pt"
    evil.write_text(place.evil)
    unpickled.write_bytes(pickle.dumps(Opens(place.mark)))
    words = {"evil": evil, "pickle": unpickled, "mark": place.mark, "pair": place.pair}
    config = json.loads((place.run / "config.json").read_text())
    identity = checkpoint.read(place.run / "checkpoints")["identity"]["pair"]
    for name, arguments in CALLS.items():
        given = json.loads(json.dumps(arguments), object_hook=lambda d: {k: filled(v, words) for k, v in d.items()})
        entry = config["pair"] | {"name": filled(name, words), "arguments": given}
        (place.run / "config.json").write_text(json.dumps(config | {"pair": entry}))
        edit_identity(place.run, "pair", identity | {"arguments": given})
        assert evaluate(place) in (1, 2), name
        error = capsys.readouterr().err.strip()
        assert not place.mark.exists(), name
        assert re.search("is not a name that|which you have not trusted|is not a file that", error), (name, error)
        assert len(error.splitlines()) == 1
        sys.modules.pop(place.helper, None)
    assert "antigravity" not in sys.modules


def filled(value: Any, words: dict[str, Path]) -> Any:
    if isinstance(value, list):
        return [filled(v, words) for v in value]
    return value.format(**words) if isinstance(value, str) else value


class Opens:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["{module}:pair", "{module}"])
def test_the_name_of_an_installed_factory_is_trusted(place, name, tmp_path_factory, monkeypatch, capsys):
    """What this user trained with is; another one is asked once, and another function of the module is not taken."""
    installed, module = tmp_path_factory.mktemp("site"), f"installed_{next(numbers)}"
    shutil.copy(place.sibling, installed)
    shutil.copy(place.pair, installed / f"{module}.py")
    monkeypatch.syspath_prepend(str(installed))
    text, run = name.format(module=module), place.folder / "other"
    words = ["--epochs", "1", "--runs", str(place.folder), "--name", "other", "--no-report"]
    assert main(["fit", text, *words]) == 0
    assert json.loads((run / "config.json").read_text())["code"] == {text: sha256(text.encode())}
    assert main(["evaluate", str(run), *EVALUATE]) == 0
    trust_file().unlink()
    assert main(["evaluate", str(run), *EVALUATE]) == 2
    assert f"ppvae: error: {text}: the run would call this with arguments of its own" in capsys.readouterr().err
    assert main(["evaluate", str(run), *EVALUATE, "--trust"]) == 0  # the cure
    (installed / f"{module}.py").write_text(place.pair.read_text() + "# a new version")
    assert main(["evaluate", str(run), *EVALUATE]) == 0
    config = json.loads((run / "config.json").read_text())
    config["pair"]["name"] = f"{module}:torch.Generator"
    (run / "config.json").write_text(json.dumps(config))
    assert main(["evaluate", str(run), *EVALUATE]) == 1
    assert "is not a name that" in capsys.readouterr().err


def test_the_digests_of_the_checkpoint_count(place, capsys):
    """A config that is edited to name another file that the user trusts, with its digest, or with none."""
    other = place.folder / "other.py"
    other.write_text(place.pair.read_text() + place.evil)
    trust.remember({str(other): sha256(other.read_bytes())})
    config = json.loads((place.run / "config.json").read_text())
    config["pair"]["name"] = f"{other}:pair"
    codes = ({str(other): sha256(other.read_bytes())}, {}, config["code"])
    for code in codes:
        (place.run / "config.json").write_text(json.dumps(config | {"code": code}))
        assert evaluate(place) == 1
        assert "other.py: is not a file that" in capsys.readouterr().err
    assert not place.mark.exists()


def test_an_edited_file_is_taken_by_a_resumed_run_and_its_folder_loads_at_any_time(place):
    """The user names the file; from the first checkpoint on it is the one that the run recorded."""
    place.pair.write_text(place.pair.read_text() + "# a note")
    assert evaluate(place) == 1
    words = ["--runs", str(place.folder), "--name", "run", "--no-report", "--resume"]
    sys.modules.pop(place.helper, None)
    assert main(["fit", f"{place.pair}:pair", *words, "--epochs", "2"]) == 0
    sys.modules.pop(place.helper, None)
    assert evaluate(place) == 0


def test_a_list_of_trusted_code_that_cannot_be_read_or_has_no_last_newline(place, caplog):
    trust_file().unlink()
    trust_file().write_text("written by hand")
    assert evaluate(place, "--trust") == 0
    sys.modules.pop(place.helper, None)
    assert evaluate(place) == 0
    trust_file().unlink()
    os.mkfifo(trust_file())
    assert evaluate(place) == 2
    assert evaluate(place, "--trust") == 0
    assert any("could not be remembered (not a regular file)" in r.message for r in caplog.records)


def test_a_module_that_a_factory_imports_late_is_refused_as_itself(place, capsys):
    late = place.folder / f"late_{next(numbers)}.py"
    late.write_text("")
    place.write()
    place.pair.write_text(place.pair.read_text().replace("    down, up", f"    import {late.stem}\n    down, up"))
    shutil.rmtree(place.run)
    place.fit()
    late.write_text(place.evil)
    sys.modules.pop(late.stem)
    assert evaluate(place) == 1
    assert capsys.readouterr().err.startswith(f"ppvae: error: {late}: is not a file that")
    assert not place.mark.exists()
