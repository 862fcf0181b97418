#if VALUE_SPREAD
const float of_values[Blocks<CODED_VALUE>::count] = {$value_hartley};
add_rotated<CODED_VALUE>(coded, of_values, v_signs, lane, plain);
#else
UNROLL for (uint i = 0; i < Lanes<CODED_VALUE>::each; i++) {
  const uint at = i * Lanes<CODED_VALUE>::count + lane;
  if (lane < Lanes<CODED_VALUE>::count) out_coded[out_row * CODED_VALUE + at] = coded[i] / all.total;
}
#endif
UNROLL for (uint i = 0; i < Lanes<EXACT_VALUE>::each; i++) {
  const uint at = i * Lanes<EXACT_VALUE>::count + lane;
  if (lane < Lanes<EXACT_VALUE>::count) out[out_row * EXACT_VALUE + at] = OUT_TYPE(plain[i] / all.total);
}
