// One threadgroup: VECTORS vectors of x [B, H, S, HEAD_DIM], in the layout of lanes.h. Each is brought to root-mean-square 1
// and spread; its coordinates' nearest levels are found and packed, and what they are to be multiplied with is stored.
constexpr uint lanes = Lanes<HEAD_DIM>::count, each = Lanes<HEAD_DIM>::each;
constexpr uint level_count = 1u << BITS;
constexpr uint parts = (32 + 2 * BITS - 2) / BITS; // codes that a word has bits of, at most
const uint thread_id = thread_position_in_threadgroup.x, lane = thread_id % lanes;
const uint heads = x_shape[1], tokens = x_shape[2], vectors = x_shape[0] * heads * tokens;
const uint vector = threadgroup_position_in_grid.x * VECTORS + thread_id / lanes;

threadgroup float table[level_count], bounds[level_count];
threadgroup uchar found[VECTORS * HEAD_DIM];

for (uint i = thread_id; i < level_count; i += THREADS) {
  table[i] = levels[i * levels_strides[0]];
  if (i < level_count - 1) bounds[i] = boundaries[i * boundaries_strides[0]];
}
group_barrier();

// past the last vector lanes take part in what the simdgroup does together, and write nothing
const uint at = vector < vectors ? vector : vectors - 1;
const global_memory IN_TYPE* from =
    x + at / (heads * tokens) * x_strides[0] + at / tokens % heads * x_strides[1] + at % tokens * x_strides[2];
float y[each];
float total = 0.0f;
UNROLL for (uint i = 0; i < each; i++) {
  y[i] = as_float(from[(i * lanes + lane) * x_strides[3]]);
  total += y[i] * y[i];
}
// squares overflow where a root_scale of 16 bits has long been infinite, and vanish where it has long been 0
const float rms = square_root(total_of<int(lanes)>(total)) / square_root(float(HEAD_DIM));
const float to_unit = 1.0f / (rms == 0.0f ? 1.0f : rms);
UNROLL for (uint i = 0; i < each; i++) y[i] *= to_unit * signs[(i * lanes + lane) * signs_strides[0]];
const float row[Blocks<HEAD_DIM>::count] = {$hartley};
spread_lanes<HEAD_DIM>(y, row, lane);

local_memory uchar* own = found + thread_id / lanes * HEAD_DIM;
float inner = 0.0f, squares = 0.0f;
UNROLL for (uint i = 0; i < each; i++) {
  uint code = 0; // boundaries below y[i]
  UNROLL for (uint step = level_count / 2; step > 0; step /= 2) code += bounds[code + step - 1] < y[i] ? step : 0;
  const float level = table[code];
  inner += y[i] * level, squares += level * level;
  own[i * lanes + lane] = uchar(code);
}
inner = total_of<int(lanes)>(inner), squares = total_of<int(lanes)>(squares);
inner = inner == 0.0f ? float(HEAD_DIM) : inner; // of a zero vector, whose scale is 0 if the factor is finite
simd_barrier();

if (vector < vectors) {
  if (lane == 0) root_scale[vector] = half(square_root(rms * (FACTOR)));
  for (uint w = lane; w < WORDS; w += lanes) {
    uint word = 0;
    UNROLL for (uint i = 0; i < parts; i++) {
      const uint coordinate = 32 * w / BITS + i;
      const int shift = int(coordinate * BITS) - int(32 * w);
      if (coordinate < HEAD_DIM && shift < 32) {
        const uint code = own[coordinate];
        word |= shift < 0 ? code >> -shift : code << shift;
      }
    }
    codes[vector * WORDS + w] = word;
  }
}
