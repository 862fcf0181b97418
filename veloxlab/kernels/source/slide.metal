// A threadgroup writes the keys or the values of one head's next window: the tokens after the oldest, and room for others.
// The last groups instead find the largest magnitude of a sequence's oldest tokens, which leave the window.
const uint thread_id = thread_position_in_threadgroup.x, group = threadgroup_position_in_grid.x;
const uint batch_size = keys_shape[0], heads = keys_shape[1], copies = 2 * batch_size * heads;
const bool of_keys = group % 2 == 0;
const uint own = (group < copies ? group : group - copies) / 2, batch = group < copies ? own / heads : own;
const uint oldest = counts[0], left = counts[1] - oldest, room = ROOM;

threadgroup float found[THREADS / 32];

if (group < copies) {
  const uint head = own % heads;
  if (of_keys) {
    slide<KEY_DIM>(
        keys + batch * keys_strides[0] + head * keys_strides[1] + oldest * keys_strides[2], keys_strides[2], left,
        room, thread_id, next_keys + own * room * KEY_DIM);
  } else {
    slide<VALUE_DIM>(
        values + batch * values_strides[0] + head * values_strides[1] + oldest * values_strides[2], values_strides[2],
        left, room, thread_id, next_values + own * room * VALUE_DIM);
  }
} else {
  float most = 0.0f;
  for (uint head = 0; head < heads; head++) {
    most = of_keys ? largest_in<KEY_DIM>(
                         keys + batch * keys_strides[0] + head * keys_strides[1], keys_strides[2], oldest, thread_id, most)
                   : largest_in<VALUE_DIM>(
                         values + batch * values_strides[0] + head * values_strides[1], values_strides[2], oldest, thread_id,
                         most);
  }
  UNROLL for (uint step = 16; step > 0; step /= 2) most = larger(most, simd_shuffle_xor(most, step));
  if (thread_id % 32 == 0) found[thread_id / 32] = most;
  group_barrier();
  if (thread_id == 0) {
    for (uint i = 1; i < THREADS / 32; i++) most = larger(most, found[i]);
    (of_keys ? largest_key : largest_value)[batch] = most;
  }
}
