#include "core/c_border.h"

#include <cstdio>
#include <exception>
#include <new>

namespace gg {
namespace {

thread_local char last_error[1024]; // of a fixed size: to say that memory is out takes none

constexpr const char *dtype_names[] = {"none", "FLOAT32", "FLOAT64", "BFLOAT16", "FLOAT16", "INT32", "INT64", "BOOL"};

std::string said(ghostgram_dtype dtype) {
  return dtype >= GHOSTGRAM_FLOAT32 && dtype <= GHOSTGRAM_BOOL ? dtype_names[dtype] : std::to_string(dtype);
}

ghostgram_dtype code_of(DType dtype) { return static_cast<ghostgram_dtype>(dtype) + GHOSTGRAM_FLOAT32; }
static_assert(static_cast<int>(DType::f32) + GHOSTGRAM_FLOAT32 == GHOSTGRAM_FLOAT32);
static_assert(static_cast<int>(DType::boolean) + GHOSTGRAM_FLOAT32 == GHOSTGRAM_BOOL);

DType within(const char *argument, ghostgram_dtype dtype, DType first, DType last, const char *expected) {
  if (dtype < code_of(first) || dtype > code_of(last))
    refuse(argument, expected, said(dtype));
  return static_cast<DType>(dtype - GHOSTGRAM_FLOAT32);
}

std::string shape_text(std::initializer_list<int64_t> shape) {
  std::string text;
  for (int64_t n : shape)
    text += (text.empty() ? "" : ", ") + std::to_string(n);
  return "(" + text + ")";
}

ghostgram_status say(const char *function, const char *text, ghostgram_status status) {
  std::snprintf(last_error, sizeof last_error, "%s: %s", function, text);
  return status;
}

} // namespace

ghostgram_status failed(const char *function) noexcept {
  try {
    throw;
  } catch (const Failure &failure) {
    return say(function, failure.text.c_str(), failure.status);
  } catch (const std::bad_alloc &) {
    return say(function, "out of memory", GHOSTGRAM_NO_MEMORY);
  } catch (const std::exception &error) {
    return say(function, error.what(), GHOSTGRAM_INTERNAL);
  } catch (...) {
    return say(function, "an unknown exception", GHOSTGRAM_INTERNAL);
  }
}

void refuse(const char *argument, const std::string &expected, const std::string &got) {
  throw Failure{GHOSTGRAM_INVALID, std::string(argument) + ": expected " + expected + ", got " + got};
}

void expect(bool ok, const char *argument, const char *expected, int64_t got) {
  if (!ok)
    refuse(argument, expected, std::to_string(got));
}

void expect(bool ok, const char *argument, const char *expected, double got) {
  if (ok)
    return;
  char text[32];
  std::snprintf(text, sizeof text, "%.17g", got);
  refuse(argument, expected, text);
}

void expect_not_null(const char *argument, const void *pointer) {
  if (!pointer)
    refuse(argument, "an address", "NULL");
}

void expect_flag(const char *argument, int32_t value) {
  expect(value == 0 || value == 1, argument, "0 or 1", int64_t{value});
}

void expect_zero(const char *argument, int32_t value) { expect(value == 0, argument, "0", int64_t{value}); }

void expect_sizes(std::initializer_list<std::pair<const char *, int64_t>> sizes) {
  for (const auto &[argument, size] : sizes)
    expect(size >= 0, argument, "at least 0", size);
}

void expect_known(const void *given, size_t size) {
  expect_not_null("args", given);
  size_t theirs;
  std::memcpy(&theirs, given, sizeof theirs);
  if (theirs < size)
    refuse("args.struct_size", "sizeof *args, " + std::to_string(size) + " or more", std::to_string(theirs));
  for (size_t at = size; at < theirs; ++at)
    if (static_cast<const unsigned char *>(given)[at])
      refuse("args",
             "nothing set beyond the " + std::to_string(size) + " bytes that this version, " + ghostgram_version() +
                 ", knows",
             "something at byte " + std::to_string(at));
}

DType floating(const char *argument, ghostgram_dtype dtype) {
  return within(argument, dtype, DType::f32, DType::f16, "FLOAT32, FLOAT64, BFLOAT16 or FLOAT16");
}

DType integer(const char *argument, ghostgram_dtype dtype) {
  return within(argument, dtype, DType::i32, DType::i64, "INT32 or INT64");
}

DType either(const char *argument, ghostgram_dtype dtype, DType one, DType other) {
  for (DType choice : {one, other})
    if (dtype == code_of(choice))
      return choice;
  refuse(argument, one == other ? said(code_of(one)) : said(code_of(one)) + " or " + said(code_of(other)), said(dtype));
}

void expect_array(const char *argument, const void *data, DType dtype, std::initializer_list<int64_t> shape,
                  bool needed) {
  int64_t bytes = size_of(dtype);
  bool too_many = false, empty = false;
  for (int64_t n : shape)
    empty |= n == 0, too_many |= __builtin_mul_overflow(bytes, n, &bytes);
  if (too_many && !empty)
    refuse(argument, "fewer than 2^63 bytes", std::string(name_of(dtype)) + " " + shape_text(shape));
  if (!data && needed && !empty)
    refuse(argument, std::string(name_of(dtype)) + " " + shape_text(shape), "NULL");
  if (data && reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(size_of(dtype)))
    refuse(argument, "an address that is a multiple of " + std::to_string(size_of(dtype)),
           std::to_string(reinterpret_cast<uintptr_t>(data)));
}

void expect_rows(const char *argument, int64_t stride, int64_t rows, int64_t columns) {
  if (rows > 1 && stride < columns)
    refuse(argument, "at least " + std::to_string(columns) + ", so that rows do not overlap", std::to_string(stride));
}

void expect_float32(DType dtype) {
  if (dtype == DType::f64)
    refuse("dtype", "FLOAT32, BFLOAT16 or FLOAT16 on a card", "FLOAT64");
}

void expect_workspace(const void *workspace, size_t bytes, int64_t needed) {
  if (bytes < static_cast<size_t>(needed))
    refuse("workspace_bytes", "at least " + std::to_string(needed), std::to_string(bytes));
  if (needed)
    expect_not_null("workspace", workspace);
  const auto address = reinterpret_cast<uintptr_t>(workspace);
  if (address % 16)
    refuse("workspace", "an address that is a multiple of 16", std::to_string(address));
}

void refuse_for_want_of_cuda() { throw Failure{GHOSTGRAM_NO_CUDA, std::string("CUDA is ") + ghostgram_cuda_state()}; }

void expect_success(const char *failure) {
  if (failure)
    throw Failure{GHOSTGRAM_CUDA_ERROR, failure};
}

} // namespace gg

const char *ghostgram_last_error(void) { return gg::last_error; }
