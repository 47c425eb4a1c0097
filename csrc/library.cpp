// What libghostgram says of itself. The ops are the rooms' <op>_c.cpp.
#include "core/c_border.h"
#include "core/isa.h"
#include "core/parallel.h"

#define GG_TEXT(x) #x
#define GG_DOTTED(major, minor, patch) GG_TEXT(major) "." GG_TEXT(minor) "." GG_TEXT(patch)

const char *ghostgram_version(void) {
  return GG_DOTTED(GHOSTGRAM_VERSION_MAJOR, GHOSTGRAM_VERSION_MINOR, GHOSTGRAM_VERSION_PATCH);
}

const char *ghostgram_isa(void) { return gg::isa_name(); }
const char *ghostgram_cuda_state(void) { return GHOSTGRAM_CUDA_STATE; }
int32_t ghostgram_num_threads(void) { return gg::num_threads(); }

ghostgram_status ghostgram_set_num_threads(int32_t threads) {
  return gg::across_border(__func__, [&] {
    gg::expect(threads >= 1 && threads <= 4096, "threads", "1 to 4096", int64_t{threads});
    gg::set_num_threads(threads);
  });
}
