// One threadgroup: one query row. It joins the splits, and a logit of the query head that has no value. Where codes are of
// Hadamard-rotated vectors, it rotates the packed part back and adds the exact part; else the packed part goes out as it is.
const uint thread_id = thread_position_in_threadgroup.x, lane = thread_id % 32, simdgroup = thread_id / 32;
const uint out_row = threadgroup_position_in_grid.x;
const uint from = out_row / ALL_ROWS * ALL_PADDED + out_row % ALL_ROWS; // the last tile of a KV head's rows may be padded
const global_memory uint* own = sizes + out_row / (QUERY_HEADS * QUERIES) * SIZES; // of this sequence; see attend.metal
const uint per_split = common[2], exact_per_split = common[3];
const uint gone = aged(own, common[0]), packed = own[0] + gone;
const uint recent_splits = (common[0] - own[1] - gone + exact_per_split - 1) / exact_per_split;
const uint exact_splits = (own[2] + exact_per_split - 1) / exact_per_split + recent_splits;
const uint splits = exact_splits + (packed + per_split - 1) / per_split;
const global_memory float* row = of_splits + from * common[1] * SPLIT_ROW;
threadgroup float all_plain[EXACT_VALUE], all_coded[CODED_VALUE];

#if HAS_LOGITS
const float logit = logits[out_row / QUERIES % QUERY_HEADS * logits_strides[0]] * LOG2_E;
#else
const float logit = NO_LOGIT;
#endif
const Softmax all = softmax_of(row, splits, logit, lane);
// every SIMDGROUPS-th split for each simdgroup
float plain[Lanes<EXACT_VALUE>::each], coded[Lanes<CODED_VALUE>::each];
sum_splits<EXACT_VALUE>(row, simdgroup, exact_splits, SIMDGROUPS, all.largest, lane, plain);
sum_splits<CODED_VALUE>(row, exact_splits + simdgroup, splits, SIMDGROUPS, all.largest, lane, coded);
for (uint turn = 0; turn < SIMDGROUPS; turn++) {
  if (turn == simdgroup) {
    add_lanes<EXACT_VALUE>(plain, lane, turn == 0, all_plain);
    add_lanes<CODED_VALUE>(coded, lane, turn == 0, all_coded);
  }
  group_barrier();
}
if (simdgroup > 0) return;
read_lanes<EXACT_VALUE>(all_plain, lane, plain);
read_lanes<CODED_VALUE>(all_coded, lane, coded);
$finish
