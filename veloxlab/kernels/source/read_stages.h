// Codes of two stages, each in a row of its own: a table has an entry for every pair of both. BITS of each stage stand for
// SUB neighbouring coordinates.

template <int BITS, class Codes>
FUNCTION uint joint_code(thread const Codes& from, int i) {
  return bits_at(from.coarse, i * BITS, BITS) << BITS | bits_at(from.fine, i * BITS, BITS);
}

// Coordinates 2i and 2i + 1, from one entry or from two.
template <int BITS, int SUB>
struct Neighbours {
  template <class Table, class Codes>
  static FUNCTION pair_t of(thread const Table& table, thread const Codes& from, int i) {
    return table.pair(joint_code<BITS>(from, i));
  }
};

template <int BITS>
struct Neighbours<BITS, 1> {
  template <class Table, class Codes>
  static FUNCTION pair_t of(thread const Table& table, thread const Codes& from, int i) {
    return make_pair(table.number(joint_code<BITS>(from, 2 * i)), table.number(joint_code<BITS>(from, 2 * i + 1)));
  }
};

template <int BITS, int SUB, int ROW_WORDS, class ScalesOf, class Table>
struct StagesReader {
  typedef ScalesOf Scales;
  const global_memory uint* coarse;
  uint coarse_stride;
  const global_memory uint* fine;
  uint fine_stride;
  Scales scales;
  Table table;

  FUNCTION void advance(uint tokens) {
    coarse += size_t(tokens) * coarse_stride, fine += size_t(tokens) * fine_stride;
    scales.advance(tokens);
  }

  template <int WIDTH>
  struct Fetched {
    uint coarse[(WIDTH / SUB * BITS + 31) / 32], fine[(WIDTH / SUB * BITS + 31) / 32];
  };

  template <int WIDTH>
  FUNCTION void fetch(int distance, uint share, thread Fetched<WIDTH>& to) const {
    constexpr int bits = WIDTH / SUB * BITS;
    load_bits<bits, ROW_WORDS>(coarse + distance * int(coarse_stride), share * bits, to.coarse);
    load_bits<bits, ROW_WORDS>(fine + distance * int(fine_stride), share * bits, to.fine);
  }

  template <int WIDTH>
  FUNCTION void decode(thread const Fetched<WIDTH>& from, uint, thread pair_t (&x)[WIDTH / 2]) const {
    UNROLL for (int i = 0; i < WIDTH / 2; i++) x[i] = Neighbours<BITS, SUB>::of(table, from, i);
  }
};
