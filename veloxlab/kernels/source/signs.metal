// One threadgroup: a simdgroup for each of VECTORS vectors, which are given twice: x [B, H, S, HEAD_DIM] has the size, and of its
// projections y [B, H, S, ROWS] only signs are kept, a bit that is 1 from 0 upwards. The root of x's root-mean-square is stored.
const uint thread_id = thread_position_in_threadgroup.x, lane = thread_id % 32;
const uint heads = x_shape[1], tokens = x_shape[2], vectors = x_shape[0] * heads * tokens;
const uint vector = threadgroup_position_in_grid.x * VECTORS + thread_id / 32;

// past the last vector lanes take part in what the simdgroup does together, and write nothing
const uint at = vector < vectors ? vector : vectors - 1;
const uint batch = at / (heads * tokens), head = at / tokens % heads, token = at % tokens;
const global_memory IN_TYPE* own_x = x + batch * x_strides[0] + head * x_strides[1] + token * x_strides[2];
const global_memory float* own_y = y + batch * y_strides[0] + head * y_strides[1] + token * y_strides[2];

float total = 0.0f;
for (uint i = lane; i < HEAD_DIM; i += 32) {
  const float number = as_float(own_x[i * x_strides[3]]);
  total += number * number;
}
total = total_of<32>(total);
if (vector < vectors && lane == 0) root_rms[vector] = half(square_root(square_root(total) / square_root(float(HEAD_DIM))));
for (uint w = 0; w < CODE_WORDS; w++) {
  const uint row = 32 * w + lane;
  const bool positive = row < ROWS && own_y[(row < ROWS ? row : 0) * y_strides[3]] >= 0.0f;
  const uint word = union_of<32>(positive ? 1u << lane : 0u);
  if (vector < vectors && lane == 0) signs[vector * CODE_WORDS + w] = word;
}
