// One threadgroup: SPAN neighbouring parts of each of ROWS rows, a point each, against all centroids: TILE of these and
// CHUNK coordinates at a time. A simdgroup has EACH of the points, its lanes every 32nd centroid.
const uint thread_id = thread_position_in_threadgroup.x, lane = thread_id % 32, simdgroup = thread_id / 32;
const uint first_row = threadgroup_position_in_grid.x * ROWS, first_part = threadgroup_position_in_grid.y * SPAN;
const uint heads = points_shape[1], tokens = points_shape[2], rows = points_shape[0] * heads * tokens;

threadgroup float4 some_centroids[TILE * ROW_QUADS];
threadgroup float4 some_points[POINTS * QUADS];
threadgroup float halves[TILE];
threadgroup uint indices[POINTS];
const local_memory float4* own_points = some_points + simdgroup * (EACH * QUADS);

// what a thread copies to threadgroup memory: one column of a chunk, of every LINES-th centroid and point
const uint column = thread_id % CHUNK, line = thread_id / CHUNK;
constexpr bool ALL_LINES = COUNT >= CENTROID_LOADS * LINES; // whether a tile's lines all have a centroid
float next_centroids[CENTROID_LOADS], next_points[POINT_LOADS];
const global_memory POINT_TYPE* from[POINT_LOADS];
UNROLL for (uint i = 0; i < POINT_LOADS; i++) { // past the last row or part it is the last one again
  const uint wanted_row = first_row + (line + i * LINES) / SPAN, row = wanted_row < rows ? wanted_row : rows - 1;
  const uint wanted_part = first_part + (line + i * LINES) % SPAN, part = wanted_part < PARTS ? wanted_part : PARTS - 1;
  from[i] = points + row / (heads * tokens) * points_strides[0] + row / tokens % heads * points_strides[1] +
            row % tokens * points_strides[2] + part * DIM * points_strides[3];
}

float least[EACH], sums[EACH][PER_LANE];
uint found[EACH];
UNROLL for (uint i = 0; i < EACH; i++) {
  least[i] = 3.402823466e38f;
  found[i] = 0;
  UNROLL for (uint j = 0; j < PER_LANE; j++) sums[i][j] = 0.0f;
}
float half_square = 0.0f; // of centroid `thread_id` of the tile

const uint quads = opaque(QUADS); // a loop over them is to stay one
for (uint step = 0; step <= STEPS; step++) {
  // the loads of this step are under way while the one before is computed
  const uint loaded = step < STEPS ? step : STEPS - 1;
  const uint coordinate = loaded % CHUNKS * CHUNK + column;
  const bool inside = DIM % CHUNK == 0 || coordinate < DIM;
  const uint safe = inside ? coordinate : 0;
  const uint first = loaded / CHUNKS * TILE + (ALL_LINES || line < COUNT ? line : COUNT - 1);
  const global_memory CENTROID_TYPE* at = centroids + first * centroids_strides[0] + safe * centroids_strides[1];
  UNROLL for (uint i = 0; i < CENTROID_LOADS; i++) { // past the last one an earlier one, whose lower index wins
    const float x = as_float(*at);
    next_centroids[i] = inside ? x : 0.0f;
    if (ALL_LINES || line + (i + 1) * LINES < COUNT) at += LINES * centroids_strides[0];
  }
  if (CHUNKS > 1 || step == 0) {
    UNROLL for (uint i = 0; i < POINT_LOADS; i++) {
      const float x = as_float(from[i][safe * points_strides[3]]);
      next_points[i] = inside ? x : 0.0f;
    }
  }
  const bool whole = step > 0 && step % CHUNKS == 0; // the inner products of a tile are
  if (step > 0) {
    for (uint q = 0; q < quads; q++) {
      float4 x[EACH];
      UNROLL for (uint i = 0; i < EACH; i++) x[i] = own_points[i * QUADS + q];
      UNROLL for (uint j = 0; j < PER_LANE; j++) {
        const float4 c = some_centroids[(j * 32 + lane) * ROW_QUADS + q];
        UNROLL for (uint i = 0; i < EACH; i++) {
          sums[i][j] += x[i].x * c.x;
          sums[i][j] += x[i].y * c.y;
          sums[i][j] += x[i].z * c.z;
          sums[i][j] += x[i].w * c.w;
        }
      }
      if (thread_id < TILE) {
        const float4 c = some_centroids[thread_id * ROW_QUADS + q];
        half_square += 0.5f * (c.x * c.x + c.y * c.y + c.z * c.z + c.w * c.w);
      }
    }
    if (whole && thread_id < TILE) {
      halves[thread_id] = half_square;
      half_square = 0.0f;
    }
  }
  group_barrier();
  if (whole) {
    UNROLL for (uint j = 0; j < PER_LANE; j++) {
      const uint centroid = (step / CHUNKS - 1) * TILE + j * 32 + lane;
      const float half_of_square = halves[j * 32 + lane];
      UNROLL for (uint i = 0; i < EACH; i++) {
        const float distance = half_of_square - sums[i][j];
        const bool nearer = distance < least[i];
        least[i] = nearer ? distance : least[i];
        found[i] = nearer ? centroid : found[i];
        sums[i][j] = 0.0f;
      }
    }
  }
  UNROLL for (uint i = 0; i < CENTROID_LOADS; i++) {
    if (ALL_LINES || line + i * LINES < TILE) {
      ((local_memory float*)some_centroids)[(line + i * LINES) * (4 * ROW_QUADS) + column] = next_centroids[i];
    }
  }
  UNROLL for (uint i = 0; i < POINT_LOADS; i++) {
    if (POINTS == POINT_LOADS * LINES || line + i * LINES < POINTS) {
      ((local_memory float*)some_points)[(line + i * LINES) * CHUNK + column] = next_points[i];
    }
  }
  group_barrier();
}

// the nearest over all lanes: each keeps half of the points that it has and hands on the others, until it has one
UNROLL for (uint kept = EACH / 2; kept > 0; kept /= 2) {
  const uint far = kept * 32 / EACH;
  const bool upper = (lane & far) != 0;
  UNROLL for (uint i = 0; i < kept; i++) {
    const float distance = simd_shuffle_xor(upper ? least[i] : least[i + kept], far);
    const uint centroid = simd_shuffle_xor(upper ? found[i] : found[i + kept], far);
    least[i] = upper ? least[i + kept] : least[i];
    found[i] = upper ? found[i + kept] : found[i];
    const bool nearer = distance < least[i] || (distance == least[i] && centroid < found[i]);
    least[i] = nearer ? distance : least[i];
    found[i] = nearer ? centroid : found[i];
  }
}
UNROLL for (uint far = 16 / EACH; far > 0; far /= 2) {
  const float distance = simd_shuffle_xor(least[0], far);
  const uint centroid = simd_shuffle_xor(found[0], far);
  const bool nearer = distance < least[0] || (distance == least[0] && centroid < found[0]);
  least[0] = nearer ? distance : least[0];
  found[0] = nearer ? centroid : found[0];
}
if (lane % (32 / EACH) == 0) indices[simdgroup * EACH + lane / (32 / EACH)] = found[0];
group_barrier();

// a thread packs a word; a span begins with one
const uint local_row = thread_id / SPAN_WORDS, word = thread_id % SPAN_WORDS, first_bit = word * 32;
const uint row_word = first_part * BITS / 32 + word;
if (local_row < ROWS && first_row + local_row < rows && row_word < WORDS) {
  const uint left = PARTS - first_part, count = left < SPAN ? left : SPAN;
  uint joined = 0;
  for (uint i = first_bit / BITS; i < count && i * BITS < first_bit + 32; i++) {
    const uint index = indices[local_row * SPAN + i];
    joined |= i * BITS < first_bit ? index >> (first_bit - i * BITS) : index << (i * BITS - first_bit);
  }
  packed[(first_row + local_row) * WORDS + row_word] = joined;
}
