// Which instruction set this machine runs, and the choice among the per-ISA copies of a kernel.
#pragma once
#include "core/array.h"

namespace gg {

enum class Isa { baseline, avx2, avx512, avx512bf16 };

// The best set that the processor has and the build contains; GHOSTGRAM_ISA=<one of them> lowers it.
GG_LENT Isa isa();
GG_LENT const char *isa_name();

} // namespace gg

// Defines `void gg::<op>_cpu(const Args &)`, which calls gg::<isa>::<op>.
#if defined(__x86_64__)
#define GG_PER_ISA(op, Args)                                                                                           \
  namespace gg::baseline {                                                                                             \
  void op(const Args &);                                                                                               \
  }                                                                                                                    \
  namespace gg::avx2 {                                                                                                 \
  void op(const Args &);                                                                                               \
  }                                                                                                                    \
  namespace gg::avx512 {                                                                                               \
  void op(const Args &);                                                                                               \
  }                                                                                                                    \
  namespace gg::avx512bf16 {                                                                                           \
  void op(const Args &);                                                                                               \
  }                                                                                                                    \
  void gg::op##_cpu(const Args &args) {                                                                                \
    switch (isa()) {                                                                                                   \
    case Isa::avx512bf16: return avx512bf16::op(args);                                                                 \
    case Isa::avx512: return avx512::op(args);                                                                         \
    case Isa::avx2: return avx2::op(args);                                                                             \
    default: return baseline::op(args);                                                                                \
    }                                                                                                                  \
  }
#else
#define GG_PER_ISA(op, Args)                                                                                           \
  namespace gg::baseline {                                                                                             \
  void op(const Args &);                                                                                               \
  }                                                                                                                    \
  void gg::op##_cpu(const Args &args) { baseline::op(args); }
#endif
