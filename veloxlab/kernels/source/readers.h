// How the codes of a vector become numbers. A reader stands at a token, and can `advance`. It gives WIDTH neighbouring
// coordinates of the token some places on, from share · WIDTH on, as pairs and before the vector's own scale; and that
// scale. It does so in two steps, so that memory is asked early: `fetch` what is stored, `decode` it later.

FUNCTION constexpr int log2_of(int x) { return x <= 1 ? 0 : 1 + log2_of(x / 2); }
FUNCTION constexpr int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }

// The words that hold bits from .. from + BITS of a row of ROW_WORDS words, moved so that the first is bit 0.
template <int BITS, int ROW_WORDS>
FUNCTION void load_bits(const global_memory uint* row, uint from, thread uint (&words)[(BITS + 31) / 32]) {
  constexpr int count = (BITS + 31) / 32;
  const uint first = from / 32, shift = from % 32;
  if (BITS % 128 == 0 && ROW_WORDS % 4 == 0) {
    UNROLL for (int i = 0; i < count / 4; i++) {
      const uint4 four = ((const global_memory uint4*)(row + first))[i];
      words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
    }
  } else if (BITS % 64 == 0 && ROW_WORDS % 2 == 0) {
    UNROLL for (int i = 0; i < count / 2; i++) {
      const uint2 two = ((const global_memory uint2*)(row + first))[i];
      words[2 * i] = two.x, words[2 * i + 1] = two.y;
    }
  } else if (BITS % 32 == 0) {
    UNROLL for (int i = 0; i < count; i++) words[i] = row[first + i];
  } else {
    uint low = row[first];
    UNROLL for (int i = 0; i < count; i++) {
      const uint next = first + i + 1;
      const uint high = next < ROW_WORDS ? row[next] : 0u;
      words[i] = shift == 0 ? low : (low >> shift) | (high << (32 - shift));
      low = high;
    }
  }
}

// Bits from .. from + count of a string that lies in words; in an unrolled loop positions are known when it is compiled.
template <int WORDS>
FUNCTION uint bits_at(thread const uint (&words)[WORDS], int from, int count) {
  const int first = from / 32, shift = from % 32;
  uint found = words[first] >> shift;
  if (shift + count > 32) found |= words[first + 1] << (32 - shift);
  return found & ((1u << count) - 1u);
}

// The words that hold bits from .. from + bits, COUNT of them or fewer, moved so that the first is bit 0; the others are 0.
template <int COUNT>
FUNCTION void load_some(const global_memory uint* row, uint from, uint bits, thread uint (&words)[COUNT]) {
  const uint first = from / 32, shift = from % 32;
  uint low = bits > 0 ? row[first] : 0u;
  UNROLL for (int i = 0; i < COUNT; i++) {
    const uint high = 32 * uint(i + 1) < shift + bits ? row[first + i + 1] : 0u;
    words[i] = funnel(low, high, shift);
    low = high;
  }
}

// The same of BITS bits, all known to be there, in a row of bytes.
template <int BITS, int COUNT>
FUNCTION void load_bytes(const global_memory uchar* row, uint from, thread uint (&words)[COUNT]) {
  const global_memory uchar* bytes = row + from / 8;
  const uint shift = from % 8;
  UNROLL for (int i = 0; i < (BITS + 31) / 32; i++) {
    uint parts[5];
    UNROLL for (int k = 0; k < 5; k++) parts[k] = 32 * i + 8 * k < int(shift) + BITS ? uint(bytes[4 * i + k]) : 0u;
    words[i] = funnel(parts[0] | parts[1] << 8 | parts[2] << 16 | parts[3] << 24, parts[4], shift);
  }
}

// Takes the first bits, 32 at most, off a string.
template <int COUNT>
FUNCTION void drop_bits(thread uint (&words)[COUNT], uint bits) {
  UNROLL for (int i = 0; i < COUNT; i++) words[i] = funnel(words[i], i + 1 < COUNT ? words[i + 1] : 0u, bits);
}

// A scale is stored as its root.
struct StoredScales {
  const global_memory half* roots;
  uint token_stride;

  typedef half Fetched;
  FUNCTION void advance(uint tokens) { roots += size_t(tokens) * token_stride; }
  FUNCTION half fetch(int distance) const { return roots[distance * int(token_stride)]; }
  static FUNCTION float decode(half root) { return as_float(root) * as_float(root); }
};

struct NoScales {
  typedef uint Fetched;
  FUNCTION void advance(uint) {}
  FUNCTION uint fetch(int) const { return 0; }
  static FUNCTION float decode(uint) { return 1.0f; }
};

// Vectors that are not compressed.
template <typename T>
struct ExactReader {
  typedef NoScales Scales;
  const global_memory T* rows;
  uint token_stride;
  NoScales scales;

  FUNCTION void advance(uint tokens) { rows += size_t(tokens) * token_stride; }

  template <int WIDTH>
  struct Fetched {
    const global_memory T* from;
  };

  template <int WIDTH>
  FUNCTION void fetch(int distance, uint share, thread Fetched<WIDTH>& to) const {
    to.from = rows + distance * int(token_stride) + share * WIDTH;
  }

  template <int WIDTH>
  FUNCTION void decode(thread const Fetched<WIDTH>& row, uint, thread pair_t (&x)[WIDTH / 2]) const {
    UNROLL for (int i = 0; i < WIDTH / 2; i++) x[i] = stored_pair(row.from + 2 * i);
  }
};
