// Scalar codes whose width the head says: the same for all threads of a threadgroup, but not known when this is compiled.
// Levels lie in threadgroup memory, two codes' at a time up to 4 bits, and each as often as there is room.

#define PAIRED_BITS 4

FUNCTION uint copies_log2(uint entries, uint room) {
  uint power = 0;
  while (power < 5 && entries << (power + 1) <= room) power++;
  return power;
}

// Copies a head's levels to `entries`, which have ROOM pairs of room.
template <int ROOM>
FUNCTION void fill_widths(
    local_memory pair_t* entries, const global_memory float* levels, uint bits, uint thread_id, uint threads) {
  const bool paired = bits <= PAIRED_BITS;
  const uint count = 1u << (paired ? 2 * bits : bits), power = copies_log2(count, ROOM), copies = 1u << power;
  local_memory float* singles = (local_memory float*)entries;
  // lanes write their entries' copies in an order of their own, or they would all meet in one bank
  for (uint i = thread_id; i < count; i += threads) {
    if (paired) {
      const pair_t entry = make_pair(levels[2 * i], levels[2 * i + 1]);
      for (uint c = 0; c < copies; c++) entries[(i << power) + (c + i) % copies] = entry;
    } else {
      for (uint c = 0; c < copies; c++) singles[(i << power) + (c + i) % copies] = levels[i];
    }
  }
}

// Codes of at most MOST bits.
template <int MOST, int ROOM, class ScalesOf>
struct WidthsReader {
  typedef ScalesOf Scales;
  const global_memory uint* rows; // the head's own part
  uint token_stride;
  Scales scales;
  uint bits;
  const local_memory pair_t* entries;
  uint lane;

  FUNCTION void advance(uint tokens) { rows += size_t(tokens) * token_stride, scales.advance(tokens); }

  template <int WIDTH>
  struct Fetched {
    uint words[(WIDTH * MOST + 31) / 32];
  };

  template <int WIDTH>
  FUNCTION void fetch(int distance, uint share, thread Fetched<WIDTH>& to) const {
    load_some<(WIDTH * MOST + 31) / 32>(rows + distance * int(token_stride), share * WIDTH * bits, WIDTH * bits, to.words);
  }

  template <int WIDTH>
  FUNCTION void decode(thread const Fetched<WIDTH>& from, uint, thread pair_t (&x)[WIDTH / 2]) const {
    constexpr int count = (WIDTH * MOST + 31) / 32;
    uint words[count];
    UNROLL for (int i = 0; i < count; i++) words[i] = from.words[i];
    if (bits <= PAIRED_BITS) {
      const uint step = 2 * bits, power = copies_log2(1u << step, ROOM), own = lane & ((1u << power) - 1);
      UNROLL for (int i = 0; i < WIDTH / 2; i += 4) { // four pairs are in a word
        UNROLL for (int j = 0; j < 4; j++) {
          if (i + j < WIDTH / 2) x[i + j] = entries[((words[0] >> (j * step) & ((1u << step) - 1)) << power) + own];
        }
        drop_bits<count>(words, 4 * step);
      }
    } else if (MOST > PAIRED_BITS) {
      const local_memory float* levels = (const local_memory float*)entries;
      const uint power = copies_log2(1u << bits, ROOM), mask = (1u << bits) - 1, own = lane & ((1u << power) - 1);
      UNROLL for (int i = 0; i < WIDTH / 2; i += 2) { // and four single ones
        UNROLL for (int j = 0; j < 2; j++) {
          const uint first = words[0] >> (2 * j * bits) & mask, second = words[0] >> ((2 * j + 1) * bits) & mask;
          if (i + j < WIDTH / 2) x[i + j] = make_pair(levels[(first << power) + own], levels[(second << power) + own]);
        }
        drop_bits<count>(words, 4 * bits);
      }
    }
  }
};
