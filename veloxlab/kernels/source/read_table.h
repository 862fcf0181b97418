// Codes of one width, each of which stands for an entry of one table.

// Bits FROM .. FROM + COUNT of a string that lies in words, LSB first; all positions are known when this is compiled.
template <int FROM, int COUNT, int WORDS>
FUNCTION uint bits_of(thread const uint (&words)[WORDS]) {
  constexpr int first = FROM / 32, shift = FROM % 32;
  constexpr bool straddles = shift + COUNT > 32;
  uint found = words[first] >> shift;
  if (straddles) found |= words[first + straddles] << ((32 - shift) % 32);
  return found & ((1u << COUNT) - 1u);
}

// The same, times 2^POWER: where an entry of that size begins.
template <int FROM, int COUNT, int POWER, int WORDS>
FUNCTION uint scaled_bits_of(thread const uint (&words)[WORDS]) {
  constexpr int first = FROM / 32, shift = FROM % 32;
  if (shift + COUNT > 32) return bits_of<FROM, COUNT>(words) << POWER;
  const uint moved = shift >= POWER ? words[first] >> (shift >= POWER ? shift - POWER : 0)
                                    : words[first] << (shift >= POWER ? 0 : POWER - shift);
  return moved & (((1u << COUNT) - 1u) << POWER);
}

// Bytes from a table's begin to an entry, whose copies take SIZE of them, a power of two. `size` is the same number, about
// which the compiler is to know nothing: a whole byte is one instruction, and to multiply it and add a place another.
template <int FROM, int COUNT, int SIZE, int WORDS>
FUNCTION uint entry_at(thread const uint (&words)[WORDS], uint size) {
  if (COUNT == 8 && FROM % 8 == 0) return byte_of<FROM % 32 / 8>(words[FROM / 32]) * size;
  return scaled_bits_of<FROM, COUNT, log2_of(SIZE)>(words);
}

// A table in threadgroup memory, whose entries stand COPIES times, so that the lanes of a simdgroup meet in no bank: the
// lane's own copies begin at `own`.
template <int SUB, int COPIES>
struct SharedTable {
  place_t own;
  uint size; // of an entry's copies, in bytes

  template <int FROM, int COUNT, int WORDS>
  FUNCTION void entry(thread const uint (&words)[WORDS], thread pair_t* x) const {
    constexpr int bytes = COPIES * (SUB / 2) * int(sizeof(pair_t));
    const uint at = entry_at<FROM, COUNT, bytes>(words, size);
    UNROLL for (int i = 0; i < SUB / 2; i++) x[i] = pair_at(own, at + i * uint(sizeof(pair_t)));
  }

  FUNCTION pair_t pair(uint code) const { return pair_at(own, code * size); } // where SUB is 2
};

template <int SUB>
struct GlobalTable {
  const global_memory float* entries;

  template <int FROM, int COUNT, int WORDS>
  FUNCTION void entry(thread const uint (&words)[WORDS], thread pair_t* x) const {
    const global_memory float* from = entries + bits_of<FROM, COUNT>(words) * SUB;
    UNROLL for (int i = 0; i < SUB / 2; i++) x[i] = make_pair(from[2 * i], from[2 * i + 1]);
  }
};

// Wide scalar codes, one coordinate each: the tables are of single numbers.
template <int COPIES>
struct SingleTable {
  place_t own;
  uint size; // of an entry's copies, in bytes

  template <int FROM, int COUNT, int WORDS>
  FUNCTION float level(thread const uint (&words)[WORDS]) const {
    return float_at(own, entry_at<FROM, COUNT, 4 * COPIES>(words, size));
  }

  FUNCTION float number(uint code) const { return float_at(own, code * size); }
};

// Looks up codes AT .. COUNT: a loop whose bit positions are known when it is compiled.
template <int AT, int COUNT, int BITS, int SUB, int WORDS, class Table>
struct LookUp {
  static FUNCTION void all(thread const Table& table, thread const uint (&words)[WORDS], thread pair_t* x) {
    table.template entry<AT * BITS, BITS>(words, x + AT * (SUB / 2));
    LookUp<AT + 1, COUNT, BITS, SUB, WORDS, Table>::all(table, words, x);
  }
};

template <int COUNT, int BITS, int SUB, int WORDS, class Table>
struct LookUp<COUNT, COUNT, BITS, SUB, WORDS, Table> {
  static FUNCTION void all(thread const Table&, thread const uint (&)[WORDS], thread pair_t*) {}
};

template <int AT, int COUNT, int BITS, int WORDS, class Table>
struct LookUp<AT, COUNT, BITS, 1, WORDS, Table> {
  static FUNCTION void all(thread const Table& table, thread const uint (&words)[WORDS], thread pair_t* x) {
    x[AT / 2] = make_pair(
        table.template level<AT * BITS, BITS>(words), table.template level<(AT + 1) * BITS, BITS>(words));
    LookUp<AT + 2, COUNT, BITS, 1, WORDS, Table>::all(table, words, x);
  }
};

template <int COUNT, int BITS, int WORDS, class Table>
struct LookUp<COUNT, COUNT, BITS, 1, WORDS, Table> {
  static FUNCTION void all(thread const Table&, thread const uint (&)[WORDS], thread pair_t*) {}
};

// Codes of BITS bits, each of which stands for SUB neighbouring coordinates.
template <int BITS, int SUB, int ROW_WORDS, class ScalesOf, class Table>
struct TableReader {
  typedef ScalesOf Scales;
  const global_memory uint* rows;
  uint token_stride;
  Scales scales;
  Table table;

  FUNCTION void advance(uint tokens) { rows += size_t(tokens) * token_stride, scales.advance(tokens); }

  template <int WIDTH>
  struct Fetched {
    uint words[(WIDTH / SUB * BITS + 31) / 32];
  };

  template <int WIDTH>
  FUNCTION void fetch(int distance, uint share, thread Fetched<WIDTH>& to) const {
    constexpr int bits = WIDTH / SUB * BITS;
    load_bits<bits, ROW_WORDS>(rows + distance * int(token_stride), share * bits, to.words);
  }

  template <int WIDTH>
  FUNCTION void decode(thread const Fetched<WIDTH>& from, uint, thread pair_t (&x)[WIDTH / 2]) const {
    LookUp<0, WIDTH / SUB, BITS, SUB, (WIDTH / SUB * BITS + 31) / 32, Table>::all(table, from.words, x);
  }
};
