"""Files that belong together say so: what was put together from two runs, edited or cut off is refused by name."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

import ppvae
from ppvae.cli.main import main
from ppvae.errors import CheckpointError
from ppvae.evaluation import load_estimate
from ppvae.run_folder.identity import check_results
from ppvae.storage import sha256
from ppvae.training import checkpoint

FIT = ["fit", "ppvae.models:vae", "--hidden", "4", "--latent", "2", "--no-report"]
EVALUATE = ["--num-particles", "30", "--head", "5", "--bracket", "0", "--no-report"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two finished runs of other seeds, "a" and "b", with a result each; not to be written to."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("a", "b")):
        assert main([*FIT, "--epochs", "2", "--runs", str(folder), "--name", name, "--seed", str(seed)]) == 0
        assert main(["evaluate", str(folder / name), *EVALUATE]) == 0
    return folder


@pytest.fixture
def two(runs, tmp_path) -> Path:
    """Copies of the two runs."""
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def refused(capsys, command: list[str], *words: str) -> None:
    capsys.readouterr()
    assert main(command) == 1, capsys.readouterr().out
    error = capsys.readouterr().err.strip()
    assert error.startswith("ppvae: error: ")
    assert len(error.splitlines()) == 1
    for word in words:
        assert word in error, error


def test_each_file_carries_the_identity(runs):
    config = json.loads((runs / "a" / "config.json").read_text())
    run = ppvae.load(runs / "a")
    saved = checkpoint.read(runs / "a" / "checkpoints")
    result = json.loads((runs / "a" / "results" / "log_marginal.json").read_text())
    assert config["run_id"] == saved["identity"]["run_id"] == result["run_id"] == run.origin["run_id"]
    assert f"{result['checkpoint']}.pt" == (runs / "a" / "checkpoints" / "last").read_text() == f"{run.checkpoint}.pt"
    assert result["files"] == {"log_marginal.nc": sha256((runs / "a/results/log_marginal.nc").read_bytes())}
    assert json.loads((runs / "b" / "config.json").read_text())["run_id"] != config["run_id"]


MIXTURES = {
    "config.json": "run_id",
    "checkpoints": "run_id",
    "metrics.jsonl": "metrics.jsonl: line 1",
}


@pytest.mark.parametrize("part", MIXTURES)
def test_a_folder_put_together_from_two_runs(two, part, capsys):
    path = two / "a" / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    (shutil.copytree if (two / "b" / part).is_dir() else shutil.copy)(two / "b" / part, path)
    with pytest.raises(CheckpointError, match=MIXTURES[part]):
        ppvae.load(two / "a")
    for command in (["evaluate"], ["examine"], ["generate"]):
        refused(capsys, [*command, str(two / "a")], str(two / "a"), MIXTURES[part])
    resumed = [*FIT, "--epochs", "3", "--runs", str(two), "--name", "a", "--resume"]
    refused(capsys, resumed, "cannot resume with seed" if part == "checkpoints" else MIXTURES[part])


@pytest.mark.parametrize("name", ["log_marginal.json", "log_marginal.nc", "both", "all"])
def test_a_result_of_another_run(two, name, capsys):
    names = [f"log_marginal{part}.{kind}" for part in ("", "_guide") for kind in ("json", "nc")]
    for one in {"both": names[:2], "all": names}.get(name, [name]):
        shutil.copy(two / "b" / "results" / one, two / "a" / "results" / one)
    words = "another run" if name in ("both", "all", "log_marginal.json") else "does not belong to"
    if name == "log_marginal.json":
        words = "log_marginal"
    refused(capsys, ["examine", str(two / "a"), "--no-report"], words, str(two / "a"))
    refused(capsys, ["evaluate", str(two / "a"), "--method", "annealed", "--no-report"], words)
    refused(capsys, ["compare", str(two / "a"), f"b={two / 'b'}"], words)
    assert main(["evaluate", str(two / "a"), *EVALUATE]) == 0  # which replaces it
    assert main(["compare", str(two / "a"), f"b={two / 'b'}"]) == 0


def test_an_edited_config(two, capsys):
    path = two / "a" / "config.json"
    good = json.loads(path.read_text())
    edits = {
        "fit.seed": lambda c: c["fit"] | {"seed": 1},
        "fit.digest": lambda c: c["fit"] | {"digest": "0" * 64},
        "fit.learning": lambda c: c["fit"] | {"learning": 1},
    }
    for name, edit in edits.items():
        path.write_text(json.dumps(good | {"fit": edit(good)}))
        refused(capsys, ["evaluate", str(two / "a")], name)
    for name in good["fit"]:
        path.write_text(json.dumps(good | {"fit": {k: v for k, v in good["fit"].items() if k != name}}))
        if good["fit"][name] is not None:
            refused(capsys, ["evaluate", str(two / "a")], f"fit.{name}")
    path.write_text(json.dumps({k: v for k, v in good.items() if k != "run_id"}))
    refused(capsys, ["evaluate", str(two / "a")], "run_id")
    path.write_text(
        json.dumps(good | {"pair": good["pair"] | {"arguments": good["pair"]["arguments"] | {"latent": 3}}})
    )
    refused(capsys, ["evaluate", str(two / "a")], "pair.arguments")
    path.write_text(json.dumps(good | {"data": good["data"] | {"data": "digits "[:6]}}))  # a path may move
    assert main(["evaluate", str(two / "a"), *EVALUATE]) == 0


def test_entries_that_no_digest_covers_are_what_they_should_be(two, capsys):
    path = two / "a" / "config.json"
    good = json.loads(path.read_text())
    wrong = {
        "epochs": [None, "3", [], {}], "data": [None, 0, [], {"no_such": 1}, {"data": None, "head": 3}],
        "pair": [None, 7, []], "code": [7, []],
        "pair.name": [None, 3, []], "pair.path": [None, 0, "x", [1]],
        "data.data": [[]], "data.binarize": ["sometimes"], "data.flat": ["no"], "data.data_seed": ["x", 10**30],
        "data.max_gigabytes": ["nan", -1.0],
    }  # fmt: skip
    for name, values in wrong.items():
        first, _, second = name.partition(".")
        for value in values:
            edited = {**good, first: {**good[first], second: value} if second else value}
            path.write_text(json.dumps(edited))
            refused(capsys, ["evaluate", str(two / "a"), *EVALUATE], "config.json")


def test_the_test_data_are_those_of_the_run(two, capsys):
    path = two / "a" / "config.json"
    good = json.loads(path.read_text())
    for edit in ({"test": "0" * 64}, {"test": None}, {"pair": {**good["pair"], "columns": ["real"]}}):
        path.write_text(json.dumps(good | edit))
        refused(capsys, ["evaluate", str(two / "a"), *EVALUATE], "test" if "test" in edit else "pair.columns")
    del good["test"]
    path.write_text(json.dumps(good))
    refused(capsys, ["evaluate", str(two / "a"), *EVALUATE], "expected test ", "found null")


def test_every_edit_of_a_result_is_refused(two):
    path = two / "a" / "results" / "log_marginal.json"
    good, chance = path.read_text(), random.Random(0)
    for _ in range(40):
        place = chance.randrange(len(good))
        path.write_text(good[:place] + chance.choice("0123456789abcx") + good[place + 1 :])
        if path.read_text() == good:
            continue
        with pytest.raises(CheckpointError):
            load_estimate(path)
    for name in ("sha256", "files", "run_id", "nll"):
        path.write_text(json.dumps({k: v for k, v in json.loads(good).items() if k != name}))
        with pytest.raises(CheckpointError, match=r"log_marginal\.json"):
            load_estimate(path)
    path.write_text(good)
    load_estimate(path)
    path.with_suffix(".nc").unlink()
    with pytest.raises(CheckpointError, match=r"log_marginal\.nc: cannot be read .*belongs to log_marginal\.json"):
        load_estimate(path)


def test_a_result_of_an_earlier_checkpoint_has_one_line(two, caplog):
    assert main([*FIT, "--epochs", "3", "--runs", str(two), "--name", "a", "--resume"]) == 0
    run = ppvae.load(two / "a")
    caplog.clear()
    check_results(two / "a", run.origin)
    lines = [r.message for r in caplog.records]
    assert len(lines) == 2  # of the result, and of the guide beside it
    assert all("earlier checkpoint" in line for line in lines)


def test_results_of_older_versions_are_taken(two):
    path = two / "a" / "results" / "log_marginal.json"
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps({k: v for k, v in content.items() if k not in ("run_id", "checkpoint", "sha256", "files")})
    )
    assert float(load_estimate(path).nll) == content["nll"]
    check_results(two / "a", ppvae.load(two / "a").origin)


def edited_checkpoint(run: Path, change) -> None:
    """A checkpoint with other content under a right digest."""
    folder = run / "checkpoints"
    state, buffer = checkpoint.read(folder), io.BytesIO()
    change(state)
    torch.save(state, buffer)
    (folder / f"{sha256(buffer.getvalue())}.pt").write_bytes(buffer.getvalue())
    (folder / "last").write_text(f"{sha256(buffer.getvalue())}.pt")


def test_nan_in_a_checkpoint_is_named(two, capsys):
    def change(state):
        name = next(n for n in state["state"]["params"] if "prior" not in n)
        state["state"]["params"][name].view(-1)[0] = torch.nan

    edited_checkpoint(two / "a", change)
    refused(capsys, ["evaluate", str(two / "a")], "'params'", "in 1 numbers, is NaN")


def test_nan_in_the_state_of_an_optimizer_is_named(two, capsys):
    edited_checkpoint(two / "a", lambda state: state["optimizer"]["state"][0]["exp_avg"].fill_(torch.nan))
    resumed = [*FIT, "--epochs", "3", "--runs", str(two), "--name", "a", "--resume"]
    refused(capsys, resumed, "'exp_avg'", "is NaN")


def test_a_checkpoint_of_other_types_is_named(two):
    folder = two / "a" / "checkpoints"
    good = checkpoint.read(folder)
    meta = {"params": {"w": torch.ones(2, device="meta")}, "buffers": {}}
    wrong = {
        "state": ["x", {}, {"params": 3}, {"params": {"w": 1.0}, "buffers": {}}, meta], "epoch": ["3", None],
        "history": [None, [3]], "settings": ["x"], "best": [[], {"state": None}], "identity": [3], "optimizer": [None],
    }  # fmt: skip
    for name, values in wrong.items():
        for value in values:
            checkpoint.save(folder, good | {name: value})
            with pytest.raises(CheckpointError, match=r"not the checkpoint of a run: it has no '\w+'"):
                ppvae.load(two / "a")


def test_runs_without_an_identity_are_taken_with_one_line(two, caplog):
    edited_checkpoint(two / "a", lambda state: state.pop("identity"))
    path = two / "a" / "config.json"
    config = json.loads(path.read_text())
    del config["run_id"]
    path.write_text(json.dumps(config))
    caplog.clear()
    run = ppvae.load(two / "a")
    assert [r.message for r in caplog.records] == [
        f"ppvae: {two / 'a'}: its checkpoint was written before runs had an identity; it is taken as it is"
    ]
    assert "run_id" not in run.origin
    assert main([*FIT, "--epochs", "3", "--runs", str(two), "--name", "a", "--resume"]) == 0
    assert ppvae.load(two / "a").origin["run_id"]


def test_metrics_cut_short_by_a_loss_of_power_are_taken(two):
    path = two / "a" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for text in ("", lines[0], lines[0] + lines[1][:20], None):
        path.unlink() if text is None else path.write_text(text)
        assert len(ppvae.load(two / "a").history) == 2
