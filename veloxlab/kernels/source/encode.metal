// One threadgroup: VECTORS vectors of x [B, H, S, HEAD_DIM], in the layout of lanes.h. Each is brought to root-mean-square 1
// and rotated. Its coordinates are quantized, the codes are packed, and the scale of their levels is stored.
constexpr uint lanes = Lanes<HEAD_DIM>::count, each = Lanes<HEAD_DIM>::each;
const uint thread_id = thread_position_in_threadgroup.x, lane = thread_id % lanes;
const uint heads = x_shape[1], tokens = x_shape[2], vectors = x_shape[0] * heads * tokens;
const uint vector = threadgroup_position_in_grid.x * VECTORS + thread_id / lanes;

threadgroup uchar found[VECTORS * HEAD_DIM];
$tables

// past the last vector lanes take part in what the simdgroup does together, and write nothing
const uint at = vector < vectors ? vector : vectors - 1;
const global_memory IN_TYPE* from =
    x + at / (heads * tokens) * x_strides[0] + at / tokens % heads * x_strides[1] + at % tokens * x_strides[2];
float y[each];
load_lanes<HEAD_DIM>(y, from, x_strides[3], lane);
const float rms = root_mean_square<HEAD_DIM>(y);
const float to_unit = 1.0f / (rms == 0.0f ? 1.0f : rms);
UNROLL for (uint i = 0; i < each; i++) y[i] *= to_unit * signs[(i * lanes + lane) * signs_strides[0]];
const float row[Blocks<HEAD_DIM>::count] = {$hartley};
spread_lanes<HEAD_DIM>(y, row, lane);
$quantizer

local_memory uchar* own = found + thread_id / lanes * HEAD_DIM;
float inner = 0.0f, squares = 0.0f;
UNROLL for (uint i = 0; i < each; i++) {
  const uint code = quantizer.code(y[i]);
  const float level = quantizer.level(code);
  inner += y[i] * level, squares += level * level;
  own[i * lanes + lane] = uchar(code);
}
inner = total_of<int(lanes)>(inner), squares = total_of<int(lanes)>(squares);
inner = inner == 0.0f ? float(HEAD_DIM) : inner; // of a zero vector, whose scale is 0 if the factor is finite
$rest
simd_barrier();

if (vector < vectors) {
  if (lane == 0) root_scale[vector] = half(square_root(rms * (FACTOR)));
  $keep_rest
  $pack
}
