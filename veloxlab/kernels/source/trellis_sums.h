// What attention has besides levels of a trellis: of scores a key's mean before RoPE, or after it, of values their mean.

// A query's number: after a rotation with another one half precision still holds it.
FUNCTION float in_half(float x) { return x > 46300.0f ? 46300.0f : (x < -46300.0f ? -46300.0f : x); }

// q · R_t μ, which is Σ a cos + b sin over the pairs that RoPE turns at a token's position. With the query rotated to the
// first token of a product, angles are those from that token on, the same for all products. A quarter of a row of queries
// has a quarter of the pairs, of two pairs a a b b after each other.
template <int DIM>
FUNCTION uint turned_place(uint i) { // i is cosines of all pairs, then sines
  constexpr uint pairs = DIM / 2, quarter = DIM / 8;
  const uint pair = i % pairs, own = pair % quarter;
  return pair / quarter * (DIM / 4) + own / 2 * 4 + i / pairs * 2 + own % 2;
}

// Behind the rows of queries lies, of two pairs each, how often they turn round in a position, x and y, and corrections, z
// and w. Then come, for each lane, cosines and sines of two pairs of its quarter: c c of each of its tokens, then s s.
template <int DIM>
FUNCTION constexpr uint turns_place() { return PADDED_ROWS * QUERY_LENGTH(DIM) * sizeof(query_t) / 16; }

template <int DIM>
FUNCTION void fill_turns(local_memory float4* queries, const global_memory float* angles, uint thread_id, uint threads) {
  local_memory float4* turns = queries + turns_place<DIM>();
  local_memory half* table = (local_memory half*)(turns + DIM / 4);
  for (uint i = thread_id; i < DIM / 2; i += threads) {
    const float by = 0.15915494309189535f, rest = 6.4206383e-9f, whole = angles[i] * by; // 1 / 2π in two parts
    local_memory float* turn = (local_memory float*)(turns + i / 2) + i % 2;
    turn[0] = whole, turn[2] = multiply_add(angles[i], by, -whole) + angles[i] * rest;
  }
  for (uint i = thread_id; i < 4 * SCORE_OWN * DIM; i += threads) {
    constexpr uint each = 2 * SCORE_OWN;
    const uint lane = i / each % 32, pair = score_quarter(lane) * (DIM / 8) + i / each / 32 * 2 + i % 2;
    const float angle = small_angle(float(score_token(lane) + SCORE_DISTANCE(i % each / 2)) * angles[pair]);
    table[i / each * each + i] = half(small_cosine(angle)), table[i / each * each + i + each] = half(small_sine(angle));
  }
}

// The angle −π … π after so many positions.
FUNCTION float turned_by(float position, float turn, float correction) {
  const float whole = nearest_turn(position * turn);
  return (multiply_add(position, turn, -whole) + position * correction) * 6.283185307f;
}

template <int DIM>
struct TurnsAdded {
  const local_memory float4* queries; // rows as `query_at` and `turned_place` say, then what `fill_turns` gives
  local_memory query_t* turned;       // the simdgroup's: c c s s of two pairs at a product's first token, as a row of queries
  int before;                         // positions before token 0

  FUNCTION void add(thread Scores& scores, uint token, uint lane) const {
    constexpr uint steps = DIM / 16;
    const local_memory float4* turns = queries + turns_place<DIM>();
    const local_memory half* table = (const local_memory half*)(turns + DIM / 4) + lane * (4 * SCORE_OWN);
    const float position = float(int(token - score_token(lane)) + before);
    simd_barrier();
    UNROLL for (uint first = 0; first < 4 * steps; first += 32) {
      const uint i = first + lane;
      if (4 * steps % 32 != 0 && i >= 4 * steps) continue;
      const float4 turn = turns[i];
      const float x = turned_by(position, turn.x, turn.z), y = turned_by(position, turn.y, turn.w);
      put_four(turned + 4 * (i + i / steps), small_cosine(x), small_cosine(y), small_sine(x), small_sine(y));
    }
    simd_barrier();
    UNROLL for (uint i = 0; i < steps; i++) {
      scores.add_turned(
          table + i * (128 * SCORE_OWN), (const local_memory query_t*)queries, turned,
          QUERY_LENGTH(DIM), DIM / 4 + 4, i, lane);
    }
  }
};

// The same for all tokens: of each row of queries.
struct RowAdded {
  const local_memory float* of_rows; // [PADDED_ROWS]

  FUNCTION void add(thread Scores& scores, uint, uint lane) const {
    UNROLL for (int own = 0; own < SCORE_OWN; own++) {
      UNROLL for (int r = 0; r < LANE_ROWS; r++) scores.sum[own * LANE_ROWS + r] += of_rows[score_row(lane, r)];
    }
  }
};

// A mean of values, which is added once. They are in the order of their string.
template <int DIM>
struct ShiftedSum {
  const global_memory float* shifts;
  const global_memory uint* windows;

  FUNCTION uint place(uint coordinate) const { return DIM - 1 - coordinate; }
  FUNCTION float number(uint coordinate, float sum, float total) const {
    return (windows[4 * coordinate + 3] == 0u ? 0.0f : sum) + (shifts == 0 ? 0.0f : total * shifts[coordinate]);
  }
};
