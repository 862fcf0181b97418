// One threadgroup: ROWS query rows of one KV head, over one split of its tokens. Splits come in the order: sinks, recent
// tokens (both exact), packed tokens; each sequence of a batch has counts and splits of its own. Row r is query head
// r / QUERIES of those that share the KV head, query r % QUERIES.
const uint thread_id = thread_position_in_threadgroup.x, lane = thread_id % 32, simdgroup = thread_id / 32;
const uint split = threadgroup_position_in_grid.x, sequence = threadgroup_position_in_grid.z;
const uint head = threadgroup_position_in_grid.y / ROW_TILES;
const uint first_row = threadgroup_position_in_grid.y % ROW_TILES * ROWS;
// what is of all sequences: where their recent tokens end, splits of the longest, and tokens of a split
const uint recent_end = common[0], most_splits = common[1], per_split = common[2], exact_per_split = common[3];
// where a sequence's tokens are: entry and first token of the codes, of the exact arrays, and of the mask
const global_memory uint* own = sizes + sequence * SIZES;
const uint gone = aged(own, recent_end), packed = own[0] + gone, first_recent = own[1] + gone, sinks = own[2];
const uint batch = own[3], first_packed = own[4], place = own[5], column = own[6];
const uint recent = recent_end - first_recent;
const uint sink_splits = (sinks + exact_per_split - 1) / exact_per_split;
const uint exact_splits = sink_splits + (recent + exact_per_split - 1) / exact_per_split;
const uint splits = exact_splits + (packed + per_split - 1) / per_split;

// Queries, of what the matrix unit holds. At TILES_AT, which is in their place if lanes hold them, each simdgroup has what
// is of its tile, and then they join there what they know, or in a large table.
threadgroup float4 shared[SHARED_FLOAT4S];
local_memory query_t* const queries = (local_memory query_t*)shared;
threadgroup float largest[SIMDGROUPS * ROWS], totals[SIMDGROUPS * ROWS];
$declarations
local_memory float* const joined = (local_memory float*)($joined);
#if COMBINES
threadgroup uint came_before;
#endif

if (split >= splits) return; // another sequence has more
const bool exact = split < exact_splits;
uint mask_rows[LANE_ROWS];
UNROLL for (int i = 0; i < LANE_ROWS; i++) {
  const uint last = ALL_ROWS - 1, wanted = first_row + score_row(lane, i), row = wanted < last ? wanted : last;
  const uint query_head = head * SHARED + row / QUERIES;
#if HAS_MASK
  mask_rows[i] = sequence * mask_strides[0] + query_head * mask_strides[1] + row % QUERIES * mask_strides[2];
  mask_rows[i] += column;
#else
  mask_rows[i] = query_head;
#endif
}
#if HAS_MASK
const global_memory float* masks = mask;
#else
const global_memory float* masks = (const global_memory float*)q; // of which nothing is read
#endif

// the queries, in the space of what they are compared with; rows past the last are zero
for (uint r = simdgroup; r < PADDED_ROWS; r += SIMDGROUPS) {
  const uint row = first_row + r;
  const bool real = r < ROWS && row < ALL_ROWS;
  const uint query_head = head * SHARED + row / QUERIES, query = row % QUERIES;
  const global_memory QUERY_TYPE* from =
      q + (real ? $query_place : 0);
#if KEY_SPREAD
  if (!exact) { // some lanes hold what others do, if a vector has fewer
    constexpr uint lanes = Lanes<CODED_KEY>::count, each = Lanes<CODED_KEY>::each;
    float x[each];
    UNROLL for (uint i = 0; i < each; i++) {
      const uint coordinate = i * lanes + lane % lanes;
      x[i] = real ? as_float(from[coordinate]) * (SCALE * LOG2_E) * k_signs[coordinate] : 0.0f;
    }
    const float hartley[Blocks<CODED_KEY>::count] = {$key_hartley};
    spread_lanes<CODED_KEY>(x, hartley, lane % lanes);
    UNROLL for (uint i = 0; i < each; i++) {
      if (lane < lanes) queries[query_at<CODED_KEY>(r, i * lanes + lane)] = as_query(x[i]);
    }
  }
#else
  if (!exact) {
    const uint at = ((sequence * KV_HEADS + head) * ALL_ROWS + (real ? row : 0)) * KEY_ROW;
    for (uint i = lane; i < CODED_KEY; i += 32) {
      const float x = real && KEY_KEPT(i) ? as_float(q_coded[at + i]) * (SCALE * LOG2_E) : 0.0f;
      queries[query_at<CODED_KEY>(r, KEY_PLACE(i))] = as_query(x);
    }
    $key_queries
  }
#endif
  if (exact) {
    for (uint i = lane; i < EXACT_KEY; i += 32) {
      queries[query_at<EXACT_KEY>(r, i)] = as_query(real ? as_float(from[i]) * (SCALE * LOG2_E) : 0.0f);
    }
  }
}

const uint row = (sequence * KV_HEADS + head) * (ROW_TILES * ROWS) + first_row;
const uint row_numbers = most_splits * SPLIT_ROW;
global_memory float* of_split = of_splits + row * row_numbers + split * SPLIT_ROW;

if (exact) {
  const bool at_start = split < sink_splits;
  const uint first = (at_start ? split : split - sink_splits) * exact_per_split;
  const uint count = at_start ? sinks : recent;
  const uint end = first + exact_per_split < count ? first + exact_per_split : count;
  ExactReader<EXACT_TYPE> keys, values;
  if (at_start) {
    keys.rows = sink_keys + place * sink_keys_strides[0] + head * sink_keys_strides[1];
    keys.token_stride = sink_keys_strides[2];
    values.rows = sink_values + place * sink_values_strides[0] + head * sink_values_strides[1];
    values.token_stride = sink_values_strides[2];
  } else {
#if JOINS
    // this split's columns of the next window; those after the newest token belong to the last split
    const uint room = common[4], window = place * KV_HEADS + head, begun = first_recent + first;
    const uint until = end < count ? first_recent + end : room, newest = recent_end - 1;
    global_memory EXACT_TYPE* const next_key = next_keys + window * room * EXACT_KEY;
    global_memory EXACT_TYPE* const next_value = next_values + window * room * EXACT_VALUE;
    copy_tokens<EXACT_KEY>(
        recent_keys + place * recent_keys_strides[0] + head * recent_keys_strides[1], recent_keys_strides[2], begun, until,
        newest, new_keys + place * new_keys_strides[0] + head * new_keys_strides[1], new_keys_strides[3], thread_id, next_key);
    copy_tokens<EXACT_VALUE>(
        recent_values + place * recent_values_strides[0] + head * recent_values_strides[1], recent_values_strides[2], begun,
        until, newest, new_values + place * new_values_strides[0] + head * new_values_strides[1], new_values_strides[3],
        thread_id, next_value);
    group_memory_barrier();
    keys.token_stride = EXACT_KEY, keys.rows = next_key + first_recent * EXACT_KEY;
    values.token_stride = EXACT_VALUE, values.rows = next_value + first_recent * EXACT_VALUE;
#else
    keys.token_stride = recent_keys_strides[2];
    keys.rows = recent_keys + place * recent_keys_strides[0] + head * recent_keys_strides[1];
    keys.rows += first_recent * recent_keys_strides[2];
    values.token_stride = recent_values_strides[2];
    values.rows = recent_values + place * recent_values_strides[0] + head * recent_values_strides[1];
    values.rows += first_recent * recent_values_strides[2];
#endif
  }
  Running<EXACT_VALUE / (2 * MIX_SHARES)> run;
  const NothingAdded added = {};
  const AsSummed summed = {};
  attend<EXACT_KEY, EXACT_VALUE>(
      keys, values, queries, added, masks + (at_start ? 0 : sinks + packed), mask_rows, first, end, simdgroup, SIMDGROUPS,
      lane, run);
  join<EXACT_VALUE>(
      run, summed, simdgroup, SIMDGROUPS, lane, largest, totals, joined, of_split, row_numbers);
} else {
  $key_setup
  $value_setup
  $added
  $summed
  const uint begun = (split - exact_splits) * per_split, first = first_packed + begun;
  const uint end = first_packed + (begun + per_split < packed ? begun + per_split : packed);
  UNROLL for (int i = 0; i < LANE_ROWS; i++) mask_rows[i] += sinks - first_packed; // to which a token's place is added
  Running<CODED_VALUE / (2 * MIX_SHARES)> run;
  attend<CODED_KEY, CODED_VALUE>(
      k_reader, v_reader, queries, added, masks, mask_rows, first, end, simdgroup, SIMDGROUPS, lane, run);
  join<CODED_VALUE>(
      run, summed, simdgroup, SIMDGROUPS, lane, largest, totals, joined, of_split, row_numbers);
}

#if COMBINES // the last threadgroup of a KV head combines the splits of its rows, a simdgroup those of a row
const uint block = sequence * (KV_HEADS * ROW_TILES) + threadgroup_position_in_grid.y;
if (!last_to_come(arrived + block, splits, came_before)) return;
for (uint r = simdgroup; r < ROWS && first_row + r < ALL_ROWS; r += SIMDGROUPS) {
  const global_memory float* splits_of_row = of_splits + (row + r) * row_numbers;
  const uint out_row = (sequence * KV_HEADS + head) * ALL_ROWS + first_row + r;
#if HAS_LOGITS
  const float logit = logits[(head * SHARED + (first_row + r) / QUERIES) * logits_strides[0]] * LOG2_E;
#else
  const float logit = NO_LOGIT;
#endif
  const Softmax all = softmax_of(splits_of_row, splits, logit, lane);
  float plain[Lanes<EXACT_VALUE>::each], coded[Lanes<CODED_VALUE>::each];
  sum_splits<EXACT_VALUE>(splits_of_row, 0, exact_splits, 1, all.largest, lane, plain);
  sum_splits<CODED_VALUE>(splits_of_row, exact_splits, splits, 1, all.largest, lane, coded);
  $finish
}
#endif
