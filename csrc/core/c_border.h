// The border of C: what comes is checked, and no exception crosses. For the <op>_c.cpp of rooms, each of which has a
// struct Call that makes the room's `args` of a ghostgram_<op>_args or refuses it, for the doors at the end of this
// file.
#pragma once
#include "core/array.h"
#include "core/cuda_device.h"
#include "core/parallel.h"
#include "include/ghostgram/ghostgram.h"
#include <cstring>
#include <initializer_list>
#include <string>
#include <utility>

namespace gg {

// What is thrown on this side of the border.
struct Failure {
  ghostgram_status status;
  std::string text;
};

// The exception in flight as a status; its text becomes the thread's last error.
ghostgram_status failed(const char *function) noexcept;

template <class Body> ghostgram_status across_border(const char *function, Body &&body) noexcept {
  try {
    body();
    return GHOSTGRAM_OK;
  } catch (...) {
    return failed(function);
  }
}

// Throws "<argument>: expected <what>, got <what came>"; `expect` unless `ok`.
[[noreturn]] void refuse(const char *argument, const std::string &expected, const std::string &got);
void expect(bool ok, const char *argument, const char *expected, int64_t got);
void expect(bool ok, const char *argument, const char *expected, double got);
void expect_not_null(const char *argument, const void *pointer);
void expect_flag(const char *argument, int32_t value); // 0 or 1
void expect_zero(const char *argument, int32_t value);
void expect_sizes(std::initializer_list<std::pair<const char *, int64_t>> sizes);

// What a caller's struct says to this version; `size` is ours. The bytes that a newer one has beyond it must be 0.
void expect_known(const void *given, size_t size);
template <class Args> const Args &known(const Args *given) {
  expect_known(given, sizeof(Args));
  return *given;
}

constexpr DType sums_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }
DType floating(const char *argument, ghostgram_dtype dtype);
DType integer(const char *argument, ghostgram_dtype dtype);
DType either(const char *argument, ghostgram_dtype dtype, DType one, DType other);

// Memory for an array of this shape: there, unless there are no elements or it is not `needed`, and aligned. Where rows
// have a stride of their own it keeps them apart.
void expect_array(const char *argument, const void *data, DType dtype, std::initializer_list<int64_t> shape,
                  bool needed = true);
void expect_rows(const char *argument, int64_t stride, int64_t rows, int64_t columns);

void expect_float32(DType dtype); // or a narrower one, where CUDA kernels take no float64
void expect_workspace(const void *workspace, size_t bytes, int64_t needed);
[[noreturn]] void refuse_for_want_of_cuda();
void expect_success(const char *failure); // of core/cuda_device.h

template <auto kernel, class Args> void run_on_cpu(const Args &args) {
  if (args.work() < least_shared_work) {
    const Alone alone;
    return kernel(args);
  }
  kernel(args);
}

} // namespace gg

// The functions of an op for C.
#define GG_C_DOORS(op)                                                                                                 \
  ghostgram_status ghostgram_##op(const ghostgram_##op##_args *given) {                                                \
    return gg::across_border("ghostgram_" #op, [&] {                                                                   \
      const gg::Call call(gg::known(given));                                                                           \
      call.check_on_cpu();                                                                                             \
      gg::run_on_cpu<gg::op##_cpu>(call.args);                                                                         \
    });                                                                                                                \
  }
#define GG_CUDA_DOORS(op)                                                                                              \
  ghostgram_status ghostgram_##op##_cuda_workspace(const ghostgram_##op##_args *given, size_t *bytes) {                \
    return gg::across_border("ghostgram_" #op "_cuda_workspace", [&] {                                                 \
      const gg::Call call(gg::known(given));                                                                           \
      call.check_on_cuda();                                                                                            \
      gg::expect_not_null("bytes", bytes);                                                                             \
      *bytes = static_cast<size_t>(gg::op##_cuda_workspace(call.args));                                                \
    });                                                                                                                \
  }                                                                                                                    \
  ghostgram_status ghostgram_##op##_cuda(const ghostgram_##op##_args *given, void *workspace, size_t bytes,            \
                                         void *stream) {                                                               \
    return gg::across_border("ghostgram_" #op "_cuda", [&] {                                                           \
      const gg::Call call(gg::known(given));                                                                           \
      call.check_on_cuda();                                                                                            \
      gg::expect_workspace(workspace, bytes, gg::op##_cuda_workspace(call.args));                                      \
      gg::expect_success(gg::cuda_failure(-1, [&] { return gg::op##_cuda(call.args, workspace, stream); }));           \
    });                                                                                                                \
  }
#define GG_NO_CUDA_DOORS(op)                                                                                           \
  ghostgram_status ghostgram_##op##_cuda_workspace(const ghostgram_##op##_args *, size_t *) {                          \
    return gg::across_border("ghostgram_" #op "_cuda_workspace", [] { gg::refuse_for_want_of_cuda(); });               \
  }                                                                                                                    \
  ghostgram_status ghostgram_##op##_cuda(const ghostgram_##op##_args *, void *, size_t, void *) {                      \
    return gg::across_border("ghostgram_" #op "_cuda", [] { gg::refuse_for_want_of_cuda(); });                         \
  }
