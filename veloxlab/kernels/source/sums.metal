// One threadgroup: one vector x [B, H, S, HEAD_DIM], before RoPE. Each stage adds T_a + i·T_b to what stands for it, two of the
// ENTRIES vectors of its table: complex ones, of which `order` has the places of the real parts, then of the imaginary ones.
// ‖r − T_a − i·T_b‖² is a part in a, a part in b, and 2·T_a·(i·T_b): every simdgroup begins with another likely a, and takes in
// turn the best b for its a and the best a for its b.
const uint thread_id = thread_position_in_threadgroup.x, lane = thread_id % 32, simdgroup = thread_id / 32;
const uint heads = x_shape[1], tokens = x_shape[2], vector = threadgroup_position_in_grid.x;
const uint batch = vector / (heads * tokens), head = vector / tokens % heads, token = vector % tokens;
const global_memory IN_TYPE* from = x + batch * x_strides[0] + head * x_strides[1] + token * x_strides[2];

threadgroup half entries[ENTRIES * ROW];
threadgroup float y[HEAD_DIM], left[HEAD_DIM], middle[HEAD_DIM];
threadgroup float of_a[ENTRIES], of_b[ENTRIES], likely[ENTRIES], distances[STARTS];
threadgroup uint places[HEAD_DIM], tried[STARTS], ends[2 * STARTS];
threadgroup uchar found[2 * STAGES];

for (uint i = thread_id; i < HEAD_DIM; i += THREADS) {
  places[i] = order[i * order_strides[0]];
  y[i] = as_float(from[places[i] * x_strides[3]]);
}
group_barrier();
float energy = 0.0f;
for (uint i = lane; i < HEAD_DIM; i += 32) energy += y[i] * y[i];
const float rms = square_root(total_of<32>(energy)) / square_root(float(HEAD_DIM));
group_barrier();
for (uint i = thread_id; i < HEAD_DIM; i += THREADS) {
  y[i] /= rms == 0.0f ? 1.0f : rms;
  left[i] = y[i];
}

for (uint stage = 0; stage < STAGES; stage++) {
  const global_memory half* of_stage = table + head * table_strides[0] + stage * table_strides[1];
  for (uint i = thread_id; i < ENTRIES * HEAD_DIM; i += THREADS) {
    const uint entry = i / HEAD_DIM, coordinate = i % HEAD_DIM;
    entries[entry * ROW + coordinate] = of_stage[entry * table_strides[2] + places[coordinate] * table_strides[3]];
  }
  group_barrier();
  for (uint i = thread_id; i < 2 * ENTRIES; i += THREADS) { // first those of a, then those of b
    const local_memory half* own = entries + i % ENTRIES * ROW;
    float product = 0.0f, norm = 0.0f;
    for (uint p = 0; p < HALF; p++) {
      const float real = as_float(own[p]), imaginary = as_float(own[HALF + p]);
      norm += real * real + imaginary * imaginary;
      product += i < ENTRIES ? left[p] * real + left[HALF + p] * imaginary : left[HALF + p] * real - left[p] * imaginary;
    }
    if (i < ENTRIES) of_a[i] = norm - 2.0f * product;
    if (i >= ENTRIES) of_b[i - ENTRIES] = norm - 2.0f * product;
  }
  for (uint i = thread_id; i < HEAD_DIM; i += THREADS) {
    float total = 0.0f;
    for (uint entry = 0; entry < ENTRIES; entry++) total += as_float(entries[entry * ROW + i]);
    middle[i] = total / ENTRIES;
  }
  group_barrier();
  for (uint a = thread_id; a < ENTRIES; a += THREADS) { // as if b were any
    float both = 0.0f;
    for (uint p = 0; p < HALF; p++) {
      both += as_float(entries[a * ROW + HALF + p]) * middle[p] - as_float(entries[a * ROW + p]) * middle[HALF + p];
    }
    likely[a] = of_a[a] + 2.0f * both;
  }
  group_barrier();
  if (simdgroup == 0) {
    float own[ENTRIES / 32];
    for (uint i = 0; i < ENTRIES / 32; i++) own[i] = likely[32 * i + lane];
    for (uint s = 0; s < STARTS; s++) {
      float least = 3.4e38f;
      uint at = 0;
      for (uint i = 0; i < ENTRIES / 32; i++) keep_less(own[i], 32 * i + lane, least, at);
      least_of<32>(least, at);
      if (at % 32 == lane) own[at / 32] = 3.4e38f;
      if (lane == 0) tried[s] = at;
    }
  }
  group_barrier();
  uint a = tried[simdgroup], b = 0;
  float distance = 0.0f;
  for (uint round = 0; round < ROUNDS; round++) {
    distance = 3.4e38f;
    for (uint j = lane; j < ENTRIES; j += 32) {
      keep_less(of_b[j] + 2.0f * crossed<HALF>(entries + a * ROW, entries + j * ROW), j, distance, b);
    }
    least_of<32>(distance, b);
    distance = 3.4e38f;
    for (uint j = lane; j < ENTRIES; j += 32) {
      keep_less(of_a[j] - 2.0f * crossed<HALF>(entries + b * ROW, entries + j * ROW), j, distance, a);
    }
    least_of<32>(distance, a);
  }
  if (lane == 0) {
    distances[simdgroup] = distance + of_b[b];
    ends[2 * simdgroup] = a, ends[2 * simdgroup + 1] = b;
  }
  group_barrier();
  uint best = 0;
  for (uint s = 1; s < STARTS; s++) best = distances[s] < distances[best] ? s : best;
  a = ends[2 * best], b = ends[2 * best + 1];
  for (uint p = thread_id; p < HALF; p += THREADS) {
    left[p] -= as_float(entries[a * ROW + p]) - as_float(entries[b * ROW + HALF + p]);
    left[HALF + p] -= as_float(entries[a * ROW + HALF + p]) + as_float(entries[b * ROW + p]);
  }
  if (thread_id == 0) found[2 * stage] = uchar(a), found[2 * stage + 1] = uchar(b);
  group_barrier();
}

float inner = 0.0f, squares = 0.0f;
for (uint i = lane; i < HEAD_DIM; i += 32) {
  const float coded = y[i] - left[i];
  inner += y[i] * coded, squares += coded * coded;
}
inner = total_of<32>(inner), squares = total_of<32>(squares);
inner = inner == 0.0f ? float(HEAD_DIM) : inner; // scales are to be finite
squares = squares == 0.0f ? 1.0f : squares;
if (thread_id == 0) {
  float factor = FACTOR;
  factor = factor < 0.0f ? 0.0f : factor;
  factor = factor > MOST ? MOST : factor;
  root_scale[vector] = half(square_root(rms * factor));
}
for (uint w = thread_id; w < CODE_BYTES; w += THREADS) {
  uint byte = 0;
  for (uint i = 8 * w / INDEX_BITS; i < 2 * STAGES && i * INDEX_BITS < 8 * w + 8; i++) {
    const int shift = int(i * INDEX_BITS) - int(8 * w);
    byte |= shift < 0 ? uint(found[i]) >> -shift : uint(found[i]) << shift;
  }
  codes[vector * CODE_BYTES + w] = uchar(byte);
}
