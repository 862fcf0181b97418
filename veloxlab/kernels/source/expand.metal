// One threadgroup: some tokens of one KV head as attention of many queries reads them. Tokens come in the order: before,
// packed, after, newest; all but the packed ones are exact, and those groups come last.
const uint thread_id = thread_position_in_threadgroup.x, lane = thread_id % 32, batch = threadgroup_position_in_grid.z;
const uint own_head = threadgroup_position_in_grid.y, head = sizes[4] + own_head;
const uint ahead = sizes[0], packed = sizes[1], behind = sizes[2], last = sizes[3];
const uint packed_groups = (packed + PER_GROUP - 1) / PER_GROUP, group = threadgroup_position_in_grid.x;
global_memory OUT_TYPE* to =
    out + (batch * sizes[5] + own_head) * size_t(ahead + packed + behind + last) * HEAD_DIM;
$declarations

if (group < packed_groups) {
  $setup
  group_barrier();
  const uint first = group * PER_GROUP, end = first + PER_GROUP < packed ? first + PER_GROUP : packed;
  expand<HEAD_DIM>(c_reader, signs, first, end, thread_id, to + ahead * HEAD_DIM);
} else {
  const uint first = (group - packed_groups) * PER_GROUP, all = ahead + behind + last;
  const uint end = first + PER_GROUP < all ? first + PER_GROUP : all;
  for (uint i = first * HEAD_DIM + thread_id; i < end * HEAD_DIM; i += THREADS) {
    const uint token = i / HEAD_DIM, coordinate = i % HEAD_DIM;
    const uint place = token < ahead ? token : token + packed;
    float x;
    if (token < ahead) {
      x = as_float(before[batch * before_strides[0] + head * before_strides[1] + token * before_strides[2] + coordinate]);
    } else if (token < ahead + behind) {
      x = as_float(
          after[batch * after_strides[0] + head * after_strides[1] + (token - ahead) * after_strides[2] + coordinate]);
    } else {
      x = as_float(
          newest[batch * newest_strides[0] + head * newest_strides[1] + (token - ahead - behind) * newest_strides[2] +
                 coordinate]);
    }
    to[size_t(place) * HEAD_DIM + coordinate] = OUT_TYPE(x);
  }
}
