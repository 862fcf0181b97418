// One threadgroup: VECTORS neighbouring vectors x [B, H, S, HEAD_DIM] of one head, before RoPE, a simdgroup for each. A stage
// adds T_a + i·T_b to what stands for a vector, two of the ENTRIES vectors of its table: complex ones, of which `order` has the
// places of the real parts, then of the imaginary ones. ‖r − T_a − i·T_b‖² is a part in a, a part in b, and the part in both,
// joint[a, b] = 2·T_a·(i·T_b) = −joint[b, a]. STARTS descents begin with the likeliest a, and take in turn the best b and a.
constexpr uint HALF = HEAD_DIM / 2, ROW = ENTRIES + 4; // lanes that read a row each mostly use different banks
constexpr uint EACH = ENTRIES / 32, JOINT_EACH = ENTRIES * ENTRIES / THREADS, PARTS = THREADS / ENTRIES;
constexpr uint LANES = 32 / STARTS, TRIED = ENTRIES / LANES; // of a descent, and entries of each of its lanes
const uint thread_id = thread_position_in_threadgroup.x, lane = thread_id % 32, simdgroup = thread_id / 32;
const uint heads = x_shape[1], tokens = x_shape[2], tiles = (tokens + VECTORS - 1) / VECTORS;
const uint sequence = threadgroup_position_in_grid.x / tiles, head = sequence % heads; // of all heads of the batch
const uint wanted = threadgroup_position_in_grid.x % tiles * VECTORS + simdgroup;
const bool inside = wanted < tokens;
const uint token = inside ? wanted : tokens - 1, vector = sequence * tokens + token; // past the last one it is the last again
const global_memory IN_TYPE* from = x + sequence / heads * x_strides[0] + head * x_strides[1] + token * x_strides[2];

threadgroup float4 left[VECTORS / 4 * HEAD_DIM]; // coordinates of four vectors
threadgroup float of_a[VECTORS * ROW], of_b[VECTORS * ROW], of_both[ENTRIES * ROW], columns[THREADS];
threadgroup uint places[HEAD_DIM];
local_memory float* own_left = (local_memory float*)left + simdgroup / 4 * (4 * HEAD_DIM) + simdgroup % 4;
const local_memory float *own_a = of_a + simdgroup * ROW, *own_b = of_b + simdgroup * ROW;

for (uint i = thread_id; i < HEAD_DIM; i += THREADS) places[i] = order[i * order_strides[0]];
group_barrier();
float energy = 0.0f;
for (uint i = lane; i < HEAD_DIM; i += 32) {
  const float number = as_float(from[places[i] * x_strides[3]]);
  energy += number * number;
}
const float rms = square_root(total_of<32>(energy)) / square_root(float(HEAD_DIM)), unit = rms == 0.0f ? 1.0f : rms;
for (uint i = lane; i < HEAD_DIM; i += 32) own_left[4 * i] = as_float(from[places[i] * x_strides[3]]) / unit;

uint bits = 0, filled = 0, byte = vector * CODE_BYTES; // not yet written
for (uint stage = 0; stage < STAGES; stage++) {
  const global_memory half* entries = table + (head * STAGES + stage) * (ENTRIES * HEAD_DIM);
  const global_memory float* both = joint + (head * STAGES + stage) * (ENTRIES * ENTRIES);
  float next[JOINT_EACH]; // loads are under way while products are computed
  UNROLL for (uint k = 0; k < JOINT_EACH; k++) next[k] = both[k * THREADS + thread_id];
  group_barrier();

  // VECTORS neighbouring lanes share an entry, and have every VECTORS-th pair of its coordinates, for all vectors
  const uint part = lane % VECTORS, entry = thread_id / VECTORS;
  float sums[EACH][2 * VECTORS], norm[EACH];
  UNROLL for (uint e = 0; e < EACH; e++) {
    norm[e] = 0.0f;
    UNROLL for (uint i = 0; i < 2 * VECTORS; i++) sums[e][i] = 0.0f;
  }
  for (uint first = part; first < HALF; first += 4 * VECTORS) {
    UNROLL for (uint k = 0; k < 4; k++) {
      const uint p = first + k * VECTORS;
      if (HALF % (4 * VECTORS) == 0 || p < HALF) {
        float real[EACH], imaginary[EACH];
        UNROLL for (uint e = 0; e < EACH; e++) {
          const global_memory half* own = entries + (32 * e + entry) * HEAD_DIM;
          real[e] = as_float(own[places[p]]), imaginary[e] = as_float(own[places[HALF + p]]);
          norm[e] += real[e] * real[e];
          norm[e] += imaginary[e] * imaginary[e];
        }
        UNROLL for (uint q = 0; q < VECTORS / 4; q++) {
          const float4 u = left[q * HEAD_DIM + p], v = left[q * HEAD_DIM + HALF + p];
          const float us[4] = {u.x, u.y, u.z, u.w}, vs[4] = {v.x, v.y, v.z, v.w};
          UNROLL for (uint e = 0; e < EACH; e++) {
            UNROLL for (uint i = 0; i < 4; i++) { // one product after the other: each is one instruction
              sums[e][8 * q + 2 * i] += us[i] * real[e];
              sums[e][8 * q + 2 * i] += vs[i] * imaginary[e];
              sums[e][8 * q + 2 * i + 1] += vs[i] * real[e];
              sums[e][8 * q + 2 * i + 1] -= us[i] * imaginary[e];
            }
          }
        }
      }
    }
  }
  UNROLL for (uint e = 0; e < EACH; e++) {
    // each lane keeps half of its sums and hands on the others, until it has the two of one vector
    UNROLL for (uint kept = VECTORS; kept > 1; kept /= 2) {
      const bool upper = (part & kept / 2) != 0;
      UNROLL for (uint i = 0; i < VECTORS; i++) {
        if (i < kept) {
          const float other = simd_shuffle_xor(upper ? sums[e][i] : sums[e][i + kept], kept / 2);
          sums[e][i] = (upper ? sums[e][i + kept] : sums[e][i]) + other;
        }
      }
    }
    norm[e] = total_of<VECTORS>(norm[e]);
    of_a[part * ROW + 32 * e + entry] = norm[e] - 2.0f * sums[e][0];
    of_b[part * ROW + 32 * e + entry] = norm[e] - 2.0f * sums[e][1];
  }
  float column = 0.0f;
  UNROLL for (uint k = 0; k < JOINT_EACH; k++) {
    of_both[(k * PARTS + thread_id / ENTRIES) * ROW + thread_id % ENTRIES] = next[k];
    column += next[k];
  }
  columns[thread_id] = column;
  group_barrier();

  float likely[EACH], some_a[TRIED], some_b[TRIED];
  UNROLL for (uint i = 0; i < EACH; i++) { // as if b were any: the mean of a row, which is minus that of a column
    float total = 0.0f;
    UNROLL for (uint k = 0; k < PARTS; k++) total += columns[k * ENTRIES + 32 * i + lane];
    likely[i] = own_a[32 * i + lane] - total / ENTRIES;
  }
  UNROLL for (uint k = 0; k < TRIED; k++) {
    some_a[k] = own_a[k * LANES + lane % LANES], some_b[k] = own_b[k * LANES + lane % LANES];
  }
  uint a = 0, b = 0;
  float distance = 0.0f;
  UNROLL for (uint start = 0; start < STARTS; start++) {
    uint at = 0;
    distance = GREATEST;
    UNROLL for (uint i = 0; i < EACH; i++) keep_less(likely[i], 32 * i + lane, distance, at);
    least_of<32>(distance, at);
    UNROLL for (uint i = 0; i < EACH; i++) likely[i] = at == 32 * i + lane ? GREATEST : likely[i];
    a = start == lane / LANES ? at : a;
  }
  UNROLL for (uint round = 0; round < ROUNDS; round++) {
    const local_memory float* of_row = of_both + a * ROW + lane % LANES;
    distance = GREATEST;
    UNROLL for (uint k = 0; k < TRIED; k++) keep_less(some_b[k] + of_row[k * LANES], k * LANES + lane % LANES, distance, b);
    least_of<LANES>(distance, b);
    of_row = of_both + b * ROW + lane % LANES;
    distance = GREATEST;
    UNROLL for (uint k = 0; k < TRIED; k++) keep_less(some_a[k] - of_row[k * LANES], k * LANES + lane % LANES, distance, a);
    least_of<LANES>(distance, a);
  }
  distance += own_b[b];
  uint pair = a | b << INDEX_BITS;
  least_of<32>(distance, pair);
  a = pair % ENTRIES, b = pair / ENTRIES;
  const global_memory half *of_entry = entries + a * HEAD_DIM, *turned = entries + b * HEAD_DIM;
  for (uint p = lane; p < HALF; p += 32) {
    const uint at_real = places[p], at_imaginary = places[HALF + p];
    own_left[4 * p] -= as_float(of_entry[at_real]) - as_float(turned[at_imaginary]);
    own_left[4 * (HALF + p)] -= as_float(of_entry[at_imaginary]) + as_float(turned[at_real]);
  }
  bits |= pair << filled;
  for (filled += 2 * INDEX_BITS; filled >= 8; filled -= 8, bits >>= 8, byte++) {
    if (inside && lane == 0) codes[byte] = uchar(bits & 255u);
  }
}
if (inside && lane == 0 && filled > 0) codes[byte] = uchar(bits);
simd_barrier();

float inner = 0.0f, squares = 0.0f;
for (uint i = lane; i < HEAD_DIM; i += 32) {
  const float y = as_float(from[places[i] * x_strides[3]]) / unit, coded = y - own_left[4 * i];
  inner += y * coded, squares += coded * coded;
}
inner = total_of<32>(inner), squares = total_of<32>(squares);
inner = inner == 0.0f ? float(HEAD_DIM) : inner; // scales are to be finite
squares = squares == 0.0f ? 1.0f : squares;
if (inside && lane == 0) {
  float factor = FACTOR;
  factor = factor < 0.0f ? 0.0f : factor;
  factor = factor > MOST ? MOST : factor;
  root_scale[vector] = half(square_root(rms * factor));
}
