// Attention of ROWS query rows over the tokens begin .. end, by one simdgroup of several that share them.

#define PADDED_ROWS 8 // what the matrix unit takes
#define TILE 16       // tokens of one turn: its code has to stay in a processor's instruction cache
#define PARTS (TILE / SCORE_TOKENS)
#define LANE_ROWS 2   // rows whose scores a lane has; a score beyond the last row is one of a query of zeros
#define MASKED -3.0e38f
#define LEAST_LOG2 -60.0f // what a value's scale of 0 is taken for, where the largest is sought

// Rows of queries, and of what simdgroups join: a few numbers lie between quarters and between shares, so that lanes meet in
// few banks.
#define QUERY_LENGTH(DIM) ((DIM) + 16)
#define JOINED_LENGTH(DIM) ((DIM) + MIX_SHARES)
template <int DIM>
FUNCTION uint query_at(uint row, uint coordinate) {
  return row * QUERY_LENGTH(DIM) + coordinate / (DIM / 4) * (DIM / 4 + 4) + coordinate % (DIM / 4);
}

// What a simdgroup knows after some tokens. `largest` is that of score + log2(the value's scale), so that no weight times
// scale is over 1 and half precision holds it. `mixed` is Σ weight · scale · level, in the matrix unit's layout.
template <int PAIRS>
struct Running {
  float largest[LANE_ROWS], total[LANE_ROWS]; // of the weights, each lane its own part
  Mixed mixed[PAIRS];
};

// Over the lanes that hold other tokens of the same rows.
FUNCTION float largest_of_tokens(float x) {
  UNROLL for (uint i = 0; i < 3; i++) {
    const float other = simd_shuffle_xor(x, TOKEN_FAR(i));
    x = x > other ? x : other;
  }
  return x;
}
FUNCTION float total_of_tokens(float x) {
  UNROLL for (uint i = 0; i < 3; i++) x += simd_shuffle_xor(x, TOKEN_FAR(i));
  return x;
}

// What a lane reads of a tile, asked for while the one before is computed. Its readers stand at its first token of the tile:
// scores, and so scales, are of other tokens than those whose values it reads. A token past the last one is read as that,
// and masked later: no lane may leave the matrix unit.
template <int QUARTER, int SHARE, class Keys, class Values>
struct Fetched {
  typename Keys::template Fetched<QUARTER> keys[PARTS][SCORE_OWN];
  typename Values::template Fetched<SHARE> values[PARTS][MIX_OWN];
  typename Keys::Scales::Fetched key_scales[PARTS][SCORE_OWN];
  typename Values::Scales::Fetched value_scales[PARTS][SCORE_OWN];

  template <bool WHOLE>
  FUNCTION void fetch_keys(
      thread const Keys& from, thread const typename Values::Scales& scales, int last, uint lane) {
    UNROLL for (int part = 0; part < PARTS; part++) {
      UNROLL for (int own = 0; own < SCORE_OWN; own++) {
        const int distance = part * SCORE_TOKENS + SCORE_DISTANCE(own), token = WHOLE || distance < last ? distance : last;
        from.template fetch<QUARTER>(token, score_quarter(lane), keys[part][own]);
        key_scales[part][own] = from.scales.fetch(token), value_scales[part][own] = scales.fetch(token);
      }
    }
  }

  template <bool WHOLE>
  FUNCTION void fetch_values(thread const Values& from, int last, uint lane) {
    UNROLL for (int part = 0; part < PARTS; part++) {
      UNROLL for (int own = 0; own < MIX_OWN; own++) {
        const int distance = part * MIX_TOKENS + MIX_DISTANCE(own), token = WHOLE || distance < last ? distance : last;
        from.template fetch<SHARE>(token, mix_share(lane), values[part][own]);
      }
    }
  }
};

// CAP · tanh(x / CAP), both times LOG2_E; from 20 on tanh is 1 in float32.
FUNCTION float below_cap(float x) {
  const float twice = x * (2.0f / (CAP > 0.0f ? CAP : 1.0f));
  const float power = exponential2(twice < 40.0f ? (twice > -40.0f ? twice : -40.0f) : 40.0f);
  return CAP * LOG2_E * (1.0f - 2.0f / (power + 1.0f));
}

// What scores have beside those of codes, once these are scaled: nothing.
struct NothingAdded {
  FUNCTION void add(thread Scores&, uint, uint) const {}
};

// What becomes of a row's sum of values, of weights of this total, and where a coordinate goes: it stays as it is.
struct AsSummed {
  FUNCTION uint place(uint coordinate) const { return coordinate; }
  FUNCTION float number(uint, float sum, float) const { return sum; }
};

template <int KEY_DIM, int VALUE_DIM, class Keys, class Values, class Added>
FUNCTION void attend(
    thread const Keys& keys,
    thread const Values& values,
    const local_memory query_t* queries, // as `query_at` says; they and what readers have are there after a barrier
    thread const Added& added,
    const global_memory float* mask,     // of the first row and the first token, if HAS_MASK
    thread const uint (&mask_rows)[LANE_ROWS], // where the mask of each of the lane's rows begins
    uint begin,
    uint end,
    uint simdgroup,
    uint simdgroups,
    uint lane,
    thread Running<VALUE_DIM / (2 * MIX_SHARES)>& run) {
  constexpr int QUARTER = KEY_DIM / 4, SHARE = VALUE_DIM / MIX_SHARES, STEPS = QUARTER / (2 * SCORE_PAIRS);
  UNROLL for (int r = 0; r < LANE_ROWS; r++) run.largest[r] = -1.0e30f, run.total[r] = 0.0f;
  UNROLL for (int p = 0; p < SHARE / 2; p++) {
    UNROLL for (int i = 0; i < MIX_SUMS; i++) run.mixed[p].sum[i] = 0.0f;
  }

  Fetched<QUARTER, SHARE, Keys, Values> codes;
  const uint first = begin + TILE * simdgroup, step = TILE * simdgroups;
  Keys key_reader = keys;
  Values value_reader = values;
  typename Values::Scales scale_reader = values.scales;
  group_barrier();
  if (first < end) {
    key_reader.advance(first + score_token(lane)), scale_reader.advance(first + score_token(lane));
    value_reader.advance(first + mix_token(lane));
    const int last = int(end - 1 - first);
    codes.template fetch_keys<false>(key_reader, scale_reader, last - int(score_token(lane)), lane);
    codes.template fetch_values<false>(value_reader, last - int(mix_token(lane)), lane);
  }
  // many simdgroups leave a thread few registers: it reads queries again for each tile
  constexpr bool held = TILES_AT == 0;
  QueryPart query[STEPS];
  UNROLL for (int s = 0; s < STEPS; s++) {
    if (held) query[s] = query_part(queries, QUERY_LENGTH(KEY_DIM), QUARTER + 4, s, lane);
  }
  if (held) group_barrier(); // what is of a tile takes their place

  for (uint tile = first; tile < end; tile += step) {
    const uint next = tile + step;
    const bool whole = next + TILE <= end; // the next one
    const int last = int(end - 1 - next);
    float key_scale[PARTS][SCORE_OWN], value_scale[PARTS][SCORE_OWN];
    UNROLL for (int part = 0; part < PARTS; part++) {
      UNROLL for (int own = 0; own < SCORE_OWN; own++) {
        key_scale[part][own] = Keys::Scales::decode(codes.key_scales[part][own]);
        value_scale[part][own] = Values::Scales::decode(codes.value_scales[part][own]);
      }
    }

    Scores scores[PARTS];
    UNROLL for (int part = 0; part < PARTS; part++) {
      pair_t x[SCORE_OWN][QUARTER / 2];
      UNROLL for (int own = 0; own < SCORE_OWN; own++) {
        keys.template decode<QUARTER>(codes.keys[part][own], score_quarter(lane), x[own]);
      }
      scores[part].clear();
      UNROLL for (int s = 0; s < STEPS; s++) {
        pair_t pairs[SCORE_OWN][SCORE_PAIRS];
        UNROLL for (int own = 0; own < SCORE_OWN; own++) {
          UNROLL for (int p = 0; p < SCORE_PAIRS; p++) pairs[own][p] = x[own][s * SCORE_PAIRS + p];
        }
        if (!held) query[s] = query_part(queries, QUERY_LENGTH(KEY_DIM), QUARTER + 4, s, lane);
        scores[part].add(pairs, query[s]);
      }
      UNROLL for (int own = 0; own < SCORE_OWN; own++) {
        UNROLL for (int r = 0; r < LANE_ROWS; r++) scores[part].sum[own * LANE_ROWS + r] *= key_scale[part][own];
      }
      added.add(scores[part], tile + part * SCORE_TOKENS + score_token(lane), lane);
    }
    key_reader.advance(step), scale_reader.advance(step);
    if (held && whole) {
      codes.template fetch_keys<true>(key_reader, scale_reader, last, lane);
    } else if (!held || next < end) {
      codes.template fetch_keys<false>(key_reader, scale_reader, last - int(score_token(lane)), lane);
    }

    float seen[LANE_ROWS], fade[LANE_ROWS];
    UNROLL for (int r = 0; r < LANE_ROWS; r++) seen[r] = MASKED;
    UNROLL for (int part = 0; part < PARTS; part++) {
      UNROLL for (int own = 0; own < SCORE_OWN; own++) {
        const uint token = tile + part * SCORE_TOKENS + score_token(lane) + SCORE_DISTANCE(own);
        const float size = value_scale[part][own] > 0.0f ? logarithm2(value_scale[part][own]) : LEAST_LOG2;
        UNROLL for (int r = 0; r < LANE_ROWS; r++) {
          float score = scores[part].sum[own * LANE_ROWS + r];
          if (CAP > 0.0f) score = below_cap(score);
          if (HAS_MASK && token < end && score_row(lane, r) < ROWS) score += mask[mask_rows[r] + token] * LOG2_E;
          score = token < end ? score : MASKED;
          scores[part].sum[own * LANE_ROWS + r] = score;
          const float sized = score + (size > LEAST_LOG2 ? size : LEAST_LOG2);
          seen[r] = sized > seen[r] ? sized : seen[r];
        }
      }
    }
    bool faded = false; // seldom, after the first tiles
    UNROLL for (int r = 0; r < LANE_ROWS; r++) {
      seen[r] = largest_of_tokens(seen[r]);
      faded = faded || seen[r] > run.largest[r];
      const float largest = seen[r] > run.largest[r] ? seen[r] : run.largest[r];
      fade[r] = exponential2(run.largest[r] - largest);
      run.largest[r] = largest, run.total[r] *= fade[r];
    }
    if (simd_any(faded)) {
      float fades[MIX_SUMS];
      rows_to_mixed(fade, lane, fades);
      UNROLL for (int p = 0; p < SHARE / 2; p++) {
        UNROLL for (int i = 0; i < MIX_SUMS; i++) run.mixed[p].sum[i] *= fades[i];
      }
    }
    float weights[PARTS][SCORE_OWN][LANE_ROWS];
    UNROLL for (int part = 0; part < PARTS; part++) {
      UNROLL for (int own = 0; own < SCORE_OWN; own++) {
        UNROLL for (int r = 0; r < LANE_ROWS; r++) {
          const float weight = exponential2(scores[part].sum[own * LANE_ROWS + r] - run.largest[r]);
          run.total[r] += weight;
          weights[part][own][r] = weight * value_scale[part][own];
        }
      }
    }

    UNROLL for (int part = 0; part < PARTS; part++) {
      pair_t x[MIX_OWN][SHARE / 2];
      UNROLL for (int own = 0; own < MIX_OWN; own++) {
        values.template decode<SHARE>(codes.values[part][own], mix_share(lane), x[own]);
      }
      const WeightPart some = weight_part(weights[part], lane);
      UNROLL for (int p = 0; p < SHARE / 2; p++) {
        pair_t pairs[MIX_OWN];
        UNROLL for (int own = 0; own < MIX_OWN; own++) pairs[own] = x[own][p];
        run.mixed[p].add(pairs, some);
      }
    }
    value_reader.advance(step);
    if (held && whole) {
      codes.template fetch_values<true>(value_reader, last, lane);
    } else if (!held || next < end) {
      codes.template fetch_values<false>(value_reader, last - int(mix_token(lane)), lane);
    }
  }
}

// Joins what the simdgroups of a threadgroup know, and writes it as combine.h says.
template <int VALUE_DIM, class Summed>
FUNCTION void join(
    thread Running<VALUE_DIM / (2 * MIX_SHARES)>& run,
    thread const Summed& summed,
    uint simdgroup,
    uint simdgroups,
    uint lane,
    local_memory float* largest, // [simdgroups][ROWS]
    local_memory float* totals,  // [simdgroups][ROWS]
    local_memory float* joined,  // [ROWS][JOINED_LENGTH(VALUE_DIM)], where simdgroups had what is of their tiles,
                                 // or the same for every simdgroup, if JOINED_APART, where the table was
    global_memory float* out, // of the first row
    uint out_row) {           // numbers from row to row
  constexpr int SHARE = VALUE_DIM / MIX_SHARES;
  const uint thread_id = simdgroup * 32 + lane, threads = simdgroups * 32;
  UNROLL for (int i = 0; i < LANE_ROWS; i++) {
    const uint r = score_row(lane, i);
    const float total = total_of_tokens(run.total[i]);
    if (score_token(lane) == 0 && r < ROWS) {
      largest[simdgroup * ROWS + r] = run.largest[i];
      totals[simdgroup * ROWS + r] = total;
    }
  }
  group_barrier(); // some simdgroups have few tokens
  if (!JOINED_APART) {
    for (uint i = thread_id; i < ROWS * JOINED_LENGTH(VALUE_DIM); i += threads) joined[i] = 0.0f;
    group_barrier();
  }
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
    out[thread_id * out_row + LARGEST_VALUE] = highest;
    out[thread_id * out_row + LARGEST_VALUE + 1] = total;
    totals[thread_id] = total;
  }
  group_barrier();
  constexpr uint apart = JOINED_APART ? ROWS * JOINED_LENGTH(VALUE_DIM) : 0;
  for (uint s = JOINED_APART ? simdgroup : 0; s < simdgroups; s++) { // one after the other, or all at once
    if (s == simdgroup) {
      UNROLL for (int i = 0; i < MIX_SUMS; i++) {
        const uint row = mixed_row(lane, i);
        if (row < ROWS) {
          const float factor = largest[s * ROWS + row];
          local_memory float* to = joined + s * apart + row * JOINED_LENGTH(VALUE_DIM) + mix_output(lane) * (SHARE + 1);
          UNROLL for (int p = 0; p < SHARE / 2; p++) {
            const float sum = factor * run.mixed[p].sum[i];
            local_memory float& place = to[2 * p + mixed_coordinate(lane, i)];
            place = JOINED_APART ? sum : place + sum;
          }
        }
      }
    }
    group_barrier();
    if (JOINED_APART) break;
  }
  for (uint i = thread_id; i < ROWS * VALUE_DIM; i += threads) {
    const uint row = i / VALUE_DIM, coordinate = i % VALUE_DIM;
    const local_memory float* from = joined + row * JOINED_LENGTH(VALUE_DIM) + coordinate + coordinate / SHARE;
    float sum = from[0];
    if (JOINED_APART) {
      for (uint s = 1; s < simdgroups; s++) sum += from[s * apart];
    }
    const uint place = summed.place(coordinate);
    out[row * out_row + place] = summed.number(place, sum, totals[row]);
  }
}
