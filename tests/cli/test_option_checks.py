"""An option that has no meaning beside the others is refused by its flag; none is ignored."""

from __future__ import annotations

import dataclasses

import pytest

from ppvae.cli import options
from ppvae.cli.main import main
from ppvae.cli.option_checks import changed

FIT = ("fit", "ppvae.models:vae")
ALONE = [
    (FIT, ["--labelled", "100"], "--labelled: goes with --labels"),
    (("check", "ppvae.models:vae"), ["--labelled", "0"], "--labelled: goes with --labels"),
    (FIT, ["--columns", "age=real"], "--columns: expected a table (.csv, .tsv, .parquet), found digits"),
    (("data", "digits"), ["--columns", "age=real"], "--columns: expected a table"),
    (FIT, ["--binarize", "dynamic", "--dequantize"], "--binarize: does not go with --dequantize"),
    (FIT, ["--binarize", "dynamic", "--missing", "--data", "x.npz"], "--binarize: does not go with --missing"),
    (FIT, ["--binarize", "dynamic", "--data", "x.csv"], "--binarize: does not go with a table"),
    (("data", "x.csv"), ["--binarize", "fixed"], "--binarize: does not go with a table"),
    (FIT, ["--dequantize", "--missing", "--data", "x.npz"], "--dequantize: does not go with --missing"),
    (("data", "x.csv"), ["--dequantize"], "--dequantize: does not go with a table"),
    (FIT, ["--binarize", "none", "--data-seed", "1"], "--data-seed: goes with what is random: --binarize fixed"),
    (FIT, ["--data", "x.csv", "--data-seed", "1"], "--data-seed: goes with what is random"),
    (("data", "digits"), ["--data-seed", "3"], "--data-seed: goes with what is random"),
    (("evaluate", "run"), ["--method", "bdmc", "--num-particles", "9"], "--num-particles: goes with --method"),
    (("evaluate", "run"), ["--proposal", "guide", "--bracket", "9"], "--bracket: goes with --proposal refined"),
    (("evaluate", "run"), ["--beside", "9"], "--beside: goes with --method annealed, smc; found importance"),
    (("examine", "run"), ["--gaps", "0", "--steps", "9"], "--steps: goes with --gaps above 0"),
    (("examine", "run"), ["--gaps", "0", "--num-particles", "9"], "--num-particles: goes with --gaps above 0"),
    (("compare", "a.json", "b.json"), ["--result", "smc"], "--result: goes with run folders; found files of results"),
    (("compare", "x=a.json", "b.json,c.json"), ["--runs", "r"], "--runs: goes with run folders"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "given", "words"), ALONE)
def test_an_option_without_the_one_that_it_goes_with(command, given, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*command, *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ppvae: error: {words}")
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "given"),
    [
        (FIT, ["--labels", "--labelled", "100"]),
        (FIT, ["--columns", "age=real", "--data", "x.csv"]),
        (FIT, ["--dequantize", "--data-seed", "1"]),
        (FIT, ["--binarize", "none", "--labels", "--labelled", "9", "--data-seed", "1"]),
        (("data", "digits"), ["--binarize", "fixed", "--data-seed", "3"]),
        (("evaluate", "run"), ["--proposal", "guide", "--bracket", "0"]),
        (("evaluate", "run"), ["--method", "annealed", "--num-particles", "9", "--beside", "5"]),
        (("examine", "run"), ["--gaps", "0"]),
        (("examine", "run"), ["--gaps", "5", "--steps", "9"]),
        (("compare", "a.json", "b"), ["--result", "smc"]),
    ],
)
def test_options_that_go_together(command, given, monkeypatch):
    """The cure of each sentence, followed: the options are taken."""

    class Loaded(BaseException):
        pass

    def load(*_, **__):
        raise Loaded

    for place in ("common.load_splits", "fit.load_splits", "data.load_splits", "evaluate.load_trained",
                  "examine.load_trained", "compare._result_file"):  # fmt: skip
        monkeypatch.setattr(f"ppvae.cli.{place}", load)
    with pytest.raises(Loaded):
        main([*command, *given])


def test_changed_names_what_differs_from_the_defaults():
    assert changed(options.Fit()) == []
    fit = options.Fit(epochs=3, optimizer=options.Optimizer(lr=0.1), context=("lengths",))
    assert changed(fit) == ["context", "epochs", "optimizer"]
    assert all(changed(cls()) == [] for cls in (options.Evaluate, options.Examine, options.DataSet, options.Compare))
    assert {f.name for f in dataclasses.fields(options.DataSet)} < {f.name for f in dataclasses.fields(options.Data)}


def test_labels_that_a_table_has_not_and_the_cure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(f"{i / 7:.3f},{i % 5 / 3:.3f},{'abc'[i % 3]}" for i in range(40))
    (tmp_path / "t.csv").write_text(f"a,b,kind\n{rows}\n")
    fit = [
        "fit",
        "ppvae.models:semi_supervised_vae",
        "--data",
        "t.csv",
        "--labels",
        "--likelihood",
        "Normal",
        "--hidden",
    ]
    fit += ["4", "--epochs", "1", "--no-report", "--compile", "no"]
    assert main(fit) == 2
    assert "has no labels. Of a table name their column, as --columns NAME=label" in capsys.readouterr().err
    assert main([*fit, "--columns", "kind=label"]) == 0
