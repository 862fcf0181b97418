// One threadgroup: VECTORS vectors, in the layout of lanes.h. Each is given twice: x [B, H, S, HEAD_DIM], which has its size, and
// y [B, H, S, HEAD_DIM] in the basis where it is quantized. There coordinate i, of vectors of size 1, has a mean and a deviation,
// of its KV head, and takes a code of its own width of 0 … WIDEST bits. Tables of 2^n levels begin at 2^n − 1.
constexpr uint lanes = Lanes<HEAD_DIM>::count, each = Lanes<HEAD_DIM>::each;
constexpr uint entries = (2u << WIDEST) - 1;
const uint thread_id = thread_position_in_threadgroup.x, lane = thread_id % lanes;
const uint heads = x_shape[1], tokens = x_shape[2], vectors = x_shape[0] * heads * tokens;
const uint vector = threadgroup_position_in_grid.x * VECTORS + thread_id / lanes;

threadgroup float table[entries], bounds[entries];
threadgroup uint begins[HEAD_DIM + 1];
threadgroup uchar found[VECTORS * HEAD_DIM];

for (uint i = thread_id; i < entries; i += THREADS) {
  table[i] = levels[i * levels_strides[0]];
  bounds[i] = boundaries[i * boundaries_strides[0]];
}
for (uint i = thread_id; i < HEAD_DIM + 1; i += THREADS) begins[i] = first_bits[i * first_bits_strides[0]];
group_barrier();

// past the last vector lanes take part in what the simdgroup does together, and write nothing
const uint at = vector < vectors ? vector : vectors - 1;
const uint batch = at / (heads * tokens), head = at / tokens % heads, token = at % tokens;
float x_own[each], y_own[each];
load_lanes<HEAD_DIM>(x_own, x + batch * x_strides[0] + head * x_strides[1] + token * x_strides[2], x_strides[3], lane);
load_lanes<HEAD_DIM>(y_own, y + batch * y_strides[0] + head * y_strides[1] + token * y_strides[2], y_strides[3], lane);
const float rms = root_mean_square<HEAD_DIM>(x_own);
const float to_unit = 1.0f / (rms == 0.0f ? 1.0f : rms);

local_memory uchar* own = found + thread_id / lanes * HEAD_DIM;
float inner = 0.0f, squares = 0.0f, energy = 0.0f;
UNROLL for (uint i = 0; i < each; i++) {
  const uint coordinate = i * lanes + lane, count = 1u << (begins[coordinate + 1] - begins[coordinate]);
  const float middle = mean[head * mean_strides[0] + coordinate * mean_strides[2]];
  const float unit = deviation[head * deviation_strides[0] + coordinate * deviation_strides[2]];
  const float number = y_own[i] * to_unit;
  const uint code = bounds_below<WIDEST>(bounds + (count - 1), count, (number - middle) / unit);
  const float level = table[count - 1 + code] * unit + middle;
  inner += number * level, squares += level * level, energy += number * number;
  own[coordinate] = uchar(code);
}
inner = total_of<int(lanes)>(inner), squares = total_of<int(lanes)>(squares), energy = total_of<int(lanes)>(energy);
squares = squares == 0.0f ? 1.0f : squares, energy = energy == 0.0f ? 1.0f : energy; // scales are to be finite
simd_barrier();

if (vector < vectors) {
  if (lane == 0) root_scale[vector] = half(square_root(rms * (FACTOR)));
  pack_plan<HEAD_DIM, CODE_WORDS>(own, begins, first_codes, first_codes_strides[0], codes + vector * CODE_WORDS, lane, lanes);
}
