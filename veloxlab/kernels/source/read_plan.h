// Scalar codes with a width of each coordinate's own, which is data: one row of bits, coordinate after coordinate.

// What is known of a coordinate, in one word: where its code begins (13 bits), its width (4), its first level.
FUNCTION uint planned_first(uint planned) { return planned & 8191u; }
FUNCTION uint planned_width(uint planned) { return planned >> 13 & 15u; }
FUNCTION uint planned_level(uint planned) { return planned >> 17; }

// Where something of a coordinate lies in threadgroup memory: shares of a vector that begin together in no bank.
FUNCTION uint planned_place(uint coordinate) { return coordinate + coordinate / 32; }

// Copies to threadgroup memory what all vectors of a head need: the plan, the levels of all widths, COPIES times, and what
// levels are multiplied with and what is added to them.
template <int DIM, int LEVELS, int COPIES>
FUNCTION void fill_plan(
    local_memory uint* plan,
    local_memory float* levels,
    local_memory float* factors,
    local_memory float* shifts,
    const global_memory uint* given,      // [DIM], then the bits of the levels
    const global_memory float* given_fit, // [DIM][2]
    uint thread_id,
    uint threads) {
  for (uint i = thread_id; i < DIM; i += threads) {
    plan[planned_place(i)] = given[i];
    factors[planned_place(i)] = given_fit[2 * i], shifts[planned_place(i)] = given_fit[2 * i + 1];
  }
  const global_memory float* given_levels = (const global_memory float*)(given + DIM);
  for (uint i = thread_id; i < LEVELS; i += threads) {
    for (uint c = 0; c < COPIES; c++) levels[i * COPIES + (c + i) % COPIES] = given_levels[i];
  }
}

template <int ROW_WORDS, int COPIES, class ScalesOf>
struct PlanReader {
  typedef ScalesOf Scales;
  const global_memory uint* rows;
  uint token_stride;
  Scales scales;
  const local_memory uint* plan;
  const local_memory float* levels;
  const local_memory float* factors;
  const local_memory float* shifts;
  uint own; // copy

  FUNCTION void advance(uint tokens) { rows += size_t(tokens) * token_stride, scales.advance(tokens); }

  // at most 8 bits a coordinate
  template <int WIDTH>
  struct Fetched {
    uint words[(WIDTH + 3) / 4 < ROW_WORDS ? (WIDTH + 3) / 4 : ROW_WORDS];
  };

  template <int WIDTH>
  FUNCTION void fetch(int distance, uint share, thread Fetched<WIDTH>& to) const {
    constexpr int count = (WIDTH + 3) / 4 < ROW_WORDS ? (WIDTH + 3) / 4 : ROW_WORDS;
    const uint first = planned_first(plan[planned_place(share * WIDTH)]);
    const uint last = plan[planned_place(share * WIDTH + WIDTH - 1)];
    load_some<count>(
        rows + distance * int(token_stride), first, planned_first(last) + planned_width(last) - first, to.words);
  }

  template <int WIDTH>
  FUNCTION void decode(thread const Fetched<WIDTH>& from, uint share, thread pair_t (&x)[WIDTH / 2]) const {
    constexpr int count = (WIDTH + 3) / 4 < ROW_WORDS ? (WIDTH + 3) / 4 : ROW_WORDS;
    constexpr int together = WIDTH % 4 == 0 ? 4 : 2; // coordinates whose codes are in a word, whatever their widths
    uint words[count];
    UNROLL for (int i = 0; i < count; i++) words[i] = from.words[i];
    uint begin = planned_first(plan[planned_place(share * WIDTH)]);
    UNROLL for (int i = 0; i < WIDTH; i += together) {
      float y[together];
      uint end = begin;
      UNROLL for (int j = 0; j < together; j++) {
        const uint place = planned_place(share * WIDTH + i + j), planned = plan[place], width = planned_width(planned);
        const uint code = words[0] >> (planned_first(planned) - begin) & ((1u << width) - 1u);
        y[j] = levels[(planned_level(planned) + code) * COPIES + own] * factors[place] + shifts[place];
        end = planned_first(planned) + width;
      }
      UNROLL for (int j = 0; j < together; j += 2) x[(i + j) / 2] = make_pair(y[j], y[j + 1]);
      drop_bits<count>(words, end - begin);
      begin = end;
    }
  }
};
