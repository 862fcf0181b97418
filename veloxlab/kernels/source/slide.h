// The next window of a head, and magnitudes of tokens.

template <int DIM, typename T>
FUNCTION void slide(
    const global_memory T* from, // the oldest token that stays
    uint stride,
    uint left,
    uint room,
    uint thread_id,
    global_memory T* to) {
  for (uint i = thread_id; i < room * DIM; i += THREADS) {
    const uint token = i / DIM, coordinate = i % DIM;
    to[i] = token < left ? from[token * stride + coordinate] : T(0.0f);
  }
}

// NaN if one of them is.
FUNCTION float larger(float x, float y) { return x > y || x != x ? x : y; }

template <int DIM, typename T>
FUNCTION float largest_in(const global_memory T* rows, uint stride, uint tokens, uint thread_id, float most) {
  for (uint i = thread_id; i < tokens * DIM; i += THREADS) {
    const float x = as_float(rows[i / DIM * stride + i % DIM]);
    most = larger(x < 0.0f ? -x : x, most);
  }
  return most;
}
