// Rows of codes, LSB first and without gaps. A vector's codes lie in threadgroup memory, a byte each; its lanes write a word
// at a time.

// Bits FROM … FROM + BITS − 1 of each of COUNT codes.
template <int COUNT, int BITS, int FROM>
FUNCTION void pack_row(const local_memory uchar* codes, global_memory uint* row, uint lane, uint lanes) {
  constexpr uint words = (COUNT * BITS + 31) / 32;
  constexpr uint parts = (32 + 2 * BITS - 2) / BITS; // codes that a word has bits of, at most
  for (uint w = lane; w < words; w += lanes) {
    uint word = 0;
    UNROLL for (uint i = 0; i < parts; i++) {
      const uint at = 32 * w / BITS + i;
      const int shift = int(at * BITS) - int(32 * w);
      if (at < COUNT && shift < 32) {
        const uint code = uint(codes[at]) >> FROM & ((1u << BITS) - 1u);
        word |= shift < 0 ? code >> -shift : code << shift;
      }
    }
    row[w] = word;
  }
}

// The same for codes of different widths, of which code i takes bits begins[i] … begins[i + 1] − 1 of the row; `first_codes` says
// which is the first that has bits in a word.
template <int COUNT, int WORDS>
FUNCTION void pack_plan(
    const local_memory uchar* codes, const local_memory uint* begins, const global_memory uint* first_codes, long stride,
    global_memory uint* row, uint lane, uint lanes) {
  for (uint w = lane; w < WORDS; w += lanes) {
    uint word = 0;
    for (uint i = first_codes[w * stride]; i < COUNT && begins[i] < 32 * w + 32; i++) {
      const int shift = int(begins[i]) - int(32 * w);
      word |= shift < 0 ? uint(codes[i]) >> -shift : uint(codes[i]) << shift;
    }
    row[w] = word;
  }
}
