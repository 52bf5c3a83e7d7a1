"""Programs' texts: what was written by hand, and what XLA makes of programs whose collectives are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxgen.plan import hlo, instructions

KILO = 4 * 1024  # bytes of 1,024 numbers in float32

LOOP = """HloModule train, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, must-alias) }, entry_computation_layout={(f32[1024]{0})->f32[1024]{0}}, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %state = (s32[], f32[1024]{0:T(1024)}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[1024]{0:T(1024)} get-tuple-element(%state), index=1
  %summed = f32[1024]{0:T(1024)} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add
  ROOT %out = (s32[], f32[1024]{0:T(1024)}) tuple(%next, %summed)
}

%condition (state.1: (s32[], f32[1024])) -> pred[] {
  %state.1 = (s32[], f32[1024]{0:T(1024)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0:T(1024)} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[1024]{0:T(1024)}) tuple(%zero, %p)
  %loop = (s32[], f32[1024]{0:T(1024)}) while(%start), condition=%condition, body=%body{KNOWN}
  %y = f32[1024]{0:T(1024)} get-tuple-element(%loop), index=1
  %all-gather-start = (f32[1024]{0:T(1024)}, f32[8192]{0:T(1024)}) all-gather-start(%y), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}, use_global_device_ids=true
  %all-gather-done = f32[8192]{0:T(1024)} all-gather-done(%all-gather-start)
  %moved = f32[1024]{0:T(1024)} collective-permute(%y), channel_id=3, source_target_pairs={{0,1},{1,0}}
  ROOT %sum.1 = f32[1024]{0:T(1024)} add(%y, %moved)
}
"""


def text(known=""):
    return LOOP.replace("{KNOWN}", known)


@pytest.mark.parametrize("known", ["", ', backend_config={"known_trip_count":{"n":"7"}}'])
def test_collectives_count_as_often_as_their_loop_goes_round(known):
    reading = hlo.read(text(known))
    assert reading.exact
    found = {each.kind: each for each in reading.collectives}
    assert found["all-reduce"] == ("all-reduce", 7, 7 * KILO, pytest.approx(7 * KILO * 2 * 3 / 4))
    assert found["all-gather"] == ("all-gather", 1, 8 * KILO, pytest.approx(8 * KILO * 7 / 8))
    assert found["collective-permute"] == ("collective-permute", 1, KILO, KILO)
    assert len(found) == 3


def test_loops_of_unknown_length_count_once_and_say_so():
    reading = hlo.read(text().replace("direction=LT", "direction=NE"))
    assert not reading.exact
    assert {each.kind: each.runs for each in reading.collectives}["all-reduce"] == 1


def test_aliases_transfers_dtypes_and_shapes():
    clean = hlo.read(text())
    assert (clean.aliases, clean.transfers, clean.float64, clean.dynamic) == (2, (), 0, 0)
    dirty = text().replace(
        "  ROOT %sum.1",
        "  %token = token[] after-all()\n"
        "  %sent = (f32[1024]{0}, u32[], token[]) send(%y, %token), channel_id=9, is_host_transfer=true\n"
        '  %called = f32[] custom-call(%y), custom_call_target="xla_ffi_python_cpu_callback"\n'
        '  %kernel = f32[] custom-call(%y), custom_call_target="tpu_custom_call"\n'
        "  %wide = f64[4]{0} convert(%y)\n"
        "  %some = f32[<=1024]{0} copy(%y)\n"
        "  ROOT %sum.1",
    )
    reading = hlo.read(dirty)
    assert (reading.transfers, reading.float64, reading.dynamic) == (("sent", "called"), 1, 1)


def test_what_hosts_pass_between_slices_is_a_collective():
    handler = ', is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}'
    lines = (
        "  %token = token[] after-all()\n"
        f"  %sent = (f32[1024]{{0}}, u32[], token[]) send(%y, %token), channel_id=8{handler}\n"
        f"  %got = (f32[1024]{{0}}, u32[], token[]) recv(%token), channel_id=9{handler}\n"
        "  ROOT %sum.1"
    )
    reading = hlo.read(text().replace("  ROOT %sum.1", lines))
    assert reading.transfers == ()
    assert (hlo.BETWEEN_SLICES, 1, KILO, KILO) in reading.collectives


def test_traffic_is_that_of_the_large_memory_alone():
    # 7 all-reduces read and write, the gather reads 1 and writes 1 + 8 (its start has both), the permute and the sum.
    assert hlo.read(text()).traffic == pytest.approx((7 * 2 + 10 + 2 + 3) * KILO + 7 * 12)
    on_core = text().replace("{0:T(1024)} add(%y, %moved)", "{0:T(1024)S(1)} add(%y, %moved)")
    assert hlo.read(text()).traffic - hlo.read(on_core).traffic == KILO


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("bf16[3,5]{1,0}", 30), ("pred[8]", 8), ("(f32[2], s8[3]{0}, token[])", 11), ("s4[6]", 3), ("c64[2]", 16),
     ("f8e4m3fn[10]", 10), ("f32[]", 4), ("f32[<=3]", 12)],
)  # fmt: skip
def test_bytes(shape, expected):
    assert instructions.size(shape) == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[16,8,8,32]{3,0,2,1:T(8,128)}", 4 * 16 * 8 * 8 * 128),  # 32 channels take the room of 128
        ("f32[16,8,8,32]{0,3,2,1:T(8,128)}", 4 * 128 * 8 * 8 * 32),
        ("bf16[5,130]{1,0:T(8,128)(2,1)}", 2 * 8 * 256),
        ("f32[100]{0:T(1024)}", 4 * 1024),
        ("f32[5,130]{1,0}", 4 * 5 * 130),
        ("f32[]{:T(128)}", 4),
        ("f32[5,130]{1,0:T(8,128)S(1)}", 0),
    ],
)
def test_bytes_in_the_large_memory_are_those_of_tiles(shape, expected):
    assert instructions.size(shape, far=True) == expected


SLICES = """HloModule slices, num_partitions=8

%inner (p0: f32[6,1024], p1: s32[]) -> f32[1024] {
  %p0 = f32[6,1024]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %slice = f32[1,1024]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,1024}
  ROOT %flat = f32[1024]{0} bitcast(%slice)
}

%outer (q0: f32[6,1024], q1: s32[]) -> f32[1024] {
  %q0 = f32[6,1024]{1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %same = f32[6,1024]{1,0} bitcast(%q0)
  %picked = f32[1024]{0} fusion(%same, %q1), kind=kLoop, calls=%inner
  ROOT %double = f32[1024]{0} add(%picked, %picked)
}

%update (r0: f32[6,1024], r1: f32[1024], r2: s32[]) -> (f32[6,1024], f32[1024]) {
  %r0 = f32[6,1024]{1,0} parameter(0)
  %r1 = f32[1024]{0} parameter(1)
  %r2 = s32[] parameter(2)
  %row = f32[1,1024]{1,0} bitcast(%r1)
  %put = f32[6,1024]{1,0} dynamic-update-slice(%r0, %row, %r2, %r2)
  %negative = f32[1024]{0} negate(%r1)
  ROOT %both = (f32[6,1024]{1,0}, f32[1024]{0}) tuple(%put, %negative)
}

%cheap (c: f32[1024]) -> f32[1024] {
  %c = f32[1024]{0} parameter(0)
  ROOT %half = f32[512]{0} slice(%c), slice={[0:512]}
}

%dear (d: f32[1024]) -> f32[1024] {
  %d = f32[1024]{0} parameter(0)
  ROOT %there = f32[1024]{0} collective-permute(%d), channel_id=1, source_target_pairs={{0,1}}
}

ENTRY %main (stack: f32[6,1024], i: s32[]) -> f32[1024] {
  %stack = f32[6,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  LINE
}
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ROOT %a = f32[1024]{0} fusion(%stack, %i), kind=kLoop, calls=%outer", 2 * KILO + 4),
        ("%x = f32[1024]{0} iota()\n  ROOT %b = (f32[6,1024]{1,0}, f32[1024]{0}) fusion(%stack, %x, %i), kind=kLoop, "
         "calls=%update", 3 * KILO + 4),
        ("ROOT %c = f32[1,1024]{1,0} dynamic-slice(%stack, %i, %i), dynamic_slice_sizes={1,1024}", 2 * KILO + 4),
        ("%y = f32[1,1024]{1,0} iota()\n  ROOT %d = f32[6,1024]{1,0} dynamic-update-slice(%stack, %y, %i, %i)",
         2 * KILO + 4),
        ("ROOT %e = f32[6,1024]{1,0} negate(%stack)", 12 * KILO),
        ("%z = f32[1024]{0} iota()\n  ROOT %f = f32[1024]{0} conditional(%i, %z, %z), branch_computations={%cheap, %dear}",
         2 * KILO),
    ],
)  # fmt: skip
def test_traffic_of_slices_of_updates_and_of_choices(line, expected):
    assert hlo.read(SLICES.replace("LINE", line)).traffic == expected


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", 2),
        ("replica_groups={}", 8),
    ],
)
def test_groups_of_devices_in_all_their_notations(groups, members):
    line = f"%z = f32[1024]{{0}} iota()\n  ROOT %r = f32[1024]{{0}} all-gather(%z), channel_id=1, {groups}, dimensions={{0}}"
    (found,) = hlo.read(SLICES.replace("LINE", line)).collectives
    assert found.bytes == members * KILO


def mesh():
    return jax.make_mesh((8,), ("d",), (AxisType.Auto,))


def compiled(function, *specs, shapes):
    shardings = [NamedSharding(mesh(), PartitionSpec(*spec)) for spec in specs]
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=s) for shape, s in zip(shapes, shardings, strict=True)
    ]
    return jax.jit(function).lower(*arguments).compile()


def test_a_sum_inside_of_a_scan_of_five():
    def total(x):
        def step(carry, _):
            return carry + jax.lax.psum(jnp.sin(carry * x), "d"), None

        return jax.lax.scan(step, jnp.zeros(1024), length=5)[0]

    mapped = jax.shard_map(total, mesh=mesh(), in_specs=PartitionSpec("d"), out_specs=PartitionSpec(), check_vma=False)
    reading = hlo.read(compiled(mapped, ("d",), shapes=[(8 * 1024,)]).as_text())
    (found,) = reading.collectives
    assert (found.kind, found.runs, found.bytes) == ("all-reduce", 5, 5 * KILO)
    assert found.moved == pytest.approx(5 * KILO * 2 * 7 / 8)
    assert reading.exact


def test_a_gather_and_a_scatter():
    def both(x):
        whole = jax.lax.all_gather(x, "d", tiled=True)
        return jax.lax.psum_scatter(jnp.sin(whole), "d", tiled=True)

    mapped = jax.shard_map(both, mesh=mesh(), in_specs=PartitionSpec("d"), out_specs=PartitionSpec("d"))
    found = {each.kind: each for each in hlo.read(compiled(mapped, ("d",), shapes=[(1024,)]).as_text()).collectives}
    assert found["all-gather"].bytes == KILO
    assert found["all-gather"].moved == pytest.approx(KILO * 7 / 8)
    assert found["reduce-scatter"].bytes == KILO


def test_traffic_is_close_to_what_xla_counts_and_knows_loops():
    def layers(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    def one(x, kernel):
        return jnp.tanh(x @ kernel)

    single = jax.jit(one).lower(jnp.ones((64, 64)), jnp.ones((64, 64))).compile()
    traffic = hlo.read(single.as_text()).traffic
    assert traffic == pytest.approx(single.cost_analysis()["bytes accessed"], rel=0.3)
    many = jax.jit(layers).lower(jnp.ones((64, 64)), jnp.ones((20, 64, 64))).compile()
    # A slice of the stacked kernels is read in each round, not the whole.
    assert 19 * traffic < hlo.read(many.as_text()).traffic < 41 * traffic


def test_what_is_donated_is_an_alias():
    plain = jax.jit(lambda x: x + 1).lower(np.ones(4, np.float32)).compile()
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(np.ones(4, np.float32)).compile()
    assert hlo.read(plain.as_text()).aliases == 0
    assert hlo.read(donated.as_text()).aliases == 1
