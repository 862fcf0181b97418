// One threadgroup: VECTORS vectors of x [B, H, S, HEAD_DIM], in the layout of lanes.h. Signs, then the transform; INVERSE:
// the transform, then signs.
constexpr uint lanes = Lanes<HEAD_DIM>::count, each = Lanes<HEAD_DIM>::each;
const uint thread_id = thread_position_in_threadgroup.x, lane = thread_id % lanes;
const uint heads = x_shape[1], tokens = x_shape[2], vectors = x_shape[0] * heads * tokens;
const uint vector = threadgroup_position_in_grid.x * VECTORS + thread_id / lanes;

// past the last vector lanes take part in what the simdgroup does together, and write nothing
const uint at = vector < vectors ? vector : vectors - 1;
const global_memory IN_TYPE* from =
    x + at / (heads * tokens) * x_strides[0] + at / tokens % heads * x_strides[1] + at % tokens * x_strides[2];
float y[each], factors[each];
UNROLL for (uint i = 0; i < each; i++) {
  factors[i] = signs[(i * lanes + lane) * signs_strides[0]];
  y[i] = as_float(from[(i * lanes + lane) * x_strides[3]]) * (INVERSE ? 1.0f : factors[i]);
}
const float row[Blocks<HEAD_DIM>::count] = {$hartley};
spread_lanes<HEAD_DIM>(y, row, lane);
if (vector < vectors) {
  UNROLL for (uint i = 0; i < each; i++) {
    out[vector * HEAD_DIM + i * lanes + lane] = y[i] * (INVERSE ? factors[i] : 1.0f);
  }
}
