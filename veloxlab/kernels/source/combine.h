// The join of a row's splits by simdgroups. A split has SPLIT_ROW numbers: its mixed values, at LARGEST_VALUE the largest score
// in log2, and then the sum of its weights.

#define NO_LOGIT -3.0e38f

struct Softmax {
  float largest, total;
};

// Over all splits of a row, and a logit that has no value, or NO_LOGIT.
FUNCTION Softmax softmax_of(const global_memory float* row, uint splits, float logit, uint lane) {
  Softmax own = {-1.0e30f, 0.0f};
  for (uint s = lane; s < splits; s += 32) {
    const float largest = row[s * SPLIT_ROW + LARGEST_VALUE], total = row[s * SPLIT_ROW + LARGEST_VALUE + 1];
    const float more = largest > own.largest ? largest : own.largest;
    own.total = own.total * exponential2(own.largest - more) + total * exponential2(largest - more);
    own.largest = more;
  }
  const float most = largest_of<32>(own.largest), largest = logit > most ? logit : most;
  const float total = total_of<32>(own.total * exponential2(own.largest - largest));
  return {largest, total + exponential2(logit - largest)};
}

// The sum of the mixed values of every `step`-th split; a lane has its share of a vector, as in lanes.h.
template <int DIM>
FUNCTION void sum_splits(
    const global_memory float* row, uint begin, uint end, uint step, float largest, uint lane,
    thread float (&x)[Lanes<DIM>::each]) {
  UNROLL for (int i = 0; i < Lanes<DIM>::each; i++) x[i] = 0.0f;
  UNROLL_EIGHT for (uint s = begin; s < end; s += step) {
    const global_memory float* split = row + s * SPLIT_ROW;
    const float factor = exponential2(split[LARGEST_VALUE] - largest);
    UNROLL for (int i = 0; i < Lanes<DIM>::each; i++) x[i] += factor * split[i * Lanes<DIM>::count + lane % Lanes<DIM>::count];
  }
}

// Such a share to threadgroup memory, added to what is there or in its place; and back.
template <int DIM>
FUNCTION void add_lanes(thread const float (&x)[Lanes<DIM>::each], uint lane, bool first, local_memory float* to) {
  if (lane >= Lanes<DIM>::count) return;
  UNROLL for (int i = 0; i < Lanes<DIM>::each; i++) {
    local_memory float& place = to[i * Lanes<DIM>::count + lane];
    place = first ? x[i] : place + x[i];
  }
}
template <int DIM>
FUNCTION void read_lanes(const local_memory float* from, uint lane, thread float (&x)[Lanes<DIM>::each]) {
  UNROLL for (int i = 0; i < Lanes<DIM>::each; i++) x[i] = from[i * Lanes<DIM>::count + lane % Lanes<DIM>::count];
}

// The packed part, rotated back, is added to the exact part.
template <int DIM>
FUNCTION void add_rotated(
    thread const float (&coded)[Lanes<DIM>::each], thread const float (&hartley)[Blocks<DIM>::count],
    const global_memory float* signs, uint lane, thread float (&plain)[Lanes<DIM>::each]) {
  float x[Lanes<DIM>::each];
  UNROLL for (int i = 0; i < Lanes<DIM>::each; i++) x[i] = coded[i];
  spread_lanes<DIM>(x, hartley, lane % Lanes<DIM>::count);
  UNROLL for (int i = 0; i < Lanes<DIM>::each; i++) {
    plain[i] += x[i] * signs[i * Lanes<DIM>::count + lane % Lanes<DIM>::count];
  }
}
