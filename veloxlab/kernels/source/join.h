// Columns begin .. end of a head's window, with the newest token, which is in no buffer yet, in its place.
template <int DIM, typename T>
FUNCTION void copy_tokens(
    const global_memory T* from, uint stride, uint begin, uint end, uint newest, const global_memory T* joining,
    uint joining_stride, uint thread_id, global_memory T* to) {
  constexpr uint each = 16 / sizeof(T), parts = DIM / each; // numbers are copied as 16 bytes
  for (uint i = begin * parts + thread_id; i < end * parts; i += THREADS) {
    const uint token = i / parts, at = i % parts * each;
    if (token != newest) *(global_memory uint4*)(to + token * DIM + at) = *(const global_memory uint4*)(from + token * stride + at);
  }
  if (begin > newest || newest >= end) return;
  for (uint i = thread_id; i < DIM; i += THREADS) to[newest * DIM + i] = joining[i * joining_stride];
}
