// Scalar codes in equal steps, of a size and a beginning that neighbouring coordinates of a vector share: GROUP of them, the
// last ones perhaps fewer.

FUNCTION float signed_square(float x) { return x < 0.0f ? -x * x : x * x; }

template <int BITS, int GROUP, int ROW_WORDS>
struct GroupsReader {
  typedef NoScales Scales;
  const global_memory uint* rows;
  uint token_stride;
  const global_memory half* half_steps; // signed roots, and of `leasts` too
  uint half_steps_stride;
  const global_memory half* leasts;
  uint leasts_stride;
  float shift; // of a code, in steps
  NoScales scales;

  FUNCTION void advance(uint tokens) {
    rows += size_t(tokens) * token_stride;
    half_steps += size_t(tokens) * half_steps_stride, leasts += size_t(tokens) * leasts_stride;
  }

  template <int WIDTH>
  struct Fetched {
    uint words[(WIDTH * BITS + 31) / 32];
    half half_steps[WIDTH / common_divisor(GROUP, WIDTH)], leasts[WIDTH / common_divisor(GROUP, WIDTH)];
  };

  template <int WIDTH>
  FUNCTION void fetch(int distance, uint share, thread Fetched<WIDTH>& to) const {
    constexpr int run = common_divisor(GROUP, WIDTH); // coordinates that are in one group, wherever the share begins
    load_bits<WIDTH * BITS, ROW_WORDS>(rows + distance * int(token_stride), share * (WIDTH * BITS), to.words);
    UNROLL for (int i = 0; i < WIDTH / run; i++) {
      const uint group = (share * WIDTH + i * run) / GROUP;
      to.half_steps[i] = half_steps[distance * int(half_steps_stride) + int(group)];
      to.leasts[i] = leasts[distance * int(leasts_stride) + int(group)];
    }
  }

  template <int WIDTH>
  FUNCTION void decode(thread const Fetched<WIDTH>& from, uint, thread pair_t (&x)[WIDTH / 2]) const {
    constexpr int run = common_divisor(GROUP, WIDTH);
    float y[WIDTH];
    UNROLL for (int i = 0; i < WIDTH / run; i++) {
      const float step = 2.0f * signed_square(as_float(from.half_steps[i]));
      const float begin = signed_square(as_float(from.leasts[i])) + shift * step;
      UNROLL for (int j = i * run; j < (i + 1) * run; j++) y[j] = begin + step * float(bits_at(from.words, j * BITS, BITS));
    }
    UNROLL for (int i = 0; i < WIDTH / 2; i++) x[i] = make_pair(y[2 * i], y[2 * i + 1]);
  }
};
