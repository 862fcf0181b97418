// One threadgroup: VECTORS packed vectors [B, H, S, WORDS], in the layout of lanes.h. The levels of their
// codes are rotated back and scaled. It undoes encode.metal, but for rounding.
constexpr uint lanes = Lanes<HEAD_DIM>::count, each = Lanes<HEAD_DIM>::each;
constexpr uint level_count = 1u << BITS;
const uint thread_id = thread_position_in_threadgroup.x, lane = thread_id % lanes;
const uint heads = codes_shape[1], tokens = codes_shape[2], vectors = codes_shape[0] * heads * tokens;
const uint vector = threadgroup_position_in_grid.x * VECTORS + thread_id / lanes;

threadgroup float table[level_count];
for (uint i = thread_id; i < level_count; i += THREADS) table[i] = levels[i * levels_strides[0]];
group_barrier();

// past the last vector lanes take part in what the simdgroup does together, and write nothing
const uint at = vector < vectors ? vector : vectors - 1;
const uint batch = at / (heads * tokens), head = at / tokens % heads, token = at % tokens;
const global_memory uint* row =
    codes + batch * codes_strides[0] + head * codes_strides[1] + token * codes_strides[2];
float y[each];
UNROLL for (uint i = 0; i < each; i++) {
  const uint bit = (i * lanes + lane) * BITS, word = bit / 32, shift = bit % 32;
  uint code = row[word * codes_strides[3]] >> shift;
  if (shift + BITS > 32) code |= row[(word + 1) * codes_strides[3]] << (32 - shift);
  y[i] = table[code & (level_count - 1)];
}
const float hartley[Blocks<HEAD_DIM>::count] = {$hartley};
spread_lanes<HEAD_DIM>(y, hartley, lane);
if (vector < vectors) {
  const float root = as_float(
      root_scale[batch * root_scale_strides[0] + head * root_scale_strides[1] + token * root_scale_strides[2]]);
  UNROLL for (uint i = 0; i < each; i++) {
    const uint coordinate = i * lanes + lane;
    out[vector * HEAD_DIM + coordinate] = OUT_TYPE(y[i] * signs[coordinate * signs_strides[0]] * root * root);
  }
}
