// What both kinds of grad_project's kernels share: how they are launched, and the words they draw.
#pragma once
#include "core/device.cuh"
#include "core/philox.h"
#include "grad_project/grad_project.h"

namespace gg {
namespace {

constexpr int stages = 4, threads = 256;

// Launches are planned for a card of 132 multiprocessors with two blocks each.
constexpr int64_t wanted_blocks = 264;

struct Words {
  uint64_t at[4];
  __device__ Words(const GradProject &s, int64_t col, int64_t row_word, int64_t purpose)
      : at{uint64_t(col), uint64_t(row_word), uint64_t(purpose), s.layer} {
    philox4x32_10(at, s.seed);
  }
};

} // namespace
} // namespace gg
