// Packed tokens begin .. end of a KV head, decoded: four lanes share a vector, each with a quarter of its coordinates.
template <int DIM, class Codes>
FUNCTION void expand(
    thread const Codes& codes,
    const global_memory float* signs,
    uint begin,
    uint end,
    uint thread_id,
    global_memory OUT_TYPE* to) { // where token 0 goes
  constexpr int QUARTER = DIM / 4, LINE = 16 / int(sizeof(OUT_TYPE));
  const uint share = thread_id % 4;
  for (uint first = begin; first < end; first += THREADS / 4) {
    const uint wanted = first + thread_id / 4, token = wanted < end ? wanted : end - 1; // no lane may leave its simdgroup
    Codes reader = codes;
    reader.advance(token);
    typename Codes::template Fetched<QUARTER> fetched;
    pair_t pairs[QUARTER / 2];
    reader.template fetch<QUARTER>(0, share, fetched);
    reader.template decode<QUARTER>(fetched, share, pairs);
    const float scale = Codes::Scales::decode(reader.scales.fetch(0)) * (1.0f / square_root(float(DIM)));
    float x[QUARTER];
    UNROLL for (int i = 0; i < QUARTER / 2; i++) {
      const float2 both = pair_floats(pairs[i]);
      x[2 * i] = both.x, x[2 * i + 1] = both.y;
    }
    UNROLL for (int step = 1; step < QUARTER; step *= 2) {
      UNROLL for (int i = 0; i < QUARTER; i++) {
        if ((i & step) == 0) {
          const float a = x[i], b = x[i + step];
          x[i] = a + b, x[i + step] = a - b;
        }
      }
    }
    UNROLL for (uint step = 1; step < 4; step *= 2) {
      const float sign = (share & step) == 0 ? 1.0f : -1.0f;
      UNROLL for (int i = 0; i < QUARTER; i++) x[i] = simd_shuffle_xor(x[i], step) + sign * x[i];
    }
    global_memory OUT_TYPE* row = to + size_t(token) * DIM + share * QUARTER;
    UNROLL for (int line = 0; line < QUARTER / LINE; line++) {
      alignas(16) OUT_TYPE some[LINE];
      UNROLL for (int i = 0; i < LINE; i++) {
        const int at = line * LINE + i;
        float y = x[at] * scale * signs[share * QUARTER + at];
        y = y > LARGEST ? LARGEST : y;
        some[i] = OUT_TYPE(y < -LARGEST ? -LARGEST : y);
      }
      if (wanted < end) ((global_memory uint4*)row)[line] = *(thread const uint4*)some;
    }
  }
}
