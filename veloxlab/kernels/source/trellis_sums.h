// What attention has besides levels of a trellis: of scores a key's mean before RoPE, or after it, of values their mean.

FUNCTION float in_half(float x) { return x > 65504.0f ? 65504.0f : (x < -65504.0f ? -65504.0f : x); }

// q · R_t μ, which is Σ a cos + b sin over the pairs that RoPE turns at a token's position. A quarter of a row of queries has
// a quarter of the pairs, of two pairs a a b b after each other.
template <int DIM>
FUNCTION uint turned_place(uint i) { // i is cosines of all pairs, then sines
  constexpr uint pairs = DIM / 2, quarter = DIM / 8;
  const uint pair = i % pairs, own = pair % quarter;
  return pair / quarter * (DIM / 4) + own / 2 * 4 + i / pairs * 2 + own % 2;
}

// What is known of a pair: how often it turns round in a position, and a correction; cosine and sine of the angle between two
// tokens of a lane. Those of a quarter begin in a bank of their own.
template <int DIM>
FUNCTION uint turn_place(uint pair) { return pair + pair / (DIM / 8); }

template <int DIM>
FUNCTION void fill_turns(local_memory float4* turns, const global_memory float* angles, uint thread_id, uint threads) {
  for (uint i = thread_id; i < DIM / 2; i += threads) {
    const float by = 0.15915494309189535f, rest = 6.4206383e-9f, whole = angles[i] * by; // 1 / 2π in two parts
    const float between = small_angle(angles[i] * float(SCORE_DISTANCE(1)));
    local_memory float4& turn = turns[turn_place<DIM>(i)];
    turn.x = whole, turn.y = cosine(between), turn.z = sine(between);
    turn.w = multiply_add(angles[i], by, -whole) + angles[i] * rest;
  }
}

// The angle −π … π after so many positions.
FUNCTION float turned_by(float position, float turn, float correction) {
  const float whole = nearest_turn(position * turn);
  return (multiply_add(position, turn, -whole) + position * correction) * 6.283185307f;
}

template <int DIM>
struct TurnsAdded {
  const local_memory float* queries; // as `query_at` and `turned_place` say
  const local_memory float4* turns;
  float start; // position of the first token
  uint first;  // that token

  FUNCTION void add(thread Scores& scores, uint token, uint lane) const {
    constexpr int quarter = DIM / 4, parts = 2 / SCORE_PAIRS;
    const local_memory float4* own = turns + turn_place<DIM>(score_quarter(lane) * (DIM / 8));
    const float position = start + float(token - first);
    UNROLL for (int i = 0; i < DIM / 16; i++) {
      const float4 a = own[2 * i], b = own[2 * i + 1];
      const float x = turned_by(position, a.x, a.w), y = turned_by(position, b.x, b.w);
      float cos_x = small_cosine(x), sin_x = small_sine(x), cos_y = small_cosine(y), sin_y = small_sine(y);
      pair_t both[SCORE_OWN][2];
      UNROLL for (int t = 0; t < SCORE_OWN; t++) {
        both[t][0] = small_pair(cos_x, cos_y), both[t][1] = small_pair(sin_x, sin_y);
        const float next_x = cos_x * a.y - sin_x * a.z, next_y = cos_y * b.y - sin_y * b.z;
        sin_x = sin_x * a.y + cos_x * a.z, sin_y = sin_y * b.y + cos_y * b.z;
        cos_x = next_x, cos_y = next_y;
      }
      UNROLL for (int k = 0; k < parts; k++) {
        pair_t some[SCORE_OWN][SCORE_PAIRS];
        UNROLL for (int t = 0; t < SCORE_OWN; t++) {
          UNROLL for (int p = 0; p < SCORE_PAIRS; p++) some[t][p] = both[t][k * SCORE_PAIRS + p];
        }
        scores.add(some, small_query_part(queries, QUERY_LENGTH(DIM), quarter + 4, i * parts + k, lane));
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
