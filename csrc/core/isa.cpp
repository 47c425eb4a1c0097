#include "core/isa.h"

#include <cstdlib>
#include <cstring>

namespace gg {

constexpr const char *names[] = {"baseline", "avx2", "avx512", "avx512bf16"};

static Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

static Isa chosen() {
  Isa most = best();
  const char *wish = std::getenv("GHOSTGRAM_ISA");
  if (!wish)
    return most;
  for (int i = 0; i <= static_cast<int>(most); ++i)
    if (!std::strcmp(wish, names[i]))
      return static_cast<Isa>(i);
  return most;
}

Isa isa() {
  static const Isa answer = chosen();
  return answer;
}

const char *isa_name() { return names[static_cast<int>(isa())]; }

} // namespace gg
