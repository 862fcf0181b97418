// Tokens that have left a sequence's window since its numbers were written: whole blocks, the first of which may be smaller.
// `Windows.aged` in veloxlab/cache/counts.py is the same.
FUNCTION uint aged(const global_memory uint* own, uint recent_end) {
  const uint recent = recent_end - own[1], window = own[7], block = own[8], less = own[9];
  return recent < window + block ? 0 : (recent - window + less) / block * block - less;
}
