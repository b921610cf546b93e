"""A pair of one's own whose arguments are the columns of a table, and one that observes the columns apart."""

import numpy as np
import pytest

from ppvae.cli.main import main

PAIR = """
import pyro
import pyro.distributions as dist
import torch
from torch import nn


def people({factory}):
    dec, enc = nn.Linear(2, 3), nn.Linear(6, 4)

    def model({arguments}):
        {split}
        pyro.module("dec", dec)
        with pyro.plate("data", len(age)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            out = dec(z)
            pyro.sample("of_age", dist.Normal(40 + out[..., 0], 5.0).mask(~age.isnan()), obs=age.nan_to_num())
            pyro.sample("of_visits", dist.Poisson(out[..., 1].exp()).mask(~visits.isnan()), obs=visits.nan_to_num())
            pyro.sample("of_smoker", dist.Bernoulli(logits=out[..., 2]).mask(~smoker.isnan()), obs=smoker.nan_to_num())

    def guide({guide_arguments}):
        {split}
        pyro.module("enc", enc)
        x = torch.stack([age / 40 - 1, visits, smoker], -1)
        with pyro.plate("data", len(age)):
            loc, log_scale = enc(torch.cat([x.nan_to_num(), x.isnan().float()], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide
"""
BY_NAME = "visits, age, smoker"  # another order than the table's
TABLE = "age, visits, smoker"


def write(folder, arguments=BY_NAME, guide_arguments=None, split="pass"):
    code = PAIR.format(factory="", arguments=arguments, guide_arguments=guide_arguments or arguments, split=split)
    (folder / "own.py").write_text(code)
    generator = np.random.default_rng(0)
    rows = [f"{40 + 5 * generator.normal():.3f},{generator.poisson(2)},{generator.integers(2)}" for _ in range(60)]
    rows[3], rows[7] = ",3,1", "41.5,,0"
    rows[11] = "39,2,"
    rows[40:50] = [f",{i},1" for i in range(5)] + [f"3{i},,0" for i in range(5)]
    (folder / "people.csv").write_text("age,visits,smoker\n" + "\n".join(rows) + "\n")


FIT = ["fit", "own.py:people", "--data", "people.csv", "--missing", "--epochs", "1", "--name", "r"]


@pytest.mark.parametrize(
    ("arguments", "split"),
    [(BY_NAME, "pass"), pytest.param("x", f"{TABLE} = x.unbind(-1)", marks=pytest.mark.slow)],
    ids=["by name", "one tensor"],
)
def test_a_table_of_ones_own_pair(arguments, split, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, arguments, split=split)
    assert main(FIT) == 0
    assert main(["evaluate", "r", "--num-particles", "50", "--proposal", "guide"]) == 0
    assert main(["generate", "r", "--count", "9"]) == 0
    assert "left out" not in caplog.text
    assert "could not be drawn" not in caplog.text
    made = {path.name: path for path in (tmp_path / "runs" / "r" / "generated").iterdir()}
    order = [0, 1, 2] if split != "pass" else [1, 0, 2]  # of age, visits, smoker
    for name, shape in (("samples", (9, 3)), ("reconstructions", (8, 3)), ("traversals", (2, 7, 3))):
        values = np.load(made[f"{name}.npy"])
        assert values.shape == shape
        age, visits, smoker = (values[..., i] for i in order)
        assert (age > 20).all()
        assert ((visits >= 0) & (visits < 20)).all()
        assert ((smoker >= 0) & (smoker <= 1)).all()
    filled = np.load(made["imputations.npz"])
    names = [name for name in filled.files if name.startswith("values")]
    missing = {name: filled[name] for name in filled.files if name.startswith("missing")}
    assert names
    assert any(m.any() for m in missing.values())
    assert all(np.isfinite(filled[name]).all() for name in names)


def test_arguments_that_are_no_columns_are_named_with_a_cure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "years, visits, smoker", split="age = years")
    assert main(FIT) != 0
    error = capsys.readouterr().err
    assert "the model takes years, visits, smoker, and the table has age, visits, smoker: give its arguments" in error
    write(tmp_path, TABLE)
    assert main(["check", *FIT[1:5]]) == 0  # the cure
    write(tmp_path, "age, visits", split="smoker = age * 0")
    assert main(FIT) != 0
    assert "--columns NAME=skip" in capsys.readouterr().err
    assert main([*FIT, "--columns", "smoker=skip"]) == 0  # the cure


def test_another_order_in_the_guide_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, TABLE, BY_NAME)
    assert main(FIT) != 0
    assert "Give both one order" in capsys.readouterr().err


def test_several_arguments_without_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, TABLE)
    assert main(["fit", "own.py:people", "--epochs", "1"]) != 0
    assert "pass the labels as the second by --labels" in capsys.readouterr().err
