// One threadgroup: a token of tokens [B, 1, S, HEADS · DIM], unit coordinates of all heads, a simdgroup for a head at a time. Of
// all strings of bits that of least Σ weight · (y − level)² is found by going through all STATES of the last bits, the newest of
// them lowest (Viterbi): a lane has every 32nd state, s = 32 k + lane, and how the best string came there.
constexpr uint each = STATES / 32, reach = REACH, slot = STATES == 256 ? 8 : 16, slots = 32 / slot;
const uint thread_id = thread_position_in_threadgroup.x, lane = thread_id % 32, simdgroup = thread_id / 32;
const uint token = threadgroup_position_in_grid.x, rows = tokens_shape[2], words = first_codes_shape[0];
const global_memory IN_TYPE* from = tokens + token / rows * tokens_strides[0] + token % rows * tokens_strides[2];

threadgroup float unit[SIMDGROUPS * DIM];
threadgroup uchar found[HEADS * (DIM + 1)]; // codes of the scales of all heads, then of their coordinates

for (uint head = simdgroup; head < HEADS; head += SIMDGROUPS) {
  local_memory float* y = unit + simdgroup * DIM;
  local_memory uchar* own = found + HEADS + head * DIM;
  const global_memory int* bits = widths + head * DIM;
  float squares = 0.0f, count = 0.0f;
  for (uint i = lane; i < DIM; i += 32) { // the last coordinate is the first of a string
    const float number = as_float(from[(head * DIM + DIM - 1 - i) * tokens_strides[3]]);
    if (bits[i] > 0) squares += number * number, count += 1.0f;
  }
  squares = total_of<32>(squares), count = total_of<32>(count);
  float scale = STEPS * 0.5f * logarithm2(squares / count) + headroom[head];
  scale = scale > 0.0f ? nearest_whole(scale) : 0.0f; // 0 of NaN too
  scale = scale < 15.0f ? scale : 15.0f;
  const float factor = exponential2(-0.25f * scale);
  if (lane == 0) found[head] = uchar(scale);
  simd_barrier(); // what comes now takes the place of the head before
  for (uint i = lane; i < DIM; i += 32) {
    y[i] = as_float(from[(head * DIM + DIM - 1 - i) * tokens_strides[3]]) * factor;
  }
#if ALONE // the nearest level of each coordinate, of those of its width, which ascend
  for (uint i = lane; i < DIM; i += 32) {
    const global_memory float* of_width = levels + bits[i] * STATES;
    uint code = 0;
    for (uint step = (1u << bits[i]) / 2; step > 0; step /= 2) {
      code += y[i] > 0.5f * (of_width[code + step - 1] + of_width[code + step]) ? step : 0;
    }
    own[i] = uchar(code);
  }
#else
  simd_barrier();
  float cost[each]; // of the best string that ends in a state
  uint back[(DIM + slots - 1) / slots]; // of each coordinate the oldest bits, that are forgotten, of the best
  UNROLL for (uint k = 0; k < each; k++) cost[k] = k == 0 && lane == 0 ? 0.0f : 3.0e38f;
  uint kept = 0;
  for (uint i = 0; i < DIM; i++) {
    const uint width = bits[i];
    if (i % slots == 0) kept = 0;
    if (width > 0) {
      // one bit after the other is forgotten, the oldest first: those that tell a lane's own states apart, then lanes
      float least[each / 2];
      uint oldest[each / 2];
      UNROLL for (uint k = 0; k < each / 2; k++) {
        const bool second = cost[k + each / 2] < cost[k];
        least[k] = second ? cost[k + each / 2] : cost[k], oldest[k] = second ? 1u : 0u;
      }
      UNROLL for (uint bit = 1; bit < reach; bit++) {
        if (bit < width) {
          if (bit < reach - 5) {
            const uint half_count = each >> bit >> 1;
            UNROLL for (uint k = 0; k < each / 2; k++) {
              if (k < half_count) {
                const bool second = least[k + half_count] < least[k];
                least[k] = second ? least[k + half_count] : least[k];
                oldest[k] = (second ? oldest[k + half_count] : oldest[k]) << 1 | (second ? 1u : 0u);
              }
            }
          } else {
            const uint far = 1u << (reach - 1 - bit);
            const float other = simd_shuffle_xor(least[0], far);
            const uint of_other = simd_shuffle_xor(oldest[0], far);
            const bool upper = (lane & far) != 0;
            const bool second = upper ? least[0] < other : other < least[0];
            oldest[0] = (second == upper ? oldest[0] : of_other) << 1 | (second ? 1u : 0u);
            least[0] = second == upper ? least[0] : other;
          }
        }
      }
      UNROLL for (uint k = 0; k < each / 2; k++) {
        if (k << width < each) kept |= oldest[k] << (i % slots * slot + k * width);
      }
      // what all have in common is left out: small numbers are rounded least
      float common = least[0];
      UNROLL for (uint k = 1; k < each / 2; k++) common = k << width < each && least[k] < common ? least[k] : common;
      common = -largest_of<32>(-common);
      const float number = y[i], weight = weights[head * DIM + i];
      const global_memory float* of_width = levels + width * STATES;
      UNROLL for (uint k = 0; k < each; k++) {
        float before = least[k / 2];
        UNROLL for (uint bit = 2; bit <= reach - 5; bit++) before = width >= bit ? least[k >> bit] : before;
        const float distance = number - of_width[32 * k + lane];
        cost[k] = simd_shuffle(before, (32 * k + lane) >> width & 31u) - common + weight * (distance * distance);
      }
    }
    back[i / slots] = kept;
  }

  float lowest = cost[0];
  uint state = lane;
  UNROLL for (uint k = 1; k < each; k++) {
    const bool lower = cost[k] < lowest;
    lowest = lower ? cost[k] : lowest, state = lower ? 32 * k + lane : state;
  }
  UNROLL for (uint step = 16; step > 0; step /= 2) {
    const float other = simd_shuffle_xor(lowest, step);
    const uint of_other = simd_shuffle_xor(state, step);
    const bool lower = other < lowest || (other == lowest && of_other < state);
    lowest = lower ? other : lowest, state = lower ? of_other : state;
  }
  state = simd_shuffle(state, 0u); // of NaN lanes may have found others
  for (uint i = DIM; i-- > 0;) {
    const uint width = bits[i], rest = state >> width; // what is left when a coordinate's own bits are taken off
    const uint oldest = simd_shuffle(back[i / slots] >> (i % slots * slot), rest & 31u) >> (rest >> 5) * width;
    uint code = 0;
    for (uint b = 0; b < width; b++) code |= (state >> b & 1u) << (width - 1 - b); // the first bit of a code is lowest
    if (lane == 0) own[i] = uchar(code);
    if (width > 0) state = (oldest & ((1u << width) - 1u)) << (reach - width) | rest;
  }
#endif
}
group_barrier();

// LSB first and without gaps
for (uint w = thread_id; w < words; w += THREADS) {
  uint word = 0;
  for (uint i = first_codes[w]; i < HEADS * (DIM + 1) && begins[i] < 32 * w + 32; i++) {
    const int shift = int(begins[i]) - int(32 * w);
    word |= shift < 0 ? uint(found[i]) >> -shift : uint(found[i]) << shift;
  }
  codes[token * words + w] = word;
}
