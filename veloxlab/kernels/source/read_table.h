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

// A table in threadgroup memory, whose entries stand COPIES times, so that the lanes of a simdgroup meet in no bank. An
// entry's copies take a power of two of bytes, so a shift and a mask find it; the lane's own copy begins `own` bytes later.
template <int SUB, int COPIES>
struct SharedTable {
  const local_memory pair_t* entries;
  uint own; // bytes

  template <int FROM, int COUNT, int WORDS>
  FUNCTION void entry(thread const uint (&words)[WORDS], thread pair_t* x) const {
    constexpr int size = COPIES * (SUB / 2) * int(sizeof(pair_t));
    const uint at = scaled_bits_of<FROM, COUNT, log2_of(size)>(words) | own;
    const local_memory pair_t* found = (const local_memory pair_t*)((const local_memory uchar*)entries + at);
    UNROLL for (int i = 0; i < SUB / 2; i++) x[i] = found[i];
  }

  FUNCTION pair_t pair(uint code) const { // where SUB is 2
    return *(const local_memory pair_t*)((const local_memory uchar*)entries + (code * COPIES * uint(sizeof(pair_t)) | own));
  }
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
  const local_memory float* entries;
  uint own; // bytes

  template <int FROM, int COUNT, int WORDS>
  FUNCTION float level(thread const uint (&words)[WORDS]) const {
    const uint at = scaled_bits_of<FROM, COUNT, log2_of(4 * COPIES)>(words) | own;
    return *(const local_memory float*)((const local_memory uchar*)entries + at);
  }

  FUNCTION float number(uint code) const {
    return *(const local_memory float*)((const local_memory uchar*)entries + (code * COPIES * 4u | own));
  }
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
template <int BITS, int SUB, int ROW_WORDS, class Table>
struct TableReader {
  const global_memory uint* rows;
  uint token_stride;
  Scales scales;
  Table table;

  template <int WIDTH>
  struct Fetched {
    uint words[(WIDTH / SUB * BITS + 31) / 32];
  };

  template <int WIDTH>
  FUNCTION void fetch(uint token, uint share, thread Fetched<WIDTH>& to) const {
    constexpr int bits = WIDTH / SUB * BITS;
    load_bits<bits, ROW_WORDS>(rows + token * token_stride, share * bits, to.words);
  }

  template <int WIDTH>
  FUNCTION void decode(thread const Fetched<WIDTH>& from, uint, thread pair_t (&x)[WIDTH / 2]) const {
    LookUp<0, WIDTH / SUB, BITS, SUB, (WIDTH / SUB * BITS + 31) / 32, Table>::all(table, from.words, x);
  }

  FUNCTION float scale(uint token) const { return scales.of(token); }
};
