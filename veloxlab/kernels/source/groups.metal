// One threadgroup: a simdgroup for each of VECTORS vectors of x [B, H, S, HEAD_DIM]. Every GROUP neighbouring coordinates are cut
// into STEPS equal steps from the least to the largest, of which both are stored as roots of 16 bits, the step halved. A code
// is the nearest level, which lies SHIFT steps after a step's begin; of two as near the even one.
const uint thread_id = thread_position_in_threadgroup.x, lane = thread_id % 32;
const uint heads = x_shape[1], tokens = x_shape[2], vectors = x_shape[0] * heads * tokens;
const uint vector = threadgroup_position_in_grid.x * VECTORS + thread_id / 32;

threadgroup uchar found[VECTORS * HEAD_DIM];
local_memory uchar* own = found + thread_id / 32 * HEAD_DIM;

// past the last vector lanes take part in what the simdgroup does together, and write nothing
const uint at = vector < vectors ? vector : vectors - 1;
const global_memory IN_TYPE* from =
    x + at / (heads * tokens) * x_strides[0] + at / tokens % heads * x_strides[1] + at % tokens * x_strides[2];
const bool writes = vector < vectors && lane == 0;
constexpr float last = float((1u << CODE_BITS) - 1);
for (uint g = 0; g < GROUPS; g++) {
  const uint begin = g * GROUP, end = begin + GROUP < HEAD_DIM ? begin + GROUP : HEAD_DIM;
  float low = 3.402823466e38f, high = -3.402823466e38f;
  for (uint i = begin + lane; i < end; i += 32) {
    const float number = as_float(from[i * x_strides[3]]);
    low = number < low ? number : low, high = number > high ? number : high;
  }
  low = -largest_of<32>(-low), high = largest_of<32>(high);
  const half root_low = half(low < 0.0f ? -square_root(-low) : square_root(low));
  const float kept = as_float(root_low), first = kept < 0.0f ? -kept * kept : kept * kept; // codes are of what is kept
  const half root_half = half(square_root((high > first ? high - first : 0.0f) / (2 * STEPS)));
  const float step = 2.0f * as_float(root_half) * as_float(root_half);
  if (writes) least[vector * GROUPS + g] = root_low, half_step[vector * GROUPS + g] = root_half;
  for (uint i = begin + lane; i < end; i += 32) {
    const float level = nearest_whole((as_float(from[i * x_strides[3]]) - first) / (step == 0.0f ? 1.0f : step) - SHIFT);
    own[i] = uchar(level > 0.0f ? (level < last ? level : last) : 0.0f);
  }
}
simd_barrier();
if (vector < vectors) pack_row<HEAD_DIM, CODE_BITS, 0>(own, codes + vector * CODE_WORDS, lane, 32);
