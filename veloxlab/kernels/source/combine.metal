// One threadgroup: one query row. It joins the splits, and a logit of the query head that has no value. Where codes are of
// Hadamard-rotated vectors, it rotates the packed part back and adds the exact part; else the packed part goes out as it is.
const uint thread_id = thread_position_in_threadgroup.x, row = threadgroup_position_in_grid.x;
const uint from = row / ALL_ROWS * ALL_PADDED + row % ALL_ROWS; // the last tile of a KV head's rows may be padded
const global_memory uint* own = sizes + row / (QUERY_HEADS * QUERIES) * SIZES; // of this sequence; see attend.metal
const uint most_splits = common[1], per_split = common[2], exact_per_split = common[3];
const uint gone = aged(own, common[0]), packed = own[0] + gone;
const uint recent_splits = (common[0] - own[1] - gone + exact_per_split - 1) / exact_per_split;
const uint exact_splits = (own[2] + exact_per_split - 1) / exact_per_split + recent_splits;
const uint splits = exact_splits + (packed + per_split - 1) / per_split;
const global_memory float* row_sums = sums + from * most_splits * 2;
const global_memory float* row_mixed = mixed + from * most_splits * LARGEST_VALUE;
threadgroup float factors[MOST_SPLITS];
threadgroup float plain[LARGEST_VALUE], coded[CODED_VALUE], parts[THREADS / 32 * 2];

float largest = -1.0e30f;
for (uint s = thread_id; s < splits; s += THREADS) largest = row_sums[2 * s] > largest ? row_sums[2 * s] : largest;
largest = largest_of<32>(largest);
if (thread_id % 32 == 0) parts[thread_id / 32] = largest;
group_barrier();
for (uint i = 0; i < THREADS / 32; i++) largest = parts[i] > largest ? parts[i] : largest;
#if HAS_LOGITS
const float logit = logits[row / QUERIES % QUERY_HEADS * logits_strides[0]] * LOG2_E;
largest = logit > largest ? logit : largest;
#endif
float total = 0.0f;
for (uint s = thread_id; s < splits; s += THREADS) {
  factors[s] = exponential2(row_sums[2 * s] - largest);
  total += factors[s] * row_sums[2 * s + 1];
}
total = total_of<32>(total);
if (thread_id % 32 == 0) parts[THREADS / 32 + thread_id / 32] = total;
for (uint i = thread_id; i < LARGEST_VALUE; i += THREADS) plain[i] = 0.0f;
for (uint i = thread_id; i < CODED_VALUE; i += THREADS) coded[i] = 0.0f;
group_barrier();
total = 0.0f;
for (uint i = 0; i < THREADS / 32; i++) total += parts[THREADS / 32 + i];
#if HAS_LOGITS
total += exponential2(logit - largest);
#endif

// every `lines`-th split for each line of threads
constexpr uint lines = THREADS / LARGEST_VALUE;
const uint line = thread_id / LARGEST_VALUE, column = thread_id % LARGEST_VALUE;
float of_exact = 0.0f, of_packed = 0.0f;
if (line < lines) {
  for (uint s = line; s < exact_splits; s += lines) of_exact += factors[s] * row_mixed[s * LARGEST_VALUE + column];
  for (uint s = exact_splits + line; s < splits; s += lines) {
    of_packed += factors[s] * row_mixed[s * LARGEST_VALUE + column];
  }
}
for (uint turn = 0; turn < lines; turn++) {
  if (turn == line) {
    plain[column] += of_exact / total;
    if (column < CODED_VALUE) coded[column] += of_packed / total;
  }
  group_barrier();
}
#if VALUE_SPREAD
if (thread_id < 32) { // some lanes hold what others do, if a vector has fewer
  constexpr uint lanes = Lanes<CODED_VALUE>::count, each = Lanes<CODED_VALUE>::each;
  float x[each];
  UNROLL for (uint i = 0; i < each; i++) x[i] = coded[i * lanes + thread_id % lanes];
  const float hartley[Blocks<CODED_VALUE>::count] = {$value_hartley};
  spread_lanes<CODED_VALUE>(x, hartley, thread_id % lanes);
  UNROLL for (uint i = 0; i < each; i++) {
    const uint at = i * lanes + thread_id;
    if (thread_id < lanes) out[row * EXACT_VALUE + at] = OUT_TYPE(plain[at] + x[i] * v_signs[at]);
  }
}
#else
for (uint i = thread_id; i < EXACT_VALUE; i += THREADS) out[row * EXACT_VALUE + i] = OUT_TYPE(plain[i]);
for (uint i = thread_id; i < CODED_VALUE; i += THREADS) out_coded[row * CODED_VALUE + i] = coded[i];
#endif
