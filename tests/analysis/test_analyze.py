"""The analysing command: its numbers are those of the merged matrices, and its files are what they say."""

import csv
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import running

from lowrank import analysis
from lowrank.adapters.config import TARGETS, LoraConfig
from lowrank.analysis.page import describe
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.runs.adapter import read_adapter
from lowrank.weights.base import read_base
from lowrank.weights.peft import write_peft


def write_random(folder: pathlib.Path, base: pathlib.Path, lora: LoraConfig) -> pathlib.Path:
    """Write an adapter with random factors, none in layers of rank 0, as a PEFT folder."""
    shapes, _ = decoder.abstract(Decoder(read_base(base).config, lora))
    draw, there = np.random.default_rng(0), np.sign(lora.layer_ranks("q_proj", 4))[:, None, None]
    factors = jax.tree.map(lambda leaf: np.float32(there * draw.normal(size=leaf.shape)), shapes["lora"])
    write_peft(folder, factors, lora, base_name=str(base))
    return folder


@pytest.fixture(scope="module")
def larger(demo_base, tmp_path_factory) -> pathlib.Path:
    """An adapter of rank 6, on three projections."""
    lora = LoraConfig(rank=6, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))
    return write_random(tmp_path_factory.mktemp("larger") / "peft", demo_base, lora)


@pytest.fixture(scope="module")
def analysed(demo_base, trained, larger, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("analysis") / "out"
    given = (f"--adapter={larger}", f"--other={trained}", f"--base={demo_base}")
    finished = running.run("analyze", *given, f"--to={folder}")
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


@pytest.fixture(scope="module")
def with_itself(trained) -> analysis.Analysis:
    return analysis.analyze(trained, trained)


def test_an_adapter_shares_all_directions_with_itself(with_itself):
    values = [value for maps in with_itself.similarities.values() for phi in maps.values() for value in np.diag(phi)]
    assert len(values) == 7 * 2 * 4 * 4 and {f"{value:.6g}" for value in values} == {"1"}


def test_the_function_gives_the_numbers_that_the_command_writes(analysed, trained, larger, demo_base):
    result = analysis.analyze(larger, trained, demo_base)
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


def test_runs_of_one_seed_are_said_to_have_begun_alike(trained, with_itself, tmp_path):
    assert "Both runs have seed 0" in describe(with_itself)
    other = shutil.copytree(trained, tmp_path / "other")
    record = json.loads((other / "config.json").read_text())
    record["config"]["seed"] = 3
    (other / "config.json").write_text(json.dumps(record))
    assert "Both runs have seed" not in describe(analysis.analyze(trained, other))


def test_adapters_with_nothing_in_common_are_refused(demo_base, tmp_path):
    one, other = (
        write_random(tmp_path / name, demo_base, LoraConfig(rank=1, targets=("q_proj",), ranks=(("q_proj", ranks),)))
        for name, ranks in (("one", (1, 0, 0, 0)), ("other", (0, 1, 1, 1)))
    )
    given = (f"--adapter={one}", f"--base={demo_base}", f"--to={tmp_path / 'out'}")
    finished = running.run("analyze", *given, f"--other={other}")
    assert finished.code == 1 and "have no projection of any layer in common" in finished.err
    finished = running.run("analyze", *given)
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
