// How a coordinate becomes a code, and what a code stands for.

// How many of `count` − 1 ascending bounds lie below y, for a count of 2^n that is at most 2^MOST_BITS.
template <int MOST_BITS>
FUNCTION uint bounds_below(const local_memory float* bounds, uint count, float y) {
  uint found = 0;
  UNROLL for (uint step = 1u << MOST_BITS >> 1; step > 0; step /= 2) {
    found += step < count && bounds[found + step - 1] < y ? step : 0;
  }
  return found;
}

// The nearest of 2^BITS ascending levels, between which `bounds` lie.
template <int BITS>
struct NearestLevel {
  const local_memory float* bounds;
  const local_memory float* levels;

  FUNCTION uint code(float y) const { return bounds_below<BITS>(bounds, 1u << BITS, y); }
  FUNCTION float level(uint code) const { return levels[code]; }
};

// The steps ±½, ±1½ … ±(2^(BITS − 1) − ½) of a uniform grid, which a coordinate finds when it is stretched: downwards in size,
// and the last step is the largest number's, however large.
template <int BITS>
struct StretchedGrid {
  float stretch;

  FUNCTION uint code(float y) const {
    const uint half_count = 1u << (BITS - 1);
    const float reach = stretch * (y < 0.0f ? -y : y);
    const uint step = reach < float(half_count - 1) ? uint(reach) : half_count - 1;
    return y >= 0.0f ? half_count + step : half_count - 1 - step;
  }
  FUNCTION float level(uint code) const { return float(code) - 0.5f * float((1u << BITS) - 1u); }
};

// Of `count` tries, times the stretch at which a vector's largest coordinate leaves the grid, that at which the angle between
// the vector and its grid point u is least; of equal ones the first. The squared sine is that of e = u − stretch · y, which is
// small, so that nothing cancels: (‖e‖² − ⟨e, y⟩² / ‖y‖²) / ‖u‖², with ‖y‖² = DIM. Every lane of the simdgroup calls it.
template <int DIM, int BITS>
FUNCTION float best_stretch(
    thread const float (&y)[Lanes<DIM>::each], const global_memory float* tries, long stride, uint count) {
  constexpr int lanes = Lanes<DIM>::count, each = Lanes<DIM>::each;
  float largest = 1e-30f;
  UNROLL for (int i = 0; i < each; i++) {
    const float size = y[i] < 0.0f ? -y[i] : y[i];
    largest = size > largest ? size : largest;
  }
  const float leaves = float(1u << (BITS - 1)) / largest_of<lanes>(largest);
  float best = 0.0f, least = 3.402823466e38f;
  for (uint t = 0; t < count; t++) {
    const StretchedGrid<BITS> grid = {leaves * tries[t * stride]};
    float errors = 0.0f, inner = 0.0f, squares = 0.0f;
    UNROLL for (int i = 0; i < each; i++) {
      const float level = grid.level(grid.code(y[i])), error = level - grid.stretch * y[i];
      errors += error * error, inner += error * y[i], squares += level * level;
    }
    errors = total_of<lanes>(errors), inner = total_of<lanes>(inner), squares = total_of<lanes>(squares);
    const float sine = (errors - inner * inner / float(DIM)) / squares; // squared, but for a factor
    best = sine < least ? grid.stretch : best;
    least = sine < least ? sine : least;
  }
  return best;
}
