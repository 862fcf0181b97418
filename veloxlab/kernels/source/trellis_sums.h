// What attention has besides levels of a trellis: of scores a key's mean before RoPE, or after it, of values their mean.

// q · R_t μ, which is Σ a cos + b sin over the pairs that RoPE turns at a token's position. A quarter of a row of queries has
// a quarter of the pairs, of two pairs a a b b after each other.
template <int DIM>
FUNCTION uint turned_place(uint i) { // i is cosines of all pairs, then sines
  constexpr uint pairs = DIM / 2, quarter = DIM / 8;
  const uint pair = i % pairs, own = pair % quarter;
  return pair / quarter * (DIM / 4) + own / 2 * 4 + i / pairs * 2 + own % 2;
}

template <int DIM>
struct TurnsAdded {
  const local_memory float* queries; // as `query_at` and `turned_place` say
  const local_memory float* angles;  // of each pair, for one position
  float start;                       // position of the first token
  uint first;                        // that token

  FUNCTION void add(thread Scores& scores, uint token, uint lane) const {
    constexpr int quarter = DIM / 4, parts = 2 / SCORE_PAIRS;
    const local_memory float* own = angles + score_quarter(lane) * (DIM / 8);
    UNROLL for (int i = 0; i < DIM / 16; i++) {
      pair_t both[SCORE_OWN][2];
      UNROLL for (int t = 0; t < SCORE_OWN; t++) {
        const float position = start + float(token + SCORE_DISTANCE(t) - first);
        const float x = small_angle(position * own[2 * i]), y = small_angle(position * own[2 * i + 1]);
        both[t][0] = make_pair(small_cosine(x), small_cosine(y)), both[t][1] = make_pair(small_sine(x), small_sine(y));
      }
      UNROLL for (int k = 0; k < parts; k++) {
        pair_t some[SCORE_OWN][SCORE_PAIRS];
        UNROLL for (int t = 0; t < SCORE_OWN; t++) {
          UNROLL for (int p = 0; p < SCORE_PAIRS; p++) some[t][p] = both[t][k * SCORE_PAIRS + p];
        }
        scores.add(some, query_part(queries, QUERY_LENGTH(DIM), quarter + 4, i * parts + k, lane));
      }
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
