// What another reader gives, scaled, and shifted by the same for all tokens of a head. Here the scale goes before the sum.
template <class Plain>
struct ShiftedReader {
  typedef NoScales Scales;
  Plain plain;
  const global_memory float* shifts; // of the head's coordinates
  NoScales scales;

  FUNCTION void advance(uint tokens) { plain.advance(tokens); }

  template <int WIDTH>
  struct Fetched {
    typename Plain::template Fetched<WIDTH> plain;
    typename Plain::Scales::Fetched scale;
  };

  template <int WIDTH>
  FUNCTION void fetch(int distance, uint share, thread Fetched<WIDTH>& to) const {
    plain.template fetch<WIDTH>(distance, share, to.plain);
    to.scale = plain.scales.fetch(distance);
  }

  template <int WIDTH>
  FUNCTION void decode(thread const Fetched<WIDTH>& from, uint share, thread pair_t (&x)[WIDTH / 2]) const {
    plain.template decode<WIDTH>(from.plain, share, x);
    const global_memory float* shift = shifts + share * WIDTH;
    const float scale = Plain::Scales::decode(from.scale);
    UNROLL for (int i = 0; i < WIDTH / 2; i++) {
      const float2 level = pair_floats(x[i]);
      x[i] = make_pair(level.x * scale + shift[2 * i], level.y * scale + shift[2 * i + 1]);
    }
  }
};
