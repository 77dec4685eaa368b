// Lookahead: prefetches the next prompt's rows of hidden into the L2 cache while the main loop multiplies the
// current prompt's rows.

namespace nemo_ext::cpu::NEMO_EXT_VARIANT {

struct Lookahead {
  static constexpr int64_t kLine = 64;

  const char* next = nullptr;
  const char* end = nullptr;

  // The share of the rows that is prefetched while panel `panel` of `panels` is multiplied. With AMX tiles a
  // panel takes so little time that each one must prefetch a share. With vectors the last panel takes long
  // enough to prefetch all rows; until then the L2 cache is left to the current prompt.
  static Lookahead share(const float* rows, int64_t floats, int64_t panel, int64_t panels) {
    const auto* start = reinterpret_cast<const char*>(rows);
#if defined(NEMO_EXT_TILES)
    const int64_t lines = (floats * 4 + kLine - 1) / kLine;
    return {start + panel * lines / panels * kLine, start + (panel + 1) * lines / panels * kLine};
#else
    return panel + 1 == panels ? Lookahead{start, start + floats * 4} : Lookahead{};
#endif
  }

  void fetch(int64_t lines) {
    for (; lines > 0 && next < end; --lines, next += kLine) __builtin_prefetch(next, 0, 2);
  }
};

}  // namespace nemo_ext::cpu::NEMO_EXT_VARIANT
