"""A step by its compiler's cycles, on lines as XLA writes them for a TPU; a real program is in test_plan.py."""

import pytest

from lowrank.planning.chips import GIB, Chip
from lowrank.planning.cycles import REACHED, step_time

CHIP = Chip("chip", 1e6, GIB, 1e3, 1.0, (), clock=1000.0)  # a cycle is a millisecond; 1000 bytes a second
META = 'metadata={{op_name="jit(train_step)/while/body/closed_call/{}"}}'
COST = 'backend_config={{"estimated_cycles":"{}"}}'


def program(entry: str, *others: str) -> str:
    return "\n\n".join(["HloModule m", *others, "ENTRY %main (p: f32[2]) -> f32[2] {\n" + entry + "\n}"])


def computation(name: str, lines: str) -> str:
    return f"%{name} (p: f32[2]) -> f32[2] {{\n{lines}\n}}"


def time_of(text, flops=0.0):
    return step_time(text, CHIP, lambda one: one.result_bytes / 100, flops)


def part(found, name):
    return next(part for part in found.parts if part.name == name)


PRODUCT = computation(
    "fused",
    "  %x = bf16[8,4]{1,0} parameter(0)\n  %w = bf16[4,16]{1,0:S(1)} parameter(1)\n"
    "  ROOT %y = bf16[8,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf, "
    + META.format("jvp(Decoder)/while/body/closed_call/layers/mlp/mlp/up_proj/dot_general"),
)
OPERANDS = "  %x = bf16[8,4]{1,0} parameter(0)\n  %w = bf16[4,16]{1,0:S(1)} parameter(1)\n"


def test_a_product_has_the_compilers_cycles_its_flops_and_its_bytes_of_hbm():
    line = f"  ROOT %f = bf16[8,16]{{1,0}} fusion(%x, %w), kind=kOutput, calls=%fused, {META.format('add')}, {COST.format(10)}"
    found = time_of(program(OPERANDS + line, PRODUCT))
    (only,) = found.parts
    assert only.name == "base products, forward"  # by the product that the fusion holds, not by its own origin
    assert (only.seconds, only.flops) == (0.01, 2 * 8 * 4 * 16)
    assert only.bytes == 2 * (8 * 4 + 8 * 16)  # w is in VMEM
    assert only.floor == only.corrected == only.bytes / 1e3  # it cannot be faster than its bytes
    assert (found.hidden, found.exposed, found.unknown) == (0, 0, {})


def test_what_only_moves_memory_is_corrected_down_to_its_bytes():
    inner = computation("copy", "  %x = f32[100]{0} parameter(0)\n  ROOT %y = f32[100]{0} negate(%x)")
    line = f"  %x = f32[100]{{0}} parameter(0)\n  ROOT %f = f32[100]{{0}} fusion(%x), calls=%copy, {COST.format(5000)}"
    (only,) = time_of(program(line, inner)).parts
    assert (only.name, only.seconds, only.bytes) == ("copies, layouts, sums", 5.0, 800)
    assert only.corrected == pytest.approx(0.8 / REACHED)


def test_loops_and_the_dearest_branch_are_multiplied():
    def scope(name, cycles):
        return computation(
            name, f"  ROOT %a = f32[2]{{0}} add(%p, %p), {META.format('jvp(loss)/x')}, {COST.format(cycles)}"
        )

    body = computation("body", "  ROOT %c = f32[2]{0} conditional(%i, %p, %p), branch_computations={%cheap, %dear}")
    loop = '  ROOT %l = f32[2]{0} while(%p), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    found = time_of(program(loop, scope("cheap", 1), scope("dear", 7), body))
    assert [(one.name, round(one.seconds, 9)) for one in found.parts] == [("head and loss", 0.021)]


def test_a_collective_is_hidden_by_what_runs_between_its_start_and_its_done():
    lines = (
        "  %p = f32[2]{0} parameter(0)\n"
        "  %s = (f32[25]{0}, f32[100]{0}) all-gather-start(%p), channel_id=1, replica_groups={{0,1,2,3}}\n"
        f"  %a = f32[2]{{0}} add(%p, %p), {COST.format(1500)}\n"
        "  %d = f32[100]{0} all-gather-done(%s)\n"
        "  ROOT %r = f32[100]{0} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%sum"
    )
    found = time_of(program(lines))
    assert (found.hidden, found.exposed) == (1.5, 2.5 + 4)  # four seconds each: one has 1.5 seconds beside it, one none
    assert found.seconds == pytest.approx(1.5 + 6.5)


def test_kernels_without_an_estimate_are_costed_or_named():
    lines = (
        "  %p = f32[2]{0} parameter(0)\n"
        '  %splash_mha_fwd.3 = f32[2]{0} custom-call(%p), custom_call_target="tpu_custom_call"\n'
        '  ROOT %other = f32[2]{0} custom-call(%p), custom_call_target="Mystery"'
    )
    found = time_of(program(lines), flops=3e5)
    assert part(found, "attention").seconds == pytest.approx(1.0)  # 0.3 seconds at the peak, of which it reaches 0.3
    assert found.unknown == {"Mystery": 1}


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no HLO text"):
        time_of("nothing")
