// Attention of ROWS query rows over the tokens begin .. end, by one simdgroup of several that share them.

#define PADDED_ROWS 8     // what the matrix unit takes
#define TILE 16           // tokens of one turn: its code has to stay in a processor's instruction cache
#define SCORES_LENGTH 20  // of a row of a tile's scores, and of its weights: no two lanes meet in a bank
#define WEIGHTS_LENGTH 24
#define LANE_ROWS ((ROWS + 1) / 2) // rows that a lane weighs: lanes 0 – 15 the even ones, 16 – 31 the odd ones
#define MASKED -3.0e38f

// What a simdgroup knows after some tokens. `mixed` is Σ weight · scale / unit · level, in the matrix unit's layout.
template <int PAIRS>
struct Running {
  float largest[LANE_ROWS], total[LANE_ROWS]; // of the scores; of the weights, each lane its own part
  float unit;                                 // the largest scale of a value so far
  Mixed mixed[PAIRS];
};

// The simdgroup's own threadgroup memory.
struct Scratch {
  local_memory float* scores; // [PADDED_ROWS][SCORES_LENGTH]
  local_memory half* weights; // [PADDED_ROWS][WEIGHTS_LENGTH]
  local_memory float* fades;  // [PADDED_ROWS]
};

template <int QUARTER, class Keys, class Codes>
FUNCTION void fetch_keys(thread const Keys& keys, uint tile, uint end, uint lane, thread Codes& codes) {
  UNROLL for (int part = 0; part < TILE / SCORE_TOKENS; part++) {
    UNROLL for (int own = 0; own < SCORE_OWN; own++) {
      const uint token = tile + part * SCORE_TOKENS + score_token(lane, own);
      keys.template fetch<QUARTER>(token < end ? token : end - 1, score_quarter(lane), codes[part][own]);
    }
  }
}

template <int KEY_DIM, int VALUE_DIM, class Keys, class Values>
FUNCTION void attend(
    thread const Keys& keys,
    thread const Values& values,
    const local_memory float* queries,   // [PADDED_ROWS][KEY_DIM]
    const global_memory float* mask,     // of the first row and the first token, if HAS_MASK
    thread const uint (&mask_rows)[LANE_ROWS], // where the mask of each of the lane's rows begins
    uint begin,
    uint end,
    Scratch scratch,
    uint simdgroup,
    uint simdgroups,
    uint lane,
    thread Running<VALUE_DIM / (2 * MIX_SHARES)>& run) {
  constexpr int QUARTER = KEY_DIM / 4, SHARE = VALUE_DIM / MIX_SHARES, STEPS = QUARTER / (2 * SCORE_PAIRS);
  UNROLL for (int i = 0; i < LANE_ROWS; i++) run.largest[i] = -1.0e30f, run.total[i] = 0.0f;
  run.unit = 0.0f;
  UNROLL for (int p = 0; p < SHARE / 2; p++) {
    UNROLL for (int i = 0; i < MIX_SUMS; i++) run.mixed[p].sum[i] = 0.0f;
  }
  for (uint i = lane; i < PADDED_ROWS * WEIGHTS_LENGTH; i += 32) scratch.weights[i] = half(0.0f);
  if (lane < PADDED_ROWS) scratch.fades[lane] = 1.0f;

  QueryPart query[STEPS];
  UNROLL for (int s = 0; s < STEPS; s++) query[s] = query_part(queries, KEY_DIM, s, lane);

  // a token past the end is read as the last one, and masked later: no lane may leave the matrix unit
  typename Keys::template Fetched<QUARTER> key_codes[TILE / SCORE_TOKENS][SCORE_OWN];
  typename Values::template Fetched<SHARE> value_codes[TILE / MIX_TOKENS][MIX_OWN];
  const uint first = begin + TILE * simdgroup;
  if (first < end) fetch_keys<QUARTER>(keys, first, end, lane, key_codes);
  for (uint tile = first; tile < end; tile += TILE * simdgroups) {
    UNROLL for (int part = 0; part < TILE / MIX_TOKENS; part++) {
      UNROLL for (int own = 0; own < MIX_OWN; own++) {
        const uint at = tile + part * MIX_TOKENS + mix_token(lane, own);
        values.template fetch<SHARE>(at < end ? at : end - 1, mix_share(lane), value_codes[part][own]);
      }
    }
    const uint token = tile + lane % TILE;
    const bool live = token < end;
    const float key_scale = live ? keys.scale(token) : 0.0f, value_scale = live ? values.scale(token) : 0.0f;

    UNROLL for (int part = 0; part < TILE / SCORE_TOKENS; part++) {
      pair_t x[SCORE_OWN][QUARTER / 2];
      UNROLL for (int own = 0; own < SCORE_OWN; own++) {
        keys.template decode<QUARTER>(key_codes[part][own], score_quarter(lane), x[own]);
      }
      Scores product;
      product.clear();
      UNROLL for (int s = 0; s < STEPS; s++) {
        pair_t pairs[SCORE_OWN][SCORE_PAIRS];
        UNROLL for (int own = 0; own < SCORE_OWN; own++) {
          UNROLL for (int p = 0; p < SCORE_PAIRS; p++) pairs[own][p] = x[own][s * SCORE_PAIRS + p];
        }
        product.add(pairs, query[s]);
      }
      product.store(scratch.scores + part * SCORE_TOKENS, SCORES_LENGTH, lane);
    }
    const uint next = tile + TILE * simdgroups;
    if (next < end) fetch_keys<QUARTER>(keys, next, end, lane, key_codes);
    simd_barrier();

    // now a lane is a token, for half of the rows
    const float widest = largest_of<TILE>(value_scale), unit = widest > run.unit ? widest : run.unit;
    const float per_unit = unit > 0.0f ? 1.0f / unit : 0.0f;
    bool faded = unit != run.unit; // seldom, after the first tiles
    UNROLL for (int i = 0; i < LANE_ROWS; i++) {
      // the last row of an odd number has a padding row beside it: no lane may leave the exchange
      const uint r = 2 * i + lane / TILE;
      float score = live ? scratch.scores[r * SCORES_LENGTH + lane % TILE] * key_scale : MASKED;
      if (HAS_MASK && live && r < ROWS) score += mask[mask_rows[i] + token] * LOG2_E;
      const float seen = largest_of<TILE>(score), largest = seen > run.largest[i] ? seen : run.largest[i];
      const float weight = exponential2(score - largest), fade = exponential2(run.largest[i] - largest);
      faded = faded || seen > run.largest[i];
      run.largest[i] = largest;
      run.total[i] = run.total[i] * fade + weight;
      scratch.weights[r * WEIGHTS_LENGTH + lane % TILE] = half(weight * value_scale * per_unit);
      if (lane % TILE == 0) scratch.fades[r] = fade * run.unit * per_unit;
    }
    run.unit = unit;
    simd_barrier();

    if (simd_any(faded)) {
      float fades[MIX_SUMS];
      UNROLL for (int i = 0; i < MIX_SUMS; i++) fades[i] = scratch.fades[mixed_row(lane, i)];
      UNROLL for (int p = 0; p < SHARE / 2; p++) {
        UNROLL for (int i = 0; i < MIX_SUMS; i++) run.mixed[p].sum[i] *= fades[i];
      }
    }
    UNROLL for (int part = 0; part < TILE / MIX_TOKENS; part++) {
      pair_t x[MIX_OWN][SHARE / 2];
      UNROLL for (int own = 0; own < MIX_OWN; own++) {
        values.template decode<SHARE>(value_codes[part][own], mix_share(lane), x[own]);
      }
      const WeightPart weights = weight_part(scratch.weights + part * MIX_TOKENS, WEIGHTS_LENGTH, lane);
      UNROLL for (int p = 0; p < SHARE / 2; p++) {
        pair_t pairs[MIX_OWN];
        UNROLL for (int own = 0; own < MIX_OWN; own++) pairs[own] = x[own][p];
        run.mixed[p].add(pairs, weights);
      }
    }
    simd_barrier();
  }
}

// Joins what the simdgroups of a threadgroup know, and writes it: values [ROWS][VALUE_DIM], and of each row the largest
// score and the total.
template <int VALUE_DIM>
FUNCTION void join(
    thread Running<VALUE_DIM / (2 * MIX_SHARES)>& run,
    uint simdgroup,
    uint simdgroups,
    uint lane,
    local_memory float* largest, // [simdgroups][ROWS]
    local_memory float* totals,  // [simdgroups][ROWS]
    local_memory float* joined,  // [ROWS][VALUE_DIM]
    global_memory float* out_mixed,
    uint out_row,
    global_memory float* out_sums,
    uint out_sums_row) {
  constexpr int SHARE = VALUE_DIM / MIX_SHARES;
  const uint thread_id = simdgroup * 32 + lane, threads = simdgroups * 32;
  UNROLL for (int i = 0; i < LANE_ROWS; i++) {
    const uint r = 2 * i + lane / TILE;
    const float total = total_of<TILE>(run.total[i]);
    if (lane % TILE == 0 && r < ROWS) {
      largest[simdgroup * ROWS + r] = run.largest[i];
      totals[simdgroup * ROWS + r] = total;
    }
  }
  for (uint i = thread_id; i < ROWS * VALUE_DIM; i += threads) joined[i] = 0.0f;
  group_barrier();
  if (thread_id < ROWS) {
    float highest = largest[thread_id], total = 0.0f;
    for (uint s = 1; s < simdgroups; s++) {
      highest = largest[s * ROWS + thread_id] > highest ? largest[s * ROWS + thread_id] : highest;
    }
    for (uint s = 0; s < simdgroups; s++) {
      const float fade = exponential2(largest[s * ROWS + thread_id] - highest);
      total += fade * totals[s * ROWS + thread_id];
      largest[s * ROWS + thread_id] = fade;
    }
    out_sums[thread_id * out_sums_row] = highest;
    out_sums[thread_id * out_sums_row + 1] = total;
  }
  group_barrier();
  for (uint s = 0; s < simdgroups; s++) {
    if (s == simdgroup) {
      UNROLL for (int i = 0; i < MIX_SUMS; i++) {
        const uint row = mixed_row(lane, i);
        if (row < ROWS) {
          const float factor = largest[s * ROWS + row] * run.unit;
          UNROLL for (int p = 0; p < SHARE / 2; p++) {
            joined[row * VALUE_DIM + mix_output(lane) * SHARE + 2 * p + mixed_coordinate(lane, i)] +=
                factor * run.mixed[p].sum[i];
          }
        }
      }
    }
    group_barrier();
  }
  for (uint i = thread_id; i < ROWS * VALUE_DIM; i += threads) out_mixed[i / VALUE_DIM * out_row + i % VALUE_DIM] = joined[i];
}
