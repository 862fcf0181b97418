// Sums of table entries, turned to the token's position. Coordinates are pairs of neighbours (x, y) here, complex numbers:
// of each of STAGES stages codes a and b of 6 bits add entry a, and entry b times i; and a pair is then turned by its own
// angle for each position. Tables are float16 [STAGES][64][DIM] in another order: of their first ROTATED coordinates either
// neighbours are a pair (TRADITIONAL) or the halves are, and the halves of what is behind.

struct Complex {
  float x, y;
};

template <int DIM, int ROTATED, int TRADITIONAL>
struct PairOrder {
  static FUNCTION uint first(uint pair) {
    return pair < ROTATED / 2 ? (TRADITIONAL ? 2 * pair : pair) : pair + ROTATED / 2;
  }
  static FUNCTION uint second(uint pair) {
    return pair < ROTATED / 2 ? (TRADITIONAL ? 2 * pair + 1 : pair + ROTATED / 2) : pair + DIM / 2;
  }
};

// TOGETHER pairs from `pair` on: one, or two that lie side by side.
template <class Order, int TOGETHER>
struct Entries {
  static FUNCTION void of(const global_memory half* entry, uint pair, thread Complex* z) {
    z[0].x = as_float(entry[Order::first(pair)]), z[0].y = as_float(entry[Order::second(pair)]);
  }
};

template <class Order>
struct Entries<Order, 2> {
  static FUNCTION void of(const global_memory half* entry, uint pair, thread Complex* z) {
    const half2 x = *(const global_memory half2*)(entry + Order::first(pair));
    const half2 y = *(const global_memory half2*)(entry + Order::second(pair));
    z[0].x = as_float(x.x), z[0].y = as_float(y.x), z[1].x = as_float(x.y), z[1].y = as_float(y.y);
  }
};

template <int STAGES, int DIM, int ROTATED, int TRADITIONAL, int TURNED, class ScalesOf>
struct SumsReader {
  typedef ScalesOf Scales;
  const global_memory uchar* rows;
  uint token_stride;
  Scales scales;
  const global_memory half* tables;  // the head's
  const global_memory float* angles; // the first token's position, then of each pair the angle for one position
  uint position; // behind the first token's

  FUNCTION void advance(uint tokens) {
    rows += size_t(tokens) * token_stride, position += tokens;
    scales.advance(tokens);
  }

  template <int WIDTH>
  struct Fetched {
    const global_memory uchar* row;
    uint position;
  };

  template <int WIDTH>
  FUNCTION void fetch(int distance, uint, thread Fetched<WIDTH>& to) const {
    to.row = rows + distance * int(token_stride);
    to.position = position + distance;
  }

  template <int WIDTH>
  FUNCTION void decode(thread const Fetched<WIDTH>& from, uint share, thread pair_t (&x)[WIDTH / 2]) const {
    typedef PairOrder<DIM, ROTATED, TRADITIONAL> Order;
    constexpr int pairs = WIDTH / 2;
    constexpr int together = !TRADITIONAL && pairs % 2 == 0 && DIM % 4 == 0 && ROTATED % 4 == 0 ? 2 : 1;
    const uint begin = share * pairs;
    const global_memory uchar* row = from.row;
    Complex sum[pairs];
    UNROLL for (int i = 0; i < pairs; i++) sum[i].x = sum[i].y = 0.0f;
    for (uint stage = 0; stage < STAGES; stage++) {
      const uint at = 12 * stage; // and so two bytes have both codes
      const uint codes = (uint(row[at / 8]) | uint(row[at / 8 + 1]) << 8) >> (at % 8);
      const global_memory half* stage_table = tables + stage * (64 * DIM);
      const global_memory half* a = stage_table + (codes & 63u) * DIM;
      const global_memory half* b = stage_table + (codes >> 6 & 63u) * DIM;
      UNROLL for (int i = 0; i < pairs; i += together) {
        Complex of_a[together], of_b[together];
        Entries<Order, together>::of(a, begin + i, of_a);
        Entries<Order, together>::of(b, begin + i, of_b);
        UNROLL for (int j = 0; j < together; j++) {
          sum[i + j].x += of_a[j].x - of_b[j].y;
          sum[i + j].y += of_a[j].y + of_b[j].x;
        }
      }
    }
    UNROLL for (int i = 0; i < pairs; i++) {
      Complex z = sum[i];
      if (TURNED) {
        const float angle = (angles[0] + float(from.position)) * angles[1 + begin + i], c = cosine(angle), s = sine(angle);
        z.x = sum[i].x * c - sum[i].y * s;
        z.y = sum[i].x * s + sum[i].y * c;
      }
      x[i] = make_pair(z.x, z.y);
    }
  }
};
