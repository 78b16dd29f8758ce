"""Collectives against programs whose communication is known, and against the forms that the TPU's compiler writes."""

import jax
import jax.numpy as jnp
import pytest

from br_jax.planning.collectives import by_kind, find_collectives
from br_jax.sharding import make_mesh

P = jax.sharding.PartitionSpec


def compiled_text(function, in_specs, out_specs, *shapes):
    mesh = make_mesh(data=2, fsdp=4)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(mapped).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text()


def test_a_loop_counts_as_often_as_it_runs():
    def gather_each(layers, x):
        def layer(x, w):
            whole = jax.lax.all_gather(w, "fsdp", tiled=True)
            return jnp.tanh(x * whole), None

        return jax.lax.psum(jax.lax.scan(layer, x, layers)[0], ("data", "fsdp"))

    sums = by_kind(find_collectives(compiled_text(gather_each, (P(None, "fsdp"), P()), P(), (5, 64), (64,))))
    # a chip gets 3 of 4 parts of 64 f32, five times; on a ring a sum over 8 chips brings 2 * 7/8 of the array
    assert sums["all-gather"] == {"calls": 5, "bytes": 5 * 64 * 4 * 3 // 4}
    assert sums["all-reduce"] == {"calls": 1, "bytes": 2 * 64 * 4 * 7 // 8}


def test_loops_in_loops_multiply():
    def nested(x):
        def inner(x, _):
            return jnp.sin(jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])), None

        def outer(x, _):
            return jnp.cos(jax.lax.scan(inner, x, length=3)[0]), None

        return jax.lax.scan(outer, x, length=7)[0]

    sums = by_kind(find_collectives(compiled_text(nested, P(), P(), (16,))))
    assert sums == {"collective-permute": {"calls": 21, "bytes": 21 * 16 * 4}}


def test_scatter_and_exchange_bytes():
    def both(x):
        return jax.lax.all_to_all(jax.lax.psum_scatter(x, "fsdp", tiled=True), "fsdp", 0, 0, tiled=True)

    sums = by_kind(find_collectives(compiled_text(both, P(), P("fsdp"), (64,))))
    assert sums["reduce-scatter"]["bytes"] == 64 * 4 * 3 // 4
    assert sums["all-to-all"]["bytes"] == 16 * 4 * 3 // 4


def test_one_device_has_none():
    mesh = make_mesh(devices=jax.devices()[:1])
    mapped = jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    text = jax.jit(mapped).lower(jax.ShapeDtypeStruct((8,), jnp.float32)).compile().as_text()
    assert find_collectives(text) == []


# What libtpu writes, cut down: an all-gather that starts in the entry and overlaps a fusion of the layer loop, under
# one channel id; a layer loop of 32; in it a loop that passes a weight's shards round, two steps at a time.
TPU = """HloModule jit_step

%fused_computation.1 (param_0: bf16[512,128256]) -> bf16[4096,128256] {
  ROOT %all-gather.1 = bf16[4096,128256]{1,0} all-gather(%param_0), channel_id=205, \
replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}
}

%async_collective_fusion.2 (param_0: bf16[512,128256]) -> bf16[4096,128256] {
  ROOT %all-gather.2 = bf16[4096,128256]{1,0} all-gather(%param_0), channel_id=205, \
replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}
}

%windowed_dot_general_body_ag.1 (wide.param.1: (bf16[1,512,32], u32[])) -> (bf16[1,512,32], u32[]) {
  %constant.2 = u32[]{:T(128)} constant(2)
  %constant.1 = u32[]{:T(128)} constant(1)
  %get-tuple-element.2 = u32[]{:T(128)} get-tuple-element(%wide.param.1), index=1
  %collective-permute-start.1 = (bf16[1,512,32], bf16[1,512,32], u32[], u32[]) collective-permute-start(%x), \
channel_id=10, source_target_pairs={{0,7},{1,0}}
  %add.1 = u32[]{:T(128)} add(%get-tuple-element.2, %constant.1), metadata={op_name="x"}
  %add.2 = u32[]{:T(128)} add(%get-tuple-element.2, %constant.2), metadata={op_name="x"}
  ROOT %tuple.1 = (bf16[1,512,32], u32[]) tuple(%done, %add.2)
}

%windowed_dot_general_cond_ag.1 (wide.param.2: (bf16[1,512,32], u32[])) -> pred[] {
  %constant.4 = u32[]{:T(128)} constant(4)
  %get-tuple-element.4 = u32[]{:T(128)} get-tuple-element(%wide.param.2), index=1
  ROOT %compare.1 = pred[]{:T(512)} compare(%get-tuple-element.4, %constant.4), direction=LT
}

%region_0 (param: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %fusion.2 = bf16[4096,128256] fusion(%p), kind=kCustom, calls=%async_collective_fusion.2
  %while.1 = (bf16[1,512,32], u32[]) while(%t), condition=%windowed_dot_general_cond_ag.1, \
body=%windowed_dot_general_body_ag.1
}

%region_1 (param: (s32[], bf16[8])) -> pred[] {
  %constant.32 = s32[]{:T(128)} constant(32)
  %get-tuple-element.9 = s32[]{:T(128)} get-tuple-element(%param), index=0
  ROOT %lt = pred[]{:T(512)} compare(%get-tuple-element.9, %constant.32), direction=LT
}

ENTRY %main.1 (p: bf16[512,128256]) -> bf16[8] {
  %fusion.1 = bf16[4096,128256] fusion(%p), kind=kCustom, calls=%fused_computation.1
  %while.2 = (s32[], bf16[8]) while(%t), condition=%region_1, body=%region_0
}
"""


def test_forms_of_the_tpu_compiler():
    sums = by_kind(find_collectives(TPU))
    assert sums["all-gather"] == {"calls": 1, "bytes": 4096 * 128256 * 2 * 7 // 8}
    assert sums["all-gather in pieces"] == {"calls": 32 * 2, "bytes": 32 * 2 * 512 * 32 * 2}
    assert set(sums) == {"all-gather", "all-gather in pieces"}


@pytest.mark.parametrize(
    "groups, size", [("{{0,1,2,3},{4,5,6,7}}", 4), ("[4,2]<=[8]", 2), ("mesh['a'=4,'b'=2] {'b','a'}", 8)]
)
def test_the_ways_to_write_replica_groups(groups, size):
    text = (
        f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  ROOT %a = f32[{8 * size}] all-gather(%p), replica_groups={groups}\n}}"
    )
    assert find_collectives(text)[0].received == 8 * 4 * (size - 1)
