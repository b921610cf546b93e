"""What users bring to the command line: classes of their own, the folder of their files, tables, folders of results."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ppvae import data, log_marginal
from ppvae.cli.common import known_labels
from ppvae.cli.main import main
from ppvae.cli.options import Data
from ppvae.errors import UsageError
from ppvae.factories import imports
from ppvae.models import conditional_vae, table_vae
from ppvae.run_folder.trust import trust_file

PARTS = '''
import pyro.distributions as dist
import torch
from torch import nn
from helper_of_parts import WIDTH  # a file beside this one
from ppvae.objectives import Objective


class Wide(nn.Module):
    """A normal prior.

    Args:
        scale: the standard deviation.
    """

    def __init__(self, latent: int, scale: float = 1.0):
        super().__init__()
        self.latent, self.scale = latent, scale

    def forward(self):
        return dist.Normal(torch.zeros(self.latent), self.scale).to_event(1)


class Bits(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, z):
        return dist.Bernoulli(logits=self.net(z)).to_event(1)


class Ellipse(nn.Module):
    def __init__(self, latent: int, data, width: int = WIDTH):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(data.shape[1], width), nn.Tanh(), nn.Linear(width, 2 * latent))

    def forward(self, x):
        from helper_of_parts import halves  # an import at run time

        loc, log_scale = halves(self.net(x))
        return dist.Normal(loc, log_scale.exp()).to_event(1)


class Mean(Objective):
    def __init__(self, num_particles: int = 2):
        super().__init__(num_particles)

    def reduce(self, log_weight):
        return log_weight.mean(0)


class Unfinished(Objective):
    pass


def function():
    pass
'''
HELPER = "WIDTH = 12\n\ndef halves(x):\n    return x.chunk(2, -1)\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with parts, as the working folder; the import state is restored afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("helper_of_parts", "parts_package", "parts_package.parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    work = tmp_path / "work"
    (work / "parts_package").mkdir(parents=True)
    for place in (work, work / "parts_package"):
        (place / "parts.py").write_text(PARTS)
    (work / "helper_of_parts.py").write_text(HELPER)
    (work / "parts_package" / "__init__.py").write_text("")
    monkeypatch.chdir(work)
    yield work
    for name in ("helper_of_parts", "parts_package", "parts_package.parts"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("place", ["parts.py", "parts_package.parts"])
def test_classes_of_ones_own_go_all_the_way(folder, tmp_path, monkeypatch, capsys, place):
    options = ["--prior", f"{place}:Wide", "--prior.scale", "1.5", "--likelihood", f"{place}:Bits"]
    options += ["--posterior", f"{place}:Ellipse", "--objective", f"{place}:Mean", "--objective.num-particles", "3"]
    options += ["--latent", "2", "--epochs", "1", "--name", "run", "--no-report"]
    assert main(["fit", "ppvae.models:vae", *options]) == 0, capsys.readouterr().err
    config = json.loads((folder / "runs" / "run" / "config.json").read_text())
    assert config["pair"]["arguments"]["prior"]["scale"] == 1.5
    assert "num_particles=3" in config["fit"]["objective"]
    # from anywhere, and by a process that has imported nothing of it
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("helper_of_parts", "parts_package", "parts_package.parts", "ppvae_pair_parts"):
        sys.modules.pop(name, None)
    sys.path[:] = [entry for entry in sys.path if str(folder) not in entry]
    evaluate = ["evaluate", str(folder / "runs" / "run"), "--num-particles", "100", "--head", "20", "--no-report"]
    assert main([*evaluate, "--proposal", "guide"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("place", ["parts.py", "parts_package.parts"])
def test_parts_that_have_changed_or_are_not_trusted_are_not_run(folder, tmp_path, monkeypatch, capsys, place):
    """A file of parts, and a module found by the import path that the run recorded, are held as a file of a pair is."""
    fit = ["fit", "ppvae.models:vae", "--prior", f"{place}:Wide", "--latent", "2", "--epochs", "1", "--name", "run"]
    assert main([*fit, "--no-report"]) == 0, capsys.readouterr().err
    file = folder / Path(place) if place.endswith(".py") else folder / "parts_package" / "parts.py"
    source, mark = file.read_text(), tmp_path / "mark"
    evaluate = ["evaluate", str(folder / "runs" / "run"), "--num-particles", "100", "--head", "20", "--no-report"]
    evaluate += ["--proposal", "guide"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for text, trusted, words in (
        (f"{source}\nopen({str(mark)!r}, 'w').close()\n", True, "is not a file that"),
        (source, False, "which you have not trusted"),
        (source, True, ""),
    ):
        file.write_text(text)
        remembered = trust_file().read_bytes()
        if not trusted:
            trust_file().unlink()
        for name in ("helper_of_parts", "parts_package", "parts_package.parts", "ppvae_pair_parts"):
            sys.modules.pop(name, None)
        imports._loaded.clear()  # as in another process
        sys.path[:] = [entry for entry in sys.path if str(folder) not in entry]
        status, error = main(evaluate), capsys.readouterr().err
        assert (status == 0) == (words == ""), error
        assert words in error
        assert not mark.exists()
        trust_file().write_bytes(remembered)


def test_help_lists_the_flags_of_a_class_of_ones_own(folder, capsys):
    assert main(["fit", "ppvae.models:vae", "--prior", "parts.py:Wide", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--prior.scale" in shown
    assert "the standard deviation." in " ".join(shown.split())
    assert "--prior.latent" not in shown


WRONG = {
    "no such class": ("prior", "parts.py:Wider", ("--prior parts.py:Wider", "did you mean 'Wide'")),
    "no such file": ("prior", "part.py:Wide", ("--prior part.py", "found none")),
    "no such module": ("prior", "nowhere.parts:Wide", ("--prior nowhere.parts", "could not be imported")),
    "no name": ("prior", "parts.py", ("--prior", "as in parts.py:MyClass")),
    "a function": ("prior", "parts.py:function", ("derived from torch's Module", "found a function")),
    "another kind": ("objective", "parts.py:Wide", ("derived from pyro's ELBO", "found the class Wide")),
    "abstract": ("objective", "parts.py:Unfinished", ("that defines reduce",)),
    "its flags": ("prior", "parts.py:Wide --prior.width 3", ("--prior.width", "Wide takes --prior.scale")),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_class_to_choose(folder, capsys, name):
    flag, value, words = WRONG[name]
    assert main(["fit", "ppvae.models:vae", f"--{flag}", *value.split(), "--no-report"]) == 2
    error = capsys.readouterr().err
    assert all(word in error.replace("parts.Wide", "Wide") for word in words), error
    assert "Traceback" not in error


def test_a_pair_and_a_part_of_one_file_share_their_classes(folder):
    from ppvae.factories.imports import import_named

    assert import_named("parts.py:Wide") is import_named(str(folder / "parts.py") + ":Wide")
    (folder / "parts.py").write_text(PARTS.replace("1.0", "2.0"))  # a file that has changed is read again
    assert import_named("parts.py:Wide")(2).scale == 2.0


def table(path) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    z = rng.normal(size=200)
    frame = pd.DataFrame(
        {
            "income": 5e4 + 2e4 * (z + 0.1 * rng.normal(size=200)),
            "visits": rng.poisson(np.exp(1 + 0.5 * z)),
            "city": np.where(z > 0, "Ulm", rng.choice(["Bonn", "Kiel"], 200)),
        }
    )
    frame.to_csv(path, index=False)
    return frame


def test_a_table_goes_all_the_way(folder, capsys):
    table(folder / "people.csv")
    fit = ["fit", "ppvae.models:table_vae", "--data", "people.csv", "--columns", "visits=count", "--epochs", "60"]
    assert (
        main([*fit, "--latent", "1", "--name", "run", "--no-report", "--optimizer.lr", "0.02", "--batch-size", "20"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "columns: income real; visits count; city categorical (Bonn, Kiel, Ulm)" in shown
    assert "--columns NAME=KIND" in shown
    assert main(["evaluate", "run", "--bracket", "0", "--num-particles", "200", "--no-report"]) == 0
    result = json.loads((folder / "runs/run/results/log_marginal.json").read_text())
    # independent columns, which no latent explains, are worse: the units are those of the file
    train, _, test = data.load(folder / "people.csv")
    apart = table_vae(train, columns=train.kinds).likelihood(torch.zeros(4)).log_prob(test.detach()).mean()
    assert result["nll"] < -apart.item() - 0.3
    assert main(["evaluate", "run", "--bracket", "0", "--num-particles", "200", "--no-report", "--split", "valid"]) == 0


def test_a_table_whose_columns_are_said_wrongly(folder, capsys):
    table(folder / "people.csv")
    fit = ["fit", "ppvae.models:table_vae", "--data", "people.csv", "--no-report", "--columns"]
    for given, words in (("visits", "NAME=KIND"), ("visit=count", "did you mean 'visits'"), ("city=real", "'city'")):
        assert main([*fit, given]) != 0
        assert words in capsys.readouterr().err
    assert main(["fit", "ppvae.models:table_vae", "--no-report"]) == 2
    assert "expected a table" in capsys.readouterr().err


def test_compare_takes_the_folders_that_save_and_fit_write(folder, capsys):
    train, _, test = data.load("digits", binarize="fixed")
    from ppvae.models import vae

    for seed in (0, 1):
        torch.manual_seed(seed)
        pair = vae(train, latent=2, hidden=(8,))
        est = log_marginal(pair.model, pair.guide, test[:40], num_particles=30, proposal="guide")
        est.save(folder / f"saved{seed}")
        est.save(folder / "runs" / f"run{seed}" / "results")
    for names in (["saved0", "saved1"], ["runs/run0", "run1"], ["a=saved0", "b=saved1/log_marginal.json"]):
        assert main(["compare", *names]) == 0, capsys.readouterr().err
        assert "log p(x)" in capsys.readouterr().out
    (folder / "empty").mkdir()
    assert main(["compare", "saved0", "empty"]) == 2
    assert "ppvae evaluate" in capsys.readouterr().err


def test_a_semi_supervised_pair_goes_all_the_way(folder, capsys):
    fit = ["fit", "ppvae.models:semi_supervised_vae", "--labels", "--labelled", "100", "--epochs", "30", "--name", "m2"]
    assert main([*fit, "--latent", "2", "--hidden", "40", "--no-report"]) == 0, capsys.readouterr().err
    config = json.loads((folder / "runs/m2/config.json").read_text())
    assert config["fit"]["objective"].startswith("AuxiliaryLoss")
    evaluate = ["evaluate", "m2", "--proposal", "guide", "--num-particles", "30", "--no-report", "--head", "200"]
    assert main(evaluate) == 0
    accuracy = float(re.search(r"classifier gets ([\d.]+) % of 200 labels right", capsys.readouterr().out)[1])
    assert accuracy > 60  # chance is 10; 100 labels, ten of each class, give about 85


def test_labels_are_kept_evenly_and_hidden_elsewhere():
    train, valid, _ = data.load("digits")
    kept = known_labels(train, Data(labels=True, labelled=25))
    assert sorted(kept[kept >= 0].bincount().tolist()) == [2] * 5 + [3] * 5
    assert torch.equal(kept[kept >= 0], train.labels[kept >= 0])
    assert (known_labels(valid, Data(labels=True, labelled=25)) == -1).all()
    assert torch.equal(known_labels(train, Data(labels=True)), train.labels)
    with pytest.raises(UsageError, match="--labelled: expected a number from 0 to 1257, found 2000"):
        known_labels(train, Data(labels=True, labelled=2000))


def test_a_conditional_pair_says_that_it_takes_labels(folder, capsys):
    place = ["--latent", "2", "--hidden", "9", "--epochs", "1", "--no-report"]
    assert main(["fit", "ppvae.models:conditional_vae", *place]) == 2
    assert "pass --labels" in capsys.readouterr().err
    assert main(["fit", "ppvae.models:conditional_vae", "--labels", *place]) == 0
    train, _, _ = data.load("digits", binarize="fixed")
    pair = conditional_vae(train, num_labels=10)
    with pytest.raises(UsageError, match=r"pass \(x, labels\)"):
        log_marginal(pair.model, pair.guide, train[:5], num_particles=2, proposal="guide")


def test_a_factory_may_name_its_objective(folder, capsys):
    options = ["--binarize", "none", "--components", "2", "--epochs", "1", "--no-report", "--name", "mixture"]
    assert main(["fit", "ppvae.models:gaussian_mixture", *options]) == 0, capsys.readouterr().err
    assert json.loads((folder / "runs/mixture/config.json").read_text())["fit"]["objective"].startswith("ELBO")


TWO_BLOCKS = '''
import pyro.distributions as dist
import torch


class Learned(torch.nn.Module):
    """A normal likelihood whose network gives mean and log-scale of each number."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    {cure}

    def forward(self, z):
        loc, log_scale = self.net(z).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)
'''


@pytest.mark.parametrize("pair", ["vae", "conditional_vae --labels"])
def test_a_likelihood_of_two_blocks_says_how_many_outputs_it_takes(pair, folder, capsys):
    """The cure of the message, followed."""
    (folder / "blocks.py").write_text(TWO_BLOCKS.format(cure=""))
    fit = ["fit", *f"ppvae.models:{pair}".split(), "--binarize", "none", "--likelihood", "blocks.py:Learned"]
    fit += ["--epochs", "1", "--no-report"]
    assert main(fit) == 1
    error = capsys.readouterr().err
    assert "expected the event shape [64] of x, found [32]; its network must give 2 numbers for each of x" in error
    cure = re.search(r"def output_shape\(self, event\): return torch.Size\(\[2 \* event\[0\], \*event\[1:\]\]\)", error)
    (folder / "blocks.py").write_text(TWO_BLOCKS.format(cure=cure[0]))
    assert main(fit) == 0
