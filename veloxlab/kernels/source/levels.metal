// One threadgroup: some packed tokens of one KV head, as numbers in the space of their codes. Four lanes share a vector.
const uint thread_id = thread_position_in_threadgroup.x, lane = thread_id % 32, share = thread_id % 4;
const uint batch = threadgroup_position_in_grid.z, head = threadgroup_position_in_grid.y;
const uint packed = c_rows_shape[2], first = threadgroup_position_in_grid.x * PER_GROUP;
const uint end = first + PER_GROUP < packed ? first + PER_GROUP : packed;
constexpr int quarter = CODED / 4, line = 16 / int(sizeof(OUT_TYPE));
$declarations
$setup
group_barrier();
for (uint token = first + thread_id / 4; token < end; token += THREADS / 4) {
  auto reader = c_reader;
  reader.advance(token);
  decltype(reader)::Fetched<quarter> fetched;
  pair_t pairs[quarter / 2];
  reader.fetch<quarter>(0, share, fetched);
  reader.decode<quarter>(fetched, share, pairs);
  const float scale = decltype(reader)::Scales::decode(reader.scales.fetch(0));
  global_memory OUT_TYPE* row = out + ((batch * HEADS + head) * size_t(packed) + token) * ROW_LENGTH;
  alignas(16) OUT_TYPE numbers[quarter];
  UNROLL for (int j = 0; j < quarter; j++) {
    const float2 both = pair_floats(pairs[j / 2]);
    const uint i = CODED - 1 - (share * quarter + j); // a string begins with the last coordinate
    numbers[quarter - 1 - j] = OUT_TYPE(NUMBER(i, (j % 2 == 0 ? both.x : both.y) * scale));
  }
  if (quarter % line == 0 && ROW_LENGTH % line == 0) {
    UNROLL for (int l = 0; l < quarter / line; l++) {
      ((global_memory uint4*)(row + (3 - share) * quarter))[l] = ((thread const uint4*)numbers)[l];
    }
  } else {
    UNROLL for (int j = 0; j < quarter; j++) row[(3 - share) * quarter + j] = numbers[j];
  }
  $rest
}
