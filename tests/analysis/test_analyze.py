"""The analysing command: its numbers are those of the merged matrices, and its files are what they say."""

import csv
import pathlib

import numpy as np
import pytest
import running

from lowrank import analysis
from lowrank.adapters.lora import TARGETS
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.runs.adapter import read_adapter
from lowrank.weights.base import read_base


@pytest.fixture(scope="module")
def larger(tiny, tmp_path_factory) -> pathlib.Path:
    """A run like the tiny one, of rank 6, on three projections, from another seed."""
    workdir = tmp_path_factory.mktemp("larger") / "run"
    overrides = ("lora.rank=6", "lora.targets=q_proj,v_proj,down_proj", "seed=3", "sample.every=0", "train.steps=3")
    finished = running.run("train", tiny, f"--workdir={workdir}", *(f"--config.{override}" for override in overrides))
    assert finished.code == 0, finished.err
    return workdir


@pytest.fixture(scope="module")
def analysed(trained, larger, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("analysis") / "out"
    finished = running.run("analyze", f"--adapter={larger}", f"--other={trained}", f"--to={folder}")
    assert finished.code == 0, finished.err
    assert finished.out == f"analysis of 12 updates in {folder}; read {folder}/analysis.md first\n"
    return folder


def table(file) -> list[dict]:
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_row_for_every_layer_and_projection_with_the_numbers_of_the_whole_matrices(demo_base, larger, analysed):
    rows = table(analysed / "analysis.csv")
    targets = ("q_proj", "v_proj", "down_proj")
    assert [(row["projection"], row["layer"]) for row in rows] == [(t, str(i)) for t in targets for i in range(4)]
    base, adapter = read_base(demo_base), read_adapter(larger)
    shapes, _ = decoder.abstract(Decoder(base.config, adapter.lora))
    factors = adapter.restore({"lora": shapes["lora"]})["lora"]["layers"]["mlp"]["down_proj"]
    kernel = np.asarray(base.params["layers"]["mlp"]["down_proj"]["kernel"][2])
    delta = 8 / 6 * np.asarray(factors["lora_a"][2]) @ np.asarray(factors["lora_b"][2])
    left, values, right = np.linalg.svd(delta)
    row = next(row for row in rows if row["projection"] == "down_proj" and row["layer"] == "2")
    through = np.linalg.norm(left[:, :6].T @ kernel @ right[:6].T)
    for name, expected in (
        ("rank", 6),
        ("update_norm", np.linalg.norm(delta)),
        ("largest_value", values[0]),
        ("base_norm", np.linalg.norm(kernel)),
        ("base_through_update", through),
        ("amplification", np.linalg.norm(delta) / through),
    ):
        assert float(row[name]) == pytest.approx(expected, rel=1e-4), (
            name
        )  # float32 against float64, six digits written
    listed = [
        float(x["value"])
        for x in table(analysed / "singular_values.csv")
        if (x["layer"], x["projection"]) == ("2", "down_proj")
    ]
    np.testing.assert_allclose(listed, values[:6], rtol=1e-4)


def test_directions_are_compared_where_both_have_an_adapter(analysed):
    rows = table(analysed / "similarity.csv")
    assert {row["projection"] for row in rows} == {"q_proj", "v_proj", "down_proj"}
    assert {row["of"] for row in rows} == {"lora_a", "update"}
    assert len(rows) == 3 * 2 * 4 * 6 * 4  # projections, kinds, layers, ranks of the two
    assert all(0 <= float(row["phi"]) <= 1.000001 for row in rows)


def test_an_adapter_shares_all_directions_with_itself(trained, tmp_path):
    finished = running.run("analyze", f"--adapter={trained}", f"--other={trained}", f"--to={tmp_path / 'out'}")
    assert finished.code == 0, finished.err
    same = [row for row in table(tmp_path / "out" / "similarity.csv") if row["i"] == row["j"]]
    assert {row["phi"] for row in same} == {"1"}


def test_the_function_gives_the_numbers_that_the_command_writes(analysed, trained, larger):
    result = analysis.analyze(larger, trained)
    modules = [module for of in result.modules.values() for module in of]
    for module, row in zip(modules, table(analysed / "analysis.csv"), strict=True):
        assert (module.projection, str(module.layer), str(module.rank)) == (
            row["projection"],
            row["layer"],
            row["rank"],
        )
        assert f"{module.norms.factor:.6g}" == row["amplification"]
        assert f"{module.effective_rank:.6g}" == row["effective_rank"]
    assert {phi.shape for maps in result.similarities.values() for phi in maps.values()} == {(6, 4)}
    assert result.common_seed is None


def test_pictures_and_the_page(analysed, larger):
    pictures = {"modules.png", "singular_values.png"}
    pictures |= {f"similarity_{t}_{of}.png" for t in ("q_proj", "v_proj", "down_proj") for of in ("lora_a", "update")}
    assert {path.name for path in analysed.glob("*.png")} == pictures
    for picture in pictures:
        assert (analysed / picture).read_bytes().startswith(b"\x89PNG")
    page = (analysed / "analysis.md").read_text()
    assert page.startswith(f"# What `{larger}` does to its base")
    assert "| down_proj | 6 |" in page and "| q_proj | ΔW |" in page


def test_runs_of_one_seed_are_said_to_have_begun_alike(trained, larger, tmp_path):
    finished = running.run("analyze", f"--adapter={trained}", f"--other={trained}", f"--to={tmp_path / 'same'}")
    assert finished.code == 0 and "Both runs have seed 0" in (tmp_path / "same" / "analysis.md").read_text()
    finished = running.run("analyze", f"--adapter={trained}", f"--other={larger}", f"--to={tmp_path / 'two'}")
    assert finished.code == 0 and "Both runs have seed" not in (tmp_path / "two" / "analysis.md").read_text()


def test_adapters_with_nothing_in_common_are_refused(tiny, trained, tmp_path):
    runs = []
    for i, ranks in enumerate(("{'q_proj': (1, 0, 0, 0)}", "{'q_proj': (0, 1, 1, 1)}")):
        runs.append(tmp_path / f"run{i}")
        flags = ("--config.lora.targets=q_proj", f"--config.lora.ranks={ranks}", "--config.train.steps=3")
        finished = running.run("train", tiny, f"--workdir={runs[-1]}", *flags, "--config.sample.every=0")
        assert finished.code == 0, finished.err
    finished = running.run("analyze", f"--adapter={runs[0]}", f"--other={runs[1]}", f"--to={tmp_path / 'out'}")
    assert finished.code == 1 and "have no projection of any layer in common" in finished.err
    finished = running.run("analyze", f"--adapter={runs[0]}", f"--to={tmp_path / 'out'}")
    assert finished.code == 0, finished.err  # one layer, rank 1
    assert len(table(tmp_path / "out" / "analysis.csv")) == 1


def test_mistakes_get_one_line(trained, demo_base, tmp_path):
    exported = tmp_path / "lora"
    assert running.run("export", f"--workdir={trained}", "--format=peft", f"--to={exported}").code == 0
    to = f"--to={tmp_path / 'out'}"
    for arguments, said in (
        ((to,), "--adapter missing"),
        ((f"--adapter={exported}", to), "base is missing"),
        ((f"--adapter={tmp_path}", to), "is neither a workdir"),
        ((f"--adapter={trained}", f"--to={exported}"), "exists and is not an empty folder"),
    ):
        finished = running.run("analyze", *arguments)
        assert (finished.code, finished.err.count("\n")) == (1, 1) and said in finished.err
    assert running.run("analyze", f"--adapter={exported}", f"--base={demo_base}", to).code == 0  # and so it works
    assert {row["projection"] for row in table(tmp_path / "out" / "analysis.csv")} == set(TARGETS)
