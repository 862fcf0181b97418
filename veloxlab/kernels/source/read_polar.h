// Radii, and angles of a binary tree above each block of coordinates: a coordinate is the radius of its block by a cosine or
// a sine of one angle of every level. Level 1 has an angle for two coordinates, and so on. The codes of levels of one width
// are in one row of bytes, level after level; there are two rows at most.

// Widths come as digits of 4 bits, level 1 in the lowest.
FUNCTION constexpr int angle_bits(uint widths, int level) { return int(widths >> (4 * (level - 1)) & 15u); }

// Codes of lower levels, from `from` on, in the same row.
FUNCTION constexpr int codes_before(uint widths, int dim, int level, int from) {
  return from >= level ? 0
                       : (angle_bits(widths, from) == angle_bits(widths, level) ? dim >> from : 0) +
          codes_before(widths, dim, level, from + 1);
}

FUNCTION constexpr int entries_before(uint widths, int level) {
  return level <= 1 ? 0 : (1 << angle_bits(widths, level - 1)) + entries_before(widths, level - 1);
}

// Where a level's codes begin in their row, and its angles among all.
template <uint WIDTHS, int DIM, int LEVEL>
struct AngleLevel {
  enum {
    bits = angle_bits(WIDTHS, LEVEL),
    in_first_row = bits == angle_bits(WIDTHS, 1),
    first_bit = codes_before(WIDTHS, DIM, LEVEL, 1) * bits,
    first_entry = entries_before(WIDTHS, LEVEL)
  };
};

// Cosine and sine of every angle, in threadgroup memory COPIES times, or where they came from.
template <int COPIES>
struct SharedCircles {
  const local_memory float* entries;
  uint own; // copy

  FUNCTION float cosine_of(uint entry) const { return entries[2 * (entry * COPIES + own)]; }
  FUNCTION float sine_of(uint entry) const { return entries[2 * (entry * COPIES + own) + 1]; }
};

struct GlobalCircles {
  const global_memory float* entries;

  FUNCTION float cosine_of(uint entry) const { return entries[2 * entry]; }
  FUNCTION float sine_of(uint entry) const { return entries[2 * entry + 1]; }
};

// Levels 1 … LEVEL of WIDTH coordinates, whole trees of them: their codes, and what they make of the radii of the trees.
template <uint WIDTHS, int DIM, int WIDTH, int LEVEL>
struct Angles {
  typedef AngleLevel<WIDTHS, DIM, LEVEL> Own;
  enum { bits = Own::bits, nodes = WIDTH >> LEVEL };

  template <int LEVELS, int WORDS>
  static FUNCTION void fetch(
      const global_memory uchar* row, const global_memory uchar* other, uint share, thread uint (&words)[LEVELS][WORDS]) {
    load_bytes<nodes * bits>(
        Own::in_first_row ? row : other, uint(Own::first_bit) + share * (nodes * bits), words[LEVEL - 1]);
    Angles<WIDTHS, DIM, WIDTH, LEVEL - 1>::fetch(row, other, share, words);
  }

  template <int LEVELS, int WORDS, class Circles>
  static FUNCTION void grow(
      thread const Circles& circles, thread const uint (&words)[LEVELS][WORDS], thread float (&x)[WIDTH]) {
    UNROLL for (int node = nodes - 1; node >= 0; node--) { // in place: from the last on
      const uint entry = uint(Own::first_entry) + bits_at(words[LEVEL - 1], node * bits, bits);
      const float radius = x[node];
      x[2 * node + 1] = radius * circles.sine_of(entry);
      x[2 * node] = radius * circles.cosine_of(entry);
    }
    Angles<WIDTHS, DIM, WIDTH, LEVEL - 1>::grow(circles, words, x);
  }
};

template <uint WIDTHS, int DIM, int WIDTH>
struct Angles<WIDTHS, DIM, WIDTH, 0> {
  template <int LEVELS, int WORDS>
  static FUNCTION void fetch(
      const global_memory uchar*, const global_memory uchar*, uint, thread uint (&)[LEVELS][WORDS]) {}
  template <int LEVELS, int WORDS, class Circles>
  static FUNCTION void grow(thread const Circles&, thread const uint (&)[LEVELS][WORDS], thread float (&)[WIDTH]) {}
};

// COUNT levels from LEVEL on, of the one angle of each that is above a coordinate.
template <uint WIDTHS, int DIM, int LEVEL, int COUNT>
struct AnglesAbove {
  typedef AngleLevel<WIDTHS, DIM, LEVEL> Own;

  static FUNCTION void fetch(
      const global_memory uchar* row, const global_memory uchar* other, uint coordinate, thread uint* entries) {
    const uint at = uint(Own::first_bit) + (coordinate >> LEVEL) * Own::bits, shift = at % 8;
    const global_memory uchar* byte = (Own::in_first_row ? row : other) + at / 8;
    uint code = uint(byte[0]) >> shift;
    if (shift + Own::bits > 8) code |= uint(byte[1]) << (8 - shift);
    entries[0] = uint(Own::first_entry) + (code & ((1u << Own::bits) - 1u));
    AnglesAbove<WIDTHS, DIM, LEVEL + 1, COUNT - 1>::fetch(row, other, coordinate, entries + 1);
  }
};

template <uint WIDTHS, int DIM, int LEVEL>
struct AnglesAbove<WIDTHS, DIM, LEVEL, 0> {
  static FUNCTION void fetch(const global_memory uchar*, const global_memory uchar*, uint, thread uint*) {}
};

template <uint WIDTHS, int LEVELS, int DIM, class Circles>
struct PolarReader {
  typedef NoScales Scales;
  const global_memory uchar* row; // of the width of level 1
  uint row_stride;
  const global_memory uchar* other;
  uint other_stride;
  const global_memory half* radii; // roots of root-mean-squares
  uint radii_stride;
  float size; // √ of the coordinates of a block
  Circles circles;
  NoScales scales;

  FUNCTION void advance(uint tokens) {
    row += size_t(tokens) * row_stride, other += size_t(tokens) * other_stride;
    radii += size_t(tokens) * radii_stride;
  }

  // a share is of whole trees of some levels; what is above is as many codes for each of them
  template <int WIDTH>
  struct Fetched {
    enum {
      tree = common_divisor(WIDTH, 1 << LEVELS),
      trees = WIDTH / tree,
      above = LEVELS > log2_of(tree) ? LEVELS - log2_of(tree) : 1
    };
    uint words[LEVELS][(WIDTH * 4 + 31) / 32];
    uint entries[trees][above];
    half radii[trees];
  };

  template <int WIDTH>
  FUNCTION void fetch(int distance, uint share, thread Fetched<WIDTH>& to) const {
    constexpr int tree = common_divisor(WIDTH, 1 << LEVELS), height = log2_of(tree);
    const global_memory uchar* first = row + distance * int(row_stride);
    const global_memory uchar* second = other + distance * int(other_stride);
    Angles<WIDTHS, DIM, WIDTH, height>::fetch(first, second, share, to.words);
    UNROLL for (int i = 0; i < WIDTH / tree; i++) {
      const uint coordinate = share * WIDTH + i * tree;
      to.radii[i] = radii[distance * int(radii_stride) + int(coordinate >> LEVELS)];
      AnglesAbove<WIDTHS, DIM, height + 1, LEVELS - height>::fetch(first, second, coordinate, to.entries[i]);
    }
  }

  template <int WIDTH>
  FUNCTION void decode(thread const Fetched<WIDTH>& from, uint share, thread pair_t (&x)[WIDTH / 2]) const {
    constexpr int tree = common_divisor(WIDTH, 1 << LEVELS), height = log2_of(tree);
    float y[WIDTH];
    UNROLL for (int i = 0; i < WIDTH / tree; i++) {
      const float root = as_float(from.radii[i]);
      y[i] = root * root * size;
      UNROLL for (int level = height + 1; level <= LEVELS; level++) {
        const uint entry = from.entries[i][level - height - 1];
        const bool second = (share * WIDTH + i * tree) >> (level - 1) & 1u;
        y[i] *= second ? circles.sine_of(entry) : circles.cosine_of(entry);
      }
    }
    Angles<WIDTHS, DIM, WIDTH, height>::grow(circles, from.words, y);
    UNROLL for (int i = 0; i < WIDTH / 2; i++) x[i] = make_pair(y[2 * i], y[2 * i + 1]);
  }
};
