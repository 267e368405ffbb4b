"""`lowrank.plan`: the real step compiled for a slice of TPUs on a machine that has none; and the same from Python."""

import dataclasses
import json
import sys

import jax
import pytest
import running

from lowrank import planning
from lowrank.adapters.config import LoraConfig
from lowrank.cli import config_file
from lowrank.errors import UserError
from lowrank.families.sizes import SIZES
from lowrank.model.flops import step_flops
from lowrank.parallel import compiling
from lowrank.parallel import mesh as mesh_lib
from lowrank.planning import topology
from lowrank.runs.setup import abstract_step, compile_step

CONFIG = """
import ml_collections


def get_config():
    return ml_collections.ConfigDict({
        "architecture": "demo",
        "data": {"max_length": 15},
        "lora": {"rank": 4, "alpha": 8.0},
        "train": {"steps": 10, "batch_size": 8, "microbatches": 2},
        "mesh": {"data": 1, "fsdp": 2, "tensor": 2},
        "remat": "full",
    })
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Run the command on the tiny config with these flags -> its end and output, and the numbers it wrote."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "tiny.py").write_text(CONFIG)

    def plan(*flags: str, config: str = f"{folder / 'tiny.py'}"):
        (folder / "numbers.json").unlink(missing_ok=True)
        finished = running.run("plan", f"--config={config}", f"--json={folder / 'numbers.json'}", *flags)
        numbers = (folder / "numbers.json").read_text() if (folder / "numbers.json").exists() else "null"
        return finished, json.loads(numbers)

    return plan


@pytest.fixture(scope="module")
def for_v5e(plan):
    pytest.importorskip("libtpu", reason="compiling for a TPU needs the plan extra")
    finished, numbers = plan("--topology=v5e:2x2", "--price_per_chip_hour=2", "--tokens=5e6")
    assert finished.code == 0, finished.err
    return finished.out, numbers


@pytest.mark.slow
def test_the_bytes_on_a_chip_are_those_of_its_shards(for_v5e):
    _, numbers = for_v5e
    norms = 9 * 128  # cut by fsdp alone; everything else by fsdp and tensor
    assert numbers["bytes"]["base"] == ((918_656 - norms) // 4 + norms // 2) * 2
    # Of each projection inputs + outputs, times rank and layers; every factor is cut once.
    adapter = (256 + 192 + 192 + 256 + 512 + 512 + 512) * 4 * 4 * 4 // 2
    assert numbers["bytes"]["adapter"] == adapter
    assert numbers["bytes"]["optimizer"] == 2 * adapter + 4 * 4  # two moments; four counters of steps
    assert numbers["bytes"]["available"] == 15.75 * 2**30
    parts = ("base", "adapter", "optimizer", "other", "temporaries", "program")
    assert numbers["bytes"]["together"] == sum(numbers["bytes"][part] for part in parts)
    assert numbers["bytes"]["program"] > 0


def test_what_is_said_of_a_plan_that_fits(for_v5e):
    out, numbers = for_v5e
    assert numbers["fits"] and numbers["compiled"] and numbers["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    for line in (
        "model      demo: 4 layers, embed 128, mlp 384, heads 4/2, vocab 1024",
        "slice      v5e:2x2, 4 chips; mesh data 1 x fsdp 2 x tensor 2",
        "of 16.9 GB: fits, 16.9 GB to spare",
        "ESTIMATE, not a measurement",
        "one epoch of Alpaca (52,002 examples of 127.5 tokens, Llama 2's tokenizer): 6.63M tokens",
        "100M tokens: 100M tokens",
        "5M tokens: 5M tokens",
        "at 2 dollars per chip and hour, as --price_per_chip_hour says",
    ):
        assert line in out


def test_fsdp_gathers_and_tensor_sums(for_v5e):
    out, numbers = for_v5e
    found = numbers["collectives"]
    # Two micro-batches, four layers, seven kernels forward and backward, at the least.
    assert found["all-gather"]["times"] >= 2 * 4 * 7 * 2
    assert found["all-reduce"]["times"] >= 2 * 4 * 2 * 2
    assert "all-gather" in out and "all-reduce" in out


def test_the_time_by_part_has_the_flops_of_the_formulas(for_v5e):
    out, numbers = for_v5e
    cycles, flops = numbers["cycles"], step_flops(SIZES["demo"], LoraConfig(rank=4, alpha=8.0), 8, 15, "full")
    found = {name: 4 * part["flops"] for name, part in cycles["parts"].items()}  # of four chips
    assert found["base products, forward"] == flops.base_forward
    assert found["base products, backward"] == flops.base_backward
    sizes = {name: inputs * outputs for name, (inputs, outputs) in SIZES["demo"].projections().items()}
    again = 1 - sizes["down_proj"] / sum(sizes.values())  # the last product of a block is not needed again
    assert found["base products, again"] == pytest.approx(again * flops.base_forward)
    assert cycles["unknown"] == {}
    total = sum(part["seconds"] for part in cycles["parts"].values())
    assert numbers["seconds"]["estimate"] == cycles["seconds"] == pytest.approx(total + cycles["exposed"])
    assert all(part["corrected"] >= part["floor"] for part in cycles["parts"].values() if part["flops"])
    assert cycles["exposed"] > 0  # four chips, and next to nothing to compute
    assert "time of a step on one device by the compiler's cycles, at 1.503 GHz" in out


def test_dollars_are_hours_times_chips_times_the_price(for_v5e):
    _, numbers = for_v5e
    assert numbers["price_per_chip_hour"] == 2
    for bill in numbers["at_efficiency"].values():
        assert bill["dollars"] == pytest.approx(bill["hours"] * 4 * 2)
        seconds = numbers["seconds"]["estimate"]
        assert bill["hours"] == pytest.approx(bill["steps"] * seconds / 3600)


@pytest.mark.parametrize("name", ["v5e:2x2", pytest.param("v6e:2x2", marks=pytest.mark.slow)])
def test_attention_is_splash_on_a_tpu_forward_and_backward(tmp_path, name):
    pytest.importorskip("libtpu", reason="compiling for a TPU needs the plan extra")
    slice = topology.open_slice(name)
    (tmp_path / "tiny.py").write_text(CONFIG)
    flags = ["--config.data.max_length=128", "--config.train.microbatches=1"]
    config = config_file.read(str(tmp_path / "tiny.py"), flags)
    mesh = mesh_lib.make_mesh(config.mesh, slice.devices)
    architecture = dataclasses.replace(SIZES["demo"], layers=2, windows=(100, 100))
    step = abstract_step(config, architecture, mesh, 10)
    assert step.model.attention == "splash"
    with compiling.without_compile_cache():
        text = compile_step(step).as_text()
    for kernel in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
        assert kernel in text
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=120))
    assert abstract_step(short, architecture, mesh, 10).model.attention == "xla"


@pytest.mark.slow
def test_a_search_ranks_what_the_compiler_says_fits(plan):
    pytest.importorskip("libtpu", reason="compiling for a TPU needs the plan extra")
    finished, numbers = plan("--topology=v5e:2x2", "--search", "--search_fits=1")
    assert finished.code == 0, finished.err
    assert "ranked by hand, the best 1 compiled: 1 fit, 0 do not" in finished.out
    assert "  1. " in finished.out and "at 1.2 dollars per chip and hour: the list price on demand" in finished.out
    assert numbers["fits"] and numbers["batch_size"] == 8


def test_arguments_that_do_not_fit_need_no_compiler(plan):
    pytest.importorskip("libtpu", reason="the devices of a slice need the plan extra")
    finished, numbers = plan("--topology=v5e:2x2", config=f"{running.ROOT / 'configs' / 'llama3.py'}:70b")
    assert finished.code == 1 and not numbers["fits"] and not numbers["compiled"]
    assert "does NOT FIT: 20.2 GB more than the 16.9 GB that a program may have on one chip" in finished.out


def test_from_python_a_plan_is_a_value(capsys):
    pytest.importorskip("libtpu", reason="the devices of a slice need the plan extra")
    config = config_file.read(f"{running.ROOT / 'configs' / 'llama3.py'}:70b", [])
    result = planning.plan(config, "v5e:2x2", tokens=5e6, price_per_chip_hour=2.0)
    assert capsys.readouterr() == ("", "")
    assert (result.best.fits, result.candidates, result.price) == (False, None, 2.0)
    assert result.best.excess == result.best.memory.total - 15.75 * 2**30
    assert (
        result.bill(result.workloads[-1]).hours
        == 2 * result.bill(result.workloads[-1], result.best.roofline.seconds).hours
    )
    assert "does NOT FIT: 20.2 GB more" in planning.describe(result)
    assert planning.record(result)["bytes"]["together"] == result.best.memory.total
    with pytest.raises(UserError, match="a plan for v5e:2x2 cannot run here"):
        planning.measure_seconds(result.best)


def test_a_program_that_does_not_fit_says_by_how_much(plan, monkeypatch):
    pytest.importorskip("libtpu", reason="the devices of a slice need the plan extra")

    def too_large(step):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Used 20.75G of 15.75G hbm. Exceeded hbm capacity by 5.00G."
        )

    monkeypatch.setattr(sys.modules["lowrank.planning.plan"], "compile_step", too_large)
    finished, numbers = plan("--topology=v5e:2x2")
    assert finished.code == 1 and numbers["excess"] == 5 * 2**30
    assert "does NOT FIT: 5.4 GB more than the 16.9 GB" in finished.out
    assert "collectives  unknown: there is no program" in finished.out


def test_here_the_estimate_is_held_against_the_clock(plan):
    flags = ("--config.mesh.fsdp=1", "--config.mesh.tensor=1", "--config.remat=none", "--config.train.microbatches=1")
    finished, numbers = plan("--topology=local", *flags)
    assert finished.code == 0, finished.err
    assert "a roofline of what a device here did just now" in finished.out
    assert "measured " in finished.out and "times the roofline's" in finished.out
    assert numbers["collectives"] == {} and numbers["bytes"]["base"] == 918_656 * 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--topology=v5e:5x5"], "v5e has no such slice; there are 1x1, 2x2, 2x4"),
        (["--topology=v9:2x2"], "say CHIP:TOPOLOGY with one of v5e, v6e, v5p, tpu7x"),
        ([], "--topology is missing"),
        (["--topology=v5e:2x2", "--tokens=inf"], "--tokens=inf must be a number of tokens"),
        (["--topology=v5e:2x2", "--config.architecture=None"], "config.architecture names no model"),
        (["--topology=v5e:2x2", "--config.architecture=llama"], "config.architecture=llama is not one of"),
        (["--topology=v5e:2x2", "--config.mesh.data=3"], "does not use the 4 devices"),
        (
            ["--topology=v5e:2x2", "--config.mesh.fsdp=1", "--config.mesh.tensor=4"],
            "does not divide the model's kv_heads=2",
        ),
        (["--topology=v5e:2x2", "--config.train.batch_size=6"], "make it a multiple of 4"),
        (["--topology=v5e:4x8", "--search"], "v5e:4x8 has no mesh for this model and a batch of 8 rows"),
        (["--topology=v5e:2x2", "--config.data.max_length=513"], "is more than the model reads (512 positions)"),
        (["--topology=v5e:2x2", "--config.lora.ranks={'q_proj': (4, 4)}"], "config.lora.ranks"),
        (["--topology=local", "--config.lora.rnak=3"], "did you mean config.lora.rank?"),
    ],
)
def test_bad_input_is_one_line(plan, flags, says):
    if any(flag.startswith(("--topology=v5e:2x2", "--topology=v5e:4x8")) for flag in flags):
        pytest.importorskip("libtpu", reason="the devices of a slice need the plan extra")
    finished, numbers = plan(*flags)
    assert finished.code == 1 and numbers is None
    assert says in finished.err and len(finished.err.splitlines()) == 1


def test_without_libtpu_the_extra_is_named(plan, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    finished, _ = plan("--topology=v5e:2x2")
    assert finished.code == 1 and "pip install 'lowrank[plan]'" in finished.err
