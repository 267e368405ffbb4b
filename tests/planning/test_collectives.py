"""Collectives of compiled programs: small ones for eight CPU devices, and lines as XLA writes them for a TPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lowrank.planning.collectives import collectives, dtype_bytes, totals


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def compiled(mesh, function, *arguments) -> str:
    """The optimized text of `function`, each of whose arguments is (shape, spec)."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in arguments]
    return jax.jit(function).lower(*shapes).compile().as_text()


def mapped(mesh, function, in_specs, out_specs):
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def only(found):
    (one,) = found
    return one


@pytest.mark.parametrize(
    ("kind", "body", "sent"),
    [  # of a part of 1 x 16 floats on each device, over the four devices of "b"
        ("all-reduce", lambda x: jax.lax.psum(x, "b"), 2 * 3 / 4 * 64),
        ("all-gather", lambda x: jax.lax.all_gather(x, "b").sum(0), 3 / 4 * 256),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "b", scatter_dimension=1, tiled=True).sum() + x, 3 * 16),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "b", 1, 0, tiled=True).sum() + x, 3 / 4 * 64),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)]), 64),
    ],
)
def test_each_kind_by_what_a_ring_sends(mesh, kind, body, sent):
    function = mapped(mesh, body, P(("a", "b")), P(("a", "b")))
    one = only(collectives(compiled(mesh, function, ((8, 16), P(("a", "b"))))))
    assert (one.kind, one.times, one.link_bytes) == (kind, 1, sent)
    assert one.group == ((0, 1) if kind == "collective-permute" else (0, 1, 2, 3))


def test_a_group_is_made_of_places_in_the_mesh(mesh):
    function = mapped(mesh, lambda x: jax.lax.psum(x, "a"), P(("a", "b")), P(("a", "b")))
    assert only(collectives(compiled(mesh, function, ((8, 16), P(("a", "b")))))).group == (0, 4)


def test_loops_are_multiplied(mesh):
    def twice(x):  # 5 times 3 sums
        def inner(x, _):
            return jnp.tanh(jax.lax.psum(x, "b")), None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=3)[0], None

        return jax.lax.scan(outer, x, None, length=5)[0]

    function = mapped(mesh, twice, P(("a", "b")), P(("a", "b")))
    assert only(collectives(compiled(mesh, function, ((8, 16), P(("a", "b")))))).times == 15


def test_of_a_conditional_the_branch_that_sends_the_most(mesh):
    def body(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: jax.lax.psum(x, "b"), lambda x: jax.lax.pmax(x[:, :1], "a") + x, x)

    function = mapped(mesh, body, P(("a", "b")), P(("a", "b")))
    one = only(collectives(compiled(mesh, function, ((8, 16), P(("a", "b"))))))
    assert one.group == (0, 1, 2, 3)


def test_a_scan_over_sharded_weights_gathers_each_layer_and_sums_its_gradient(mesh):
    def loss(weights, x):
        with jax.named_scope("layer"):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w @ w.T), None), x, weights)[0].sum()

    text = compiled(mesh, jax.grad(loss), ((5, 16, 32), P(None, "b")), ((8, 16), P(("a", "b"))))
    found = collectives(text)
    gathers = [one for one in found if one.kind == "all-gather"]
    assert gathers and all(one.times == 5 and sorted(one.shapes[0][1]) == [16, 32] for one in gathers)
    sums = [one for one in found if one.kind in ("all-reduce", "reduce-scatter")]
    assert sums and all(one.times == 5 and "transpose(jvp(layer))" in one.op_name for one in sums)
    assert sum(times for times, _ in totals(found).values()) == 5 * len(found)


def test_a_program_of_one_device_has_none(mesh):
    assert collectives(jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text()) == []


# As XLA writes it for a TPU: a gather spread over two fusions that share a channel, going on in an inner loop; a
# reduce-scatter as a fusion; loops that do not say how often they run; groups as axes of a mesh.
TPU = """
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%begin (p: bf16[64,8]) -> bf16[64,32] {
  %p = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={1}, metadata={op_name="jit(step)/q_proj/dot"}
}

%go_on (p.1: bf16[64,8]) -> bf16[64,32] {
  %p.1 = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=7, replica_groups=[2,4]<=[8], dimensions={1}
}

%all-reduce-scatter.3 (p.2: f32[16]) -> f32[4] {
  %p.2 = f32[16]{0:T(128)} parameter(0)
  %all-reduce.4 = f32[16]{0:T(128)} all-reduce(%p.2), channel_id=9, replica_groups=mesh['m'=2,'n'=4], device_ids=([4,2]T(1,0)) {'n'}, to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[4]{0:T(128)} dynamic-slice(%all-reduce.4, %zero), dynamic_slice_sizes={4}
}

%inner_condition (c: (u32[], bf16[64,8])) -> pred[] {
  %c = (u32[]{:T(128)}, bf16[64,8]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%c), index=0
  %limit = u32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%inner (c.1: (u32[], bf16[64,8])) -> (u32[], bf16[64,8]) {
  %c.1 = (u32[]{:T(128)}, bf16[64,8]{1,0}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%c.1), index=0
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i.1, %two)
  %w = bf16[64,8]{1,0} get-tuple-element(%c.1), index=1
  %fusion.5 = bf16[64,32]{1,0} fusion(%w), kind=kCustom, calls=%go_on
  %permute = (bf16[64,8]{1,0}, bf16[64,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%w), channel_id=8, source_target_pairs={{0,0},{1,2},{2,1}}
  %permute.1 = bf16[64,8]{1,0} collective-permute-done(%permute)
  ROOT %out = (u32[]{:T(128)}, bf16[64,8]{1,0}) tuple(%next, %permute.1)
}

ENTRY %main (w.1: bf16[64,8], v: f32[16]) -> f32[4] {
  %w.1 = bf16[64,8]{1,0} parameter(0)
  %v = f32[16]{0} parameter(1)
  %async-collective-start = bf16[64,32]{1,0} fusion(%w.1), kind=kCustom, calls=%begin
  %one = u32[]{:T(128)} constant(1)
  %copy.1 = u32[]{:T(128)} copy(%one)
  %begun = (u32[]{:T(128)}, bf16[64,8]{1,0}) tuple(%copy.1, %w.1)
  %while.1 = (u32[]{:T(128)}, bf16[64,8]{1,0}) while(%begun), condition=%inner_condition, body=%inner
  ROOT %scattered = f32[4]{0} fusion(%v), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_what_a_tpu_spreads_over_fusions_and_loops_is_counted_once():
    gather, scatter, permute = collectives(TPU)
    assert (gather.kind, gather.times, gather.group) == ("all-gather", 1, (0, 1, 2, 3))
    assert (gather.shapes, gather.op_name) == ((("bf16", (64, 32)),), "jit(step)/q_proj/dot")
    assert gather.link_bytes == 3 / 4 * 64 * 32 * 2
    # Devices in the order 0 2 4 6 1 3 5 7, as 2 x 4: the first group along 'n'.
    assert (scatter.kind, scatter.group, scatter.link_bytes) == ("reduce-scatter", (0, 2, 4, 6), 3 * 16)
    # 1, 3, 5: three times, the start counted once with its -done.
    assert (permute.kind, permute.times, permute.link_bytes) == ("collective-permute", 3, 3 * 64 * 8 * 2)
    assert permute.group == (1, 2)


def test_what_a_tpu_gives_to_its_sparse_cores_is_counted():
    call = 'call-start(%w.1), async_execution_thread="sparsecore", to_apply=%begin'
    text = TPU.replace("fusion(%w.1), kind=kCustom, calls=%begin", call).replace("calls=%go_on", "calls=%add")
    assert [(one.kind, one.times) for one in collectives(text) if one.channel == "7"] == [("all-gather", 1)]


def test_a_part_of_a_mesh_axis():
    text = TPU.replace("{'n'}", "{'n':(2)2}")
    assert collectives(text)[1].group == (0, 2)  # the faster half of 'n'


def test_text_that_is_not_understood_is_an_error():
    with pytest.raises(ValueError, match=r"while\.1"):
        collectives(TPU.replace("direction=LT", "direction=NE"))
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("HloModule nothing")
    with pytest.raises(ValueError, match=r"all-gather\.1"):
        collectives(TPU.replace("replica_groups=[2,4]<=[8]", "replica_groups=new"))


def test_a_loop_without_collectives_may_run_as_often_as_it_likes():
    text = TPU.replace("collective-permute-start(%w), channel_id=8", "copy-start(%w)").replace(
        "calls=%go_on", "calls=%add"
    )
    assert len(collectives(text.replace("direction=LT", "direction=NE"))) == 2


@pytest.mark.parametrize(
    ("dtype", "size"), [("pred", 1), ("bf16", 2), ("f32", 4), ("u32", 4), ("s4", 0.5), ("f8e4m3fn", 1), ("f64", 8)]
)
def test_bytes_of_an_element(dtype, size):
    assert dtype_bytes(dtype) == size


@pytest.mark.parametrize("result", ["f32[16]{0}", "((f32[16]{0}), f32[16]{0})"])
def test_a_sum_that_begins_counts_once_in_either_spelling(result):
    text = (
        "ENTRY %main (p: f32[16]) -> f32[16] {\n  %p = f32[16]{0} parameter(0)\n"
        f"  %s = {result} all-reduce-start(%p), channel_id=1, replica_groups={{{{0,1}}}}, to_apply=%add\n"
        "  ROOT %d = f32[16]{0} all-reduce-done(%s)\n}"
    )
    assert [one.result_bytes for one in collectives(text)] == [64]
