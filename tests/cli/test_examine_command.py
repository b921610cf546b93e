"""`ppvae examine` and `ppvae compare` from runs that `ppvae fit` left, as a user calls them."""

import json

import pytest

from ppvae.cli.main import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two evaluated runs, a and b, and one that was not evaluated, c."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("abc"):
        common = ["--runs", str(folder), "--no-report"]
        words = ["--data", "digits", "--epochs", "1", "--latent", "2", "--seed", str(seed), "--name", name]
        assert main(["fit", "ppvae.models:vae", *words, *common]) == 0
        if name != "c":
            assert main(["evaluate", name, "--num-particles", "30", "--head", "40", *common]) == 0
    return folder


def test_examine_fills_the_run_folder_and_the_report(runs, capsys):
    words = ["--gaps", "6", "--num-particles", "60", "--steps", "10", "--latents", "50", "--replications", "40"]
    words += ["--checks", "20", "--gradients", "10"]
    assert main(["examine", "a", "--runs", str(runs), *words]) == 0
    out = capsys.readouterr().out
    for text in (
        "amortisation gap",
        "mutual information",
        "active units of z",
        "verdict",
        "step between neighbours",
        "gdreg",
        "report:",
    ):
        assert text in out
    results = {p.name for p in (runs / "a" / "results").iterdir()}
    assert {
        "gaps_train.json",
        "gaps_test.npz",
        "representation.json",
        "calibration.npz",
        "predictive_check.nc",
        "gradients.json",
    } <= results
    assert not any(name.endswith("_blocks") for name in results)
    page = (runs / "a" / "report.html").read_text()
    assert "Inference gaps" in page
    assert "Noise of gradients" in page
    assert "Predictive check of step between neighbours" in page
    assert "Distribution of log p(x)" in page  # the estimate that was there stays in the report
    assert (runs / "a" / "pictures" / "log_px.png").exists()


def test_compare_pairs_the_data_and_refuses_what_it_cannot(runs, capsys, tmp_path):
    assert main(["compare", "a", "b", "--runs", str(runs), "--directory", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "40 data, binary" in out
    assert " from " in out
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["kind"] == "Comparison"
    assert (tmp_path / "out" / "comparison.png").exists()
    assert main(["compare", "both=a,b", str(runs / "a"), "--runs", str(runs)]) == 0
    assert "(2 runs)" in capsys.readouterr().out
    for args, words in (
        (["a"], "two runs or more"),
        (["a", "c"], "ppvae evaluate c"),
        (["x=a", "x=b"], "two runs with the name 'x'"),
    ):
        assert main(["compare", *args, "--runs", str(runs)]) == 2
        assert words in capsys.readouterr().err
    annealing = ["--method", "annealed", "--head", "40", "--num-temperatures", "3", "--num-chains", "2"]
    annealing += ["--num-particles", "30", "--num-leapfrog", "1", "--runs", str(runs), "--no-report"]
    assert main(["evaluate", "b", *annealing]) == 0
    own = str(runs / "b" / "results" / "annealed.json")
    assert main(["compare", "a", f"chains={own}", "--runs", str(runs)]) == 0
    assert "unequal tightness: log p(x) was estimated by annealed" in capsys.readouterr().out
    assert main(["compare", "a", f"chains={own}x.json", "--runs", str(runs)]) == 1
    assert "annealed.jsonx.json: not a saved estimate" in capsys.readouterr().err
    more = ["--num-particles", "30", "--head", "41", "--runs", str(runs), "--no-report"]
    assert main(["evaluate", "b", *more]) == 0
    assert main(["compare", "a", "b", "--runs", str(runs)]) == 2
    assert "other data" in capsys.readouterr().err
