"""Collectives against a program whose communication is known, and against the forms that the TPU's compiler writes."""

import jax
import jax.numpy as jnp

from br_jax.core.mesh import make_mesh
from br_jax.planning.roofline import count_collectives

P = jax.sharding.PartitionSpec


def test_every_kind_is_counted_as_often_as_its_loops_run():
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def everything(layers, x):
        def inner(x, _):
            return jnp.sin(jax.lax.ppermute(x, "fsdp", ring)), None

        def layer(x, w):
            x = jnp.tanh(x * jax.lax.all_gather(w, "fsdp", tiled=True))
            return jax.lax.scan(inner, x, length=3)[0], None

        x = jnp.cos(jax.lax.psum(jax.lax.scan(layer, x, layers)[0], ("data", "fsdp")))
        return jax.lax.all_to_all(jax.lax.psum_scatter(x, "fsdp", tiled=True), "fsdp", 0, 0, tiled=True)

    specs = {"in_specs": (P(None, "fsdp"), P()), "out_specs": P("fsdp")}
    mapped = jax.shard_map(everything, mesh=make_mesh(data=2, fsdp=4), check_vma=False, **specs)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 64), (64,))]
    found = count_collectives(jax.jit(mapped).lower(*shapes).compile().as_text())
    array = 64 * 4  # bytes; a chip gets 3 of its 4 parts, on a ring a sum over 8 chips brings 2 * 7/8 of it
    assert found == {
        "all-gather": {"calls": 5, "bytes": 5 * array * 3 // 4},
        "all-reduce": {"calls": 1, "bytes": 2 * array * 7 // 8},
        "all-to-all": {"calls": 1, "bytes": array // 4 * 3 // 4},
        "collective-permute": {"calls": 5 * 3, "bytes": 5 * 3 * array},
        "reduce-scatter": {"calls": 1, "bytes": array * 3 // 4},
    }


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
    assert count_collectives(TPU) == {
        "all-gather": {"calls": 1, "bytes": 4096 * 128256 * 2 * 7 // 8},
        "all-gather in pieces": {"calls": 32 * 2, "bytes": 32 * 2 * 512 * 32 * 2},
    }


def test_the_ways_to_write_replica_groups():
    ways = {"{{0,1,2,3},{4,5,6,7}}": 4, "{{0},{1}}": 1, "[4,2]<=[8]": 2, "mesh['a'=4,'b'=2] {'b','a'}": 8}
    for groups, size in ways.items():
        line = f"ROOT %a = f32[{8 * size}] all-gather(%p), replica_groups={groups}"
        found = count_collectives(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  {line}\n}}")
        assert found == ({"all-gather": {"calls": 1, "bytes": 8 * 4 * (size - 1)}} if size > 1 else {})
