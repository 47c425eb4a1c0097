#include "core/isa.h"

#include <cstdlib>
#include <cstring>

namespace gg {

static Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
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
  Isa wanted = !std::strcmp(wish, "baseline") ? Isa::baseline : !std::strcmp(wish, "avx2") ? Isa::avx2 : most;
  return wanted < most ? wanted : most;
}

Isa isa() {
  static const Isa answer = chosen();
  return answer;
}

const char *isa_name() {
  constexpr const char *names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(isa())];
}

} // namespace gg
