// What a kernel knows of an array: element types and the tags of the machine it lies on. No Python, no framework.
#pragma once
#include <cstdint>

// What libghostgram lends to the extension module, under the version node GHOSTGRAM_PRIVATE; all else in it is hidden.
#define GG_LENT __attribute__((visibility("default")))

namespace gg {

enum class DType : uint8_t { f32, f64, bf16, f16, i32, i64, boolean };

static inline const char *name_of(DType t) {
  constexpr const char *names[] = {"float32", "float64", "bfloat16", "float16", "int32", "int64", "bool"};
  return names[static_cast<int>(t)];
}

static constexpr int64_t size_of(DType t) {
  constexpr int64_t sizes[] = {4, 8, 2, 2, 4, 8, 1};
  return sizes[static_cast<int>(t)];
}

// Storage-only half types: arithmetic happens after widening to float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type sums are kept in: float for everything but double.
template <class T> struct accumulator {
  using type = float;
};
template <> struct accumulator<double> {
  using type = double;
};

// `static`, because kernels are compiled once per instruction set and must not share an out-of-line copy.
static constexpr int64_t ceil_div(int64_t n, int64_t m) { return (n + m - 1) / m; }
static constexpr int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
static constexpr int64_t most(int64_t x, int64_t y) { return x < y ? y : x; }

} // namespace gg
