// What another reader gives, scaled, and shifted by the same for all tokens of a head. Here the scale goes before the sum.
template <class Plain>
struct ShiftedReader {
  Plain plain;
  const global_memory float* shifts; // of the head's coordinates

  template <int WIDTH>
  struct Fetched {
    typename Plain::template Fetched<WIDTH> plain;
    float scale;
  };

  template <int WIDTH>
  FUNCTION void fetch(uint token, uint share, thread Fetched<WIDTH>& to) const {
    plain.template fetch<WIDTH>(token, share, to.plain);
    to.scale = plain.scale(token);
  }

  template <int WIDTH>
  FUNCTION void decode(thread const Fetched<WIDTH>& from, uint share, thread pair_t (&x)[WIDTH / 2]) const {
    plain.template decode<WIDTH>(from.plain, share, x);
    const global_memory float* shift = shifts + share * WIDTH;
    UNROLL for (int i = 0; i < WIDTH / 2; i++) {
      const float2 level = pair_floats(x[i]);
      x[i] = make_pair(level.x * from.scale + shift[2 * i], level.y * from.scale + shift[2 * i + 1]);
    }
  }

  FUNCTION float scale(uint) const { return 1.0f; }
};
