// Levels that are looked up by the last bits of a string: 256 or 1,024 STATES of each width of 1 to 8 bits. A coordinate's
// own bits are the highest of its state. The widths of a head's coordinates are data. A string begins with the last
// coordinate: what is called the i-th here is the i-th of the string.

// What is known of all vectors of a head lies in threadgroup memory: at which bit of a row each coordinate's code ends, and
// how its state becomes a level. Of TOGETHER neighbours the first says how many bits are dropped behind them (6 bits), others
// by how many bits they end behind the first (5 bits); above a state is the number of the coordinate's width.
FUNCTION uint ends_place(uint coordinate) { return coordinate + coordinate / 32; }     // shares of a vector begin together
FUNCTION constexpr uint planned_four(uint coordinate) { return coordinate + coordinate / 32 * 4; } // in no bank
template <int WIDTH>
FUNCTION uint planned_at(uint share, uint i) { // what the share adds is found once, where it can be
  return 32 % WIDTH == 0 || WIDTH % 32 == 0 ? planned_four(share * WIDTH) + planned_four(i) : planned_four(share * WIDTH + i);
}

// A coordinate as it is given, four numbers: where the bits of its state begin, their mask, by how much they are shifted up,
// and the first level of its width, 0 for no bits.
template <int DIM>
FUNCTION const global_memory uint* window_of(const global_memory uint* windows, uint i) { return windows + 4 * (DIM - 1 - i); }
template <int STATES, int REACH, int ALONE>
FUNCTION uint end_of(const global_memory uint* window) {
  const uint width = window[3] / STATES;
  return window[0] + (width == 0 ? 0u : ALONE ? width : REACH - window[2]);
}
template <int DIM, int STATES, int REACH, int ALONE>
FUNCTION uint begin_of(const global_memory uint* windows) { // the string's
  const global_memory uint* window = window_of<DIM>(windows, 0);
  return end_of<STATES, REACH, ALONE>(window) - window[3] / STATES;
}

template <int DIM, int STATES, int REACH, int ALONE, int TOGETHER>
FUNCTION void fill_windows(
    local_memory uint* plan, local_memory uint* ends, const global_memory uint* windows, uint thread_id, uint threads) {
  for (uint i = thread_id; i < DIM; i += threads) {
    const uint first = i / TOGETHER * TOGETHER, next = first + TOGETHER < DIM ? first + TOGETHER : first;
    const uint end = end_of<STATES, REACH, ALONE>(window_of<DIM>(windows, i));
    const uint begin = end_of<STATES, REACH, ALONE>(window_of<DIM>(windows, first));
    const uint width = window_of<DIM>(windows, i)[3] / STATES, row = width > 1 ? width - 1 : 0;
    const uint dropped = end_of<STATES, REACH, ALONE>(window_of<DIM>(windows, next)) - begin;
    ends[ends_place(i)] = end;
    plan[planned_four(i)] = (i == first ? dropped : end - begin) | row * STATES;
  }
}

// Levels of single coordinates that are coded alone are looked up by their bits alone.
template <int STATES, int ALONE>
FUNCTION uint given_level(uint entry) {
  const uint width = entry / STATES + 1, state = entry % STATES;
  return width * STATES + (ALONE ? state >> (8 - width) : state);
}

template <int STATES, int ALONE, int WIDTHS, int COPIES, int APART>
FUNCTION void fill_levels(local_memory half* levels, const global_memory float* given, uint thread_id, uint threads) {
  for (uint i = thread_id; i < WIDTHS * STATES; i += threads) {
    const half level = half(given[given_level<STATES, ALONE>(i)]);
    for (uint c = 0; c < COPIES; c++) levels[(i * COPIES + (c + i) % COPIES) * APART] = level;
  }
}

// Levels of the first WIDTHS widths in threadgroup memory, each COPIES times, so that lanes meet in fewer banks: of 32 copies
// that are APART by two, a bank's width, in none.
template <int EACH>
struct SharedLevels {
  place_t table; // the lane's copy, of which each level is EACH from the next

  FUNCTION pair_t pair(uint first, uint second) const {
    return pair_of(half_at(table, first * (2 * EACH)), half_at(table, second * (2 * EACH)));
  }
};

template <int STATES, int ALONE>
struct GlobalLevels {
  const global_memory float* given;

  FUNCTION pair_t pair(uint first, uint second) const {
    return make_pair(given[given_level<STATES, ALONE>(first)], given[given_level<STATES, ALONE>(second)]);
  }
};

// A scale is 4 bits of a row, a quarter of its binary logarithm.
struct RowScales {
  const global_memory uint* rows;
  uint token_stride;
  uint shift;

  struct Fetched {
    uint word, shift;
  };
  FUNCTION void advance(uint tokens) { rows += size_t(tokens) * token_stride; }
  FUNCTION Fetched fetch(int distance) const {
    Fetched found;
    found.word = rows[distance * int(token_stride)], found.shift = shift;
    return found;
  }
  static FUNCTION float decode(Fetched found) { return exponential2(0.25f * float(found.word >> found.shift & 15u)); }
};

// No share of a vector has more than MOST bits a coordinate on average. A coordinate without bits gets some level: what is
// multiplied with it has to be 0.
template <int DIM, int STATES, int REACH, int MOST, class Levels>
struct TrellisReader {
  typedef RowScales Scales;
  const global_memory uint* rows; // with all heads
  uint token_stride;
  Scales scales;
  const local_memory uint* plan;
  const local_memory uint* ends;
  uint begin; // bit of a row where the head's string begins
  Levels levels;

  FUNCTION void advance(uint tokens) { rows += size_t(tokens) * token_stride, scales.advance(tokens); }

  // words as they are stored: they are moved when they have come
  template <int WIDTH>
  struct Fetched {
    uint words[(WIDTH * MOST + REACH + 31) / 32 + 1];
  };

  template <int WIDTH>
  FUNCTION void fetch(int distance, uint share, thread Fetched<WIDTH>& to) const {
    const global_memory uint* row = rows + distance * int(token_stride);
    // below 0 where few bits are before the first string
    const int first = int(ends[ends_place(share * WIDTH)]) - REACH;
    const int last = int(ends[ends_place(share * WIDTH + WIDTH - 1)]) - 1, word = first >> 5;
    to.words[0] = row[word < 0 ? 0 : word]; // all of it is before the string's begin then
    UNROLL for (int i = 1; i < (WIDTH * MOST + REACH + 31) / 32 + 1; i++) {
      to.words[i] = 32 * (word + i) <= last ? row[word + i] : 0u;
    }
  }

  template <int WIDTH>
  FUNCTION void decode(thread const Fetched<WIDTH>& from, uint share, thread pair_t (&x)[WIDTH / 2]) const {
    constexpr int count = (WIDTH * MOST + REACH + 31) / 32;
    constexpr int together = WIDTH % 4 == 0 ? 4 : 2; // coordinates whose states are in two words, whatever their widths
    constexpr uint state_bits = STATES - 1;
    const uint first = ends[ends_place(share * WIDTH)], shift = first - REACH & 31u;
    // bits that are before the string's begin
    const uint before = first - begin < REACH ? REACH - (first - begin) : 0u;
    uint words[count + 1];
    UNROLL for (int i = 0; i < count; i++) words[i] = funnel(from.words[i], from.words[i + 1], shift);
    words[0] &= ~0u << before;
    words[count] = 0u;
    UNROLL for (int i = 0; i < WIDTH; i += together) {
      uint planned[4], entry[4];
      if (together == 4) {
        const uint4 four = *(const local_memory uint4*)(plan + planned_at<WIDTH>(share, i));
        planned[0] = four.x, planned[1] = four.y, planned[2] = four.z, planned[3] = four.w;
      } else {
        planned[0] = plan[planned_at<WIDTH>(share, i)], planned[1] = plan[planned_at<WIDTH>(share, i + 1)];
      }
      UNROLL for (int j = 0; j < together; j++) {
        const uint state = j == 0 ? words[0] : funnel_low(words[0], words[1], planned[j]);
        entry[j] = STATES == 256 ? with_byte(state, planned[j]) : (state & state_bits) | (planned[j] & ~state_bits);
      }
      UNROLL for (int j = 0; j < together; j += 2) x[(i + j) / 2] = levels.pair(entry[j], entry[j + 1]);
      UNROLL for (int k = 0; k < count; k++) { // of what is left no coordinate has more than 8 bits
        if (32 * k < REACH + 8 * (WIDTH - i - together - 1)) words[k] = funnel(words[k], words[k + 1], planned[0] & 63u);
      }
    }
  }
};

// An angle of up to 400,000 radians, brought to −π … π.
FUNCTION float small_angle(float angle) {
  const float turns = nearest_turn(angle * 0.15915494309189535f);
  // 2π in three parts, of which the first two have few bits
  return ((angle - turns * 6.28125f) - turns * 0.0019350051879882812f) - turns * 3.019916e-7f;
}
