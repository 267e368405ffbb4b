"""A sweep's tables, summary and picture: literal numbers from small results made by hand."""

import csv
import dataclasses
import math

import pytest

from lowrank.adapters.config import TARGETS
from lowrank.sweeping import picture, ranking
from lowrank.sweeping import tables as tables_lib
from lowrank.sweeping.picture import draw
from lowrank.sweeping.ranking import Result

RANK, RATE = "lora.rank", "optim.learning_rate"


def member(loss, rank=None, rate=None, seed=None, *, mode="lora", diverged=None, **more) -> Result:
    """Named by its values; evaluated at steps 0, 10 and 20."""
    swept = {RANK: rank, RATE: rate, **more, "seed": seed}
    swept = {key: value for key, value in swept.items() if value is not None}
    name = "-".join([mode, *map(str, swept.values())])
    curve = ((0, 3.0),) if diverged else ((0, 3.0), (10, loss + 0.25), (20, loss))
    trainable = 1_000_000 if mode == "full" else 1_000 * (rank or 1)
    train_loss = None if diverged else loss - 0.5
    return Result(name, swept, mode, trainable, 4 * trainable, diverged or 20, train_loss, curve, diverged)


def with_seeds(rank, rate, losses, **more) -> list[Result]:
    return [member(loss, rank, rate, seed, **more) for seed, loss in enumerate(losses)]


def grid() -> list[Result]:
    """Ranks 2, 4 and 8; rates 1e-4, 1e-3, 1e-2. Best: rank 8 at 1e-3; rank 4 is 0.01 behind; a deviation is 0.02."""
    results = []
    for rank, mean in ((2, 1.30), (4, 1.21), (8, 1.20)):
        for rate, worse in ((1e-4, 0.2), (1e-3, 0.0), (1e-2, 0.1)):
            results += with_seeds(rank, rate, [mean + worse + away for away in (-0.02, 0.0, 0.02)])
    return results


def baseline() -> list[Result]:
    """1e-5 is the better and the smaller of two."""
    best = with_seeds(None, 1e-5, (1.16, 1.18), mode="full")
    return best + with_seeds(None, 1e-4, (1.4, 1.5), mode="full")


def paragraph(results) -> str:
    return tables_lib.describe(results, "title").split("\n\n")[1]


def tables(results) -> dict[str, list[list[str]]]:
    """Heading -> rows of its table, the head first. Every row has as many cells, and all are equally wide."""
    found = {}
    for section in tables_lib.describe(results, "title").split("\n## ")[1:]:
        heading, _, body = section.partition("\n\n")
        lines = [line for line in body.splitlines() if line.startswith("|")]
        assert len({len(line) for line in lines}) <= 1
        assert len({line.count("|") for line in lines}) <= 1
        found[heading] = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]
    return found


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def test_a_member_is_judged_by_its_last_evaluation_and_remembers_its_best():
    result = Result("a", {}, "lora", 1, 4, 30, 0.5, ((0, 3.0), (10, 0.5), (20, 0.25), (30, 0.75)))
    assert (result.loss, result.best) == (0.75, (20, 0.25))
    assert result.perplexity == math.exp(0.75)
    gone = dataclasses.replace(result, diverged=31)
    assert (gone.loss, gone.perplexity, gone.best) == (None, None, (20, 0.25))
    untested = dataclasses.replace(result, curve=())
    assert (untested.loss, untested.perplexity, untested.best) == (None, None, (None, None))
    overflown = dataclasses.replace(result, curve=((0, math.nan), (10, 2.0), (20, math.inf)))
    assert overflown.best == (10, 2.0)
    assert dataclasses.replace(result, curve=((0, 1e4),)).perplexity == math.inf


def test_settings_are_ranked_by_the_mean_over_seeds_with_the_samples_deviation():
    results = with_seeds(4, 1e-3, (1.0, 1.2, 1.7)) + with_seeds(8, 1e-3, (1.1, 1.2, 1.3))
    first, second = ranking.rank_settings(results)
    assert (first.values, first.losses) == ({RANK: 8, RATE: 1e-3}, (1.1, 1.2, 1.3))
    assert first.mean == pytest.approx(1.2)
    assert first.deviation == pytest.approx(0.1)  # by n - 1; by n it would be 0.0816
    assert second.mean == pytest.approx(1.3)
    assert second.deviation == pytest.approx(0.13**0.5)
    assert ranking.pool_deviation([first, second]) == pytest.approx(((0.01 + 0.13) / 2) ** 0.5)
    assert [result.name for result in ranking.rank_members(results)][:3] == [
        "lora-4-0.001-0",
        "lora-8-0.001-0",
        "lora-4-0.001-1",
    ]
    (row,) = [row for row in tables(results)["Settings"] if row[1] == "8"]
    assert row == ["1", "8", "1e-3", "1.2000 ± 0.1000", "3", "3.320", "8,000", "32.0 KB"]


def test_one_seed_has_no_deviation():
    (only,) = ranking.rank_settings([member(1.5, 4, 1e-3)])
    assert (only.mean, only.deviation) == (1.5, None)
    assert ranking.pool_deviation([only]) is None


def test_the_csv_has_every_member_with_every_digit(tmp_path):
    odd = member(0.1 + 0.2, 4, 1 / 3e3, 1, **{"lora.targets": ("q_proj", "v_proj")})
    full = dataclasses.replace(member(0.25, None, 1e-5, mode="full"), exact_match=0.125)
    gone = member(0.2, 8, 1e-2, 0, diverged=7, **{"lora.targets": ("q_proj",)})
    file = tmp_path / "sweep.csv"
    tables_lib.write_csv(file, [gone, odd, full])
    with open(file, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [
        *("name", RANK, RATE, "lora.targets", "seed", "train.mode", "eval/loss", "eval/perplexity", "eval/best_loss"),
        *("eval/best_step", "train/loss", "eval/exact_match", "trainable_parameters", "adapter_bytes", "steps"),
        "diverged_at",
    ]
    assert [row["name"] for row in rows] == [full.name, odd.name, gone.name]
    assert [rows[0][key] for key in (RANK, RATE, "lora.targets", "seed", "train.mode")] == ["", "1e-05", "", "", "full"]
    assert rows[0]["eval/exact_match"] == "0.125"
    assert rows[1]["eval/exact_match"] == ""
    assert rows[1]["lora.targets"] == "q_proj,v_proj"
    assert rows[1]["eval/loss"] == "0.30000000000000004"
    for name, value in (
        *((RATE, 1 / 3e3), ("eval/perplexity", math.exp(0.1 + 0.2)), ("train/loss", 0.1 + 0.2 - 0.5)),
        *(("eval/best_step", 20), ("trainable_parameters", 4000), ("adapter_bytes", 16000), ("steps", 20)),
    ):
        assert float(rows[1][name]) == value
    names = ("eval/loss", "eval/perplexity", "eval/best_loss", "train/loss", "diverged_at")
    assert [rows[2][name] for name in names] == ["", "", "3.0", "", "7"]
    assert [rows[1]["diverged_at"], rows[1][RANK]] == ["", "4"]
    assert list(tmp_path.iterdir()) == [file]


def test_columns_that_say_nothing_are_left_out(tmp_path):
    tables_lib.write_csv(tmp_path / "sweep.csv", [member(1.0, 4)])
    head = (tmp_path / "sweep.csv").read_text().splitlines()[0].split(",")
    assert head[:3] == ["name", RANK, "eval/loss"]
    assert "eval/exact_match" not in head


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        (RATE, 3e-4, "3e-4"),
        (RATE, 2.5e-5, "2.5e-5"),
        (RATE, 1.0, "1e0"),
        (RANK, 8, "8"),
        ("lora.alpha", 32.0, "32"),
        ("data.seed", None, "None"),
        ("lora.targets", ("q_proj", "v_proj"), "q_proj+v_proj"),
        ("lora.targets", TARGETS[::-1], "all seven"),
        ("lora.targets", ("q_proj", "k_proj", "v_proj", "o_proj"), "attention"),
        ("lora.targets", ("gate_proj", "up_proj", "down_proj"), "MLP"),
    ],
)
def test_values_for_people(key, value, text):
    assert tables_lib.format_value(key, value) == text


# ---- Words -----------------------------------------------------------------------------------------------------------


def test_the_summary_names_the_best_setting_its_equals_and_the_rank_that_is_enough():
    assert paragraph(grid()) == (
        "Ranked by the held-out loss: 27 members in 9 settings. "
        "The best setting is rank 8, learning rate 1e-3: 1.2000 ± 0.0200 (3 seeds). "
        "Over seeds, the standard deviation is 0.0200 (pooled over settings at their best rates). "
        "By that measure, 1 other setting (next in the table) cannot be told apart from the best. "
        "Rank 4 is enough: it is within one standard deviation (0.0200, pooled over these ranks) of rank 8, the best."
    )


def test_no_smaller_rank_is_called_enough_beyond_one_deviation():
    results = [result for result in grid() if result.swept[RANK] != 4]
    results += with_seeds(4, 1e-3, (1.205, 1.225, 1.245))  # 0.025 behind
    said = paragraph(results)
    assert "No other setting is that close to the best." in said
    assert (
        "No rank below 8 is enough: none is within one standard deviation (0.0200, pooled over these ranks) of it. Rank 8 is the largest tried: extend the grid."
        in said
    )


def test_the_smallest_rank_may_be_the_best_and_a_rank_that_lost_a_seed_is_not_judged():
    results = with_seeds(4, 1e-3, (1.0, 1.1)) + with_seeds(8, 1e-3, (1.3, 1.4))
    results += [member(0.9, 2, 1e-3, 0), member(0.0, 2, 1e-3, 1, diverged=5)]
    assert "1 of 6 members diverged. The best setting is rank 4" in paragraph(results)
    assert paragraph(results).endswith("The smallest rank, 4, is also the best.")


@pytest.mark.parametrize(("rates", "edge"), [((1e-3, 1e-2), "smallest"), ((1e-4, 1e-3), "largest")])
def test_a_best_rate_at_the_edge_is_marked(rates, edge):
    results = [result for result in grid() if result.swept[RATE] in rates]
    head, *rows = tables(results)["Best rate for each rank"]
    assert [row[head.index("at the edge")] for row in rows] == [f"{edge} tried"] * 3


def test_one_seed_claims_nothing_of_deviations_or_of_ranks():
    said = paragraph([result for result in grid() if result.swept["seed"] == 0])
    assert said.endswith("With one seed of each setting, small differences may be chance.")
    assert "±" not in said and "enough" not in said


def test_the_baseline_is_a_row_and_ranks_are_judged_without_it():
    results = grid() + baseline()
    said = paragraph(results)
    assert "The best setting is full fine-tuning, learning rate 1e-5: 1.1700 ± 0.0141 (2 seeds)." in said
    pooled = ((3 * 2 * 0.02**2 + 0.0002) / 7) ** 0.5  # three ranks of three seeds, two seeds of full fine-tuning
    assert f"the standard deviation is {pooled:.4f} (pooled" in said
    assert said.endswith(
        "Rank 4 is enough: it is within one standard deviation (0.0200, pooled over these ranks) of rank 8, the best."
    )
    assert tables(results)["Best rate for each rank"] == [
        [
            "rank",
            "train.mode",
            "best rate",
            "at the edge",
            "held-out loss",
            "seeds",
            "perplexity",
            "trainable parameters",
            "bytes",
        ],
        ["2", "lora", "1e-3", "", "1.3000 ± 0.0200", "3", "3.669", "2,000", "8.0 KB"],
        ["4", "lora", "1e-3", "", "1.2100 ± 0.0200", "3", "3.353", "4,000", "16.0 KB"],
        ["8", "lora", "1e-3", "", "1.2000 ± 0.0200", "3", "3.320", "8,000", "32.0 KB"],
        ["–", "full", "1e-5", "smallest tried", "1.1700 ± 0.0141", "2", "3.222", "1,000,000", "4.0 MB"],
    ]


def test_a_setting_that_lost_a_seed_never_stands_above_one_that_lost_none():
    lost = [*with_seeds(8, 1e-3, (0.5, 0.6)), member(0.0, 8, 1e-3, 2, diverged=12)]
    results = lost + with_seeds(4, 1e-3, (2.0, 2.1, 2.2)) + [member(0, 16, 1e-3, seed, diverged=3) for seed in range(3)]
    rows = tables(results)["Settings"][1:]
    assert [[row[1], *row[3:5]] for row in rows] == [
        ["4", "2.1000 ± 0.1000", "3"],
        ["8", "0.5500 ± 0.0707", "2 of 3"],
        ["16", "diverged", "0 of 3"],
    ]
    text = tables_lib.describe(results, "title")
    assert "The best setting is rank 4, learning rate 1e-3: 2.1000 ± 0.1000 (3 seeds)." in text
    assert "4 of 9 members diverged." in text
    assert "- `lora-8-0.001-2` at step 12\n- `lora-16-0.001-0` at step 3\n" in text
    assert [row[1] for row in tables(results)["Members"]][1] == "`lora-8-0.001-0`"


def test_a_setting_with_an_evaluation_that_is_not_finite_is_no_better_than_one_that_lost_a_seed():
    overflown = dataclasses.replace(member(0.0, 8, 1e-3, 1), curve=((0, 3.0), (20, math.nan)))
    first, second = ranking.rank_settings([member(0.5, 8, 1e-3, 0), overflown, *with_seeds(4, 1e-3, (2.0, 2.1))])
    assert (first.values[RANK], first.complete) == (4, True)
    assert (second.losses, second.diverged, second.complete) == ((0.5,), 0, False)


def test_where_all_diverged_nothing_is_ranked():
    said = paragraph([member(0, rank, diverged=1) for rank in (1, 2)])
    assert said.endswith("2 of 2 members diverged. In every setting a seed has no loss, so no setting is best.")


def test_targets_are_part_of_a_setting_and_ranks_are_compared_within_them():
    results = []
    for targets, better in ((("q_proj", "v_proj"), 0.0), (TARGETS, 0.5)):
        for rank, mean in ((2, 2.0), (4, 1.99)):
            for rate in (1e-3, 1e-2):
                losses = [mean - better + away + rate for away in (0.0, 0.1)]
                results += with_seeds(rank, rate, losses, **{"lora.targets": targets})
    results += with_seeds(1, 1e-3, (1.5, 1.6), **{"lora.targets": ("gate_proj",)})  # enough, but not of these targets
    assert "Rank 2 is enough (with targets all seven): it is within one standard deviation (" in paragraph(results)
    head, *rows = tables(results)["Best rate for each rank x targets"]
    assert head[:3] == ["rank", "targets", "best rate"]
    assert [row[:3] for row in rows] == [
        ["1", "gate_proj", "1e-3"],
        ["2", "q_proj+v_proj", "1e-3"],
        ["2", "all seven", "1e-3"],
        ["4", "q_proj+v_proj", "1e-3"],
        ["4", "all seven", "1e-3"],
    ]


def test_without_held_out_examples_the_training_loss_ranks_and_it_is_said():
    results = [dataclasses.replace(result, curve=()) for result in grid()]
    assert paragraph(results).startswith("Ranked by the training loss: 27 members in 9 settings. Nothing is held out:")
    head, first, *_ = tables(results)["Settings"]
    assert head == ["", "rank", "learning rate", "training loss", "seeds", "trainable parameters", "bytes"]
    assert first[:4] == ["1", "8", "1e-3", "0.7000 ± 0.0200"]


def test_where_no_rate_is_swept_there_is_no_table_of_rates():
    results = [member(1.0 + 1 / rank, rank) for rank in (2, 4)]
    assert list(tables(results)) == ["Settings", "Members"]
    assert "rate" not in paragraph(results)


def test_a_bar_in_a_value_does_not_end_its_cell():
    text = tables_lib.describe(
        [member(1.0, **{"data.train": "a|b.json"}), member(2.0, **{"data.train": "c.json"})], "t"
    )
    assert r"| a\|b.json  |" in text


# ---- The picture -----------------------------------------------------------------------------------------------------


def lines(axis) -> dict[str, list[tuple[float, float]]]:
    """Label -> points, of what has error bars or could have them."""
    return {
        container.get_label(): [(float(x), round(float(y), 9)) for x, y in container.lines[0].get_xydata()]
        for container in axis.containers
    }


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_three_panels_with_the_points_of_the_settings():
    results = grid() + baseline()
    figure = draw(results)
    over_rank, over_steps, over_rate = figure.axes
    assert lines(over_rank) == {
        "learning rate 1e-4": [(2, 1.5), (4, 1.41), (8, 1.4)],
        "learning rate 1e-3": [(2, 1.3), (4, 1.21), (8, 1.2)],
        "learning rate 1e-2": [(2, 1.4), (4, 1.31), (8, 1.3)],
    }
    (bars,) = over_rank.containers[0].lines[2]
    assert [round(float(high - low), 9) for (_, low), (_, high) in bars.get_segments()] == [0.04] * 3
    assert [label.get_text() for label in over_rank.get_xticklabels()] == ["2", "4", "8"]
    (level,) = [line for line in over_rank.get_lines() if line.get_label() == "full fine-tuning"]
    assert list(level.get_ydata()) == [pytest.approx(1.17)] * 2
    (band,) = over_rank.patches
    assert band.get_height() == pytest.approx(2 * 0.0002**0.5)
    assert over_rank.get_xscale() == over_rate.get_xscale() == "log"
    assert over_rank.get_ylabel() == over_steps.get_ylabel() == "held-out loss (nats per token)"

    curves = {line.get_label(): [round(float(y), 9) for y in line.get_ydata()] for line in over_steps.get_lines()}
    assert curves == {
        "rank 2": [3.0, 1.55, 1.3],
        "rank 4": [3.0, 1.46, 1.21],
        "rank 8": [3.0, 1.45, 1.2],
        "full fine-tuning": [3.0, 1.42, 1.17],
    }
    assert over_steps.get_ylim()[1] < 2  # the beginning is left out

    assert lines(over_rate) == {
        "rank 2": [(1e-4, 1.5), (1e-3, 1.3), (1e-2, 1.4)],
        "rank 4": [(1e-4, 1.41), (1e-3, 1.21), (1e-2, 1.31)],
        "rank 8": [(1e-4, 1.4), (1e-3, 1.2), (1e-2, 1.3)],
        "full fine-tuning": [(1e-5, 1.17), (1e-4, 1.45)],
    }
    assert legend(figure) == ["rank 2", "rank 4", "rank 8", "full fine-tuning"]
    looks = {(str(c.lines[0].get_color()), c.lines[0].get_marker()) for c in over_rate.containers}
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 4


def test_one_rate_needs_no_panel_of_rates_and_one_seed_no_bars():
    figure = draw([member(1.0 + 1 / rank, rank, 1e-3) for rank in (2, 4)])
    over_rank, _ = figure.axes
    assert lines(over_rank) == {"learning rate 1e-3": [(2, 1.5), (4, 1.25)]}
    assert not over_rank.containers[0].has_yerr
    assert legend(figure) == ["rank 2", "rank 4"]
    assert "one seed of each setting" in figure.get_supxlabel()


def test_what_is_swept_beside_rank_and_rate_has_lines_of_its_own_at_their_best_rates():
    results = [
        member(2 - rank / 8 - len(targets) / 100 + rate, rank, rate, **{"lora.targets": targets})
        for targets in (("q_proj", "v_proj"), TARGETS)
        for rank in (2, 4)
        for rate in (0.25, 0.125)
    ]
    over_rank, over_steps, over_rate = draw(results).axes
    assert lines(over_rank) == {
        "targets q_proj+v_proj": [(2, 1.855), (4, 1.605)],
        "targets all seven": [(2, 1.805), (4, 1.555)],
    }
    assert len(over_steps.get_lines()) == 4
    assert list(lines(over_rate)) == [
        f"rank {rank}, targets {targets}" for rank in (2, 4) for targets in ("q_proj+v_proj", "all seven")
    ]
    looks = [(c.lines[0].get_color(), c.lines[0].get_marker()) for c in over_rate.containers]
    assert looks[0][0] == looks[1][0] != looks[2][0] == looks[3][0]  # rank by colour
    assert looks[0][1] == looks[2][1] != looks[1][1] == looks[3][1]  # targets by marker


def test_without_ranks_another_key_is_the_axis():
    by_number = draw([member(1 + size / 100, rate=1e-3, **{"train.batch_size": size}) for size in (16, 4, 8)]).axes[0]
    assert by_number.get_xlabel() == "train.batch_size"
    assert lines(by_number) == {"learning rate 1e-3": [(4, 1.04), (8, 1.08), (16, 1.16)]}
    by_name = draw([member(1 + i, **{"data.train": name}) for i, name in enumerate(("b$.json", "a$.json"))]).axes[0]
    assert [label.get_text() for label in by_name.get_xticklabels()] == [r"a\$.json", r"b\$.json"]
    assert lines(by_name) == {"adapter": [(0, 2.0), (1, 1.0)]}


def test_what_diverged_is_left_out_and_counted():
    lost = [
        member(0.0, 8, 1e-2, seed, diverged=5) if seed else r for seed, r in enumerate(with_seeds(8, 1e-2, (0.1, 0, 0)))
    ]
    results = [result for result in grid() if (result.swept[RANK], result.swept[RATE]) != (8, 1e-2)] + lost
    figure = draw(results)
    over_rank, _, over_rate = figure.axes
    assert lines(over_rank)["learning rate 1e-2"] == [(2, 1.4), (4, 1.31)]
    assert lines(over_rate)["rank 8"] == [(1e-4, 1.4), (1e-3, 1.2)]
    assert "not drawn: 3 members of settings in which a seed diverged or has no loss" in figure.get_supxlabel()


def test_points_far_above_are_cut_off():
    far = draw(grid() + with_seeds(2, 1e-1, (2.6, 2.6, 2.6)))
    assert max(axis.get_ylim()[1] for axis in far.axes) < 2
    assert "lines that leave a panel at the top go on above it" in far.get_supxlabel()
    flat = draw([dataclasses.replace(result, curve=()) for result in grid()])
    assert "leave a panel" not in flat.get_supxlabel()


def test_without_evaluations_the_training_loss_is_drawn():
    over_rank, over_rate = draw([dataclasses.replace(result, curve=()) for result in grid()]).axes
    assert over_rank.get_ylabel() == over_rate.get_ylabel() == "training loss (nats per token)"
    assert lines(over_rate)["rank 8"] == [(1e-4, 0.9), (1e-3, 0.7), (1e-2, 0.8)]


@pytest.mark.parametrize(
    "results",
    [
        [member(1.0)],
        [dataclasses.replace(member(1.0), curve=())],
        [member(0, 4, 1e-3, diverged=1)],
        with_seeds(None, None, (1.0, 1.1)),
        baseline(),
        [member(1.0, rate=rate) for rate in (1e-3, 1e-2)],
    ],
    ids=["one", "one without evaluation", "all diverged", "seeds", "full only", "rates only"],
)
def test_the_smallest_sweeps_have_a_picture_and_a_page(tmp_path, results):
    picture.write_picture(tmp_path / "sweep.png", results, "100 $ and_more")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert list(tables(results))[-1] == "Members"
