// Scratch memory that outlives a call: page faults on fresh memory cost a tenth of a small kernel's time.
#pragma once
#include <cstdlib>
#include <new>
#include <sys/mman.h>
#if defined(__SANITIZE_ADDRESS__)
#include <cstring>
#include <sanitizer/asan_interface.h>
#endif

namespace gg::GG_ISA {

// Grows, never shrinks; 64-byte aligned. Make it thread_local in the kernel that uses it. In the namespace of
// the instruction set, as everything that may get an out-of-line copy must be.
class Workspace {
public:
  Workspace() = default;
  Workspace(const Workspace &) = delete;
  Workspace &operator=(const Workspace &) = delete;
  ~Workspace() { std::free(data_); }

  template <class T> T *get(int64_t count) {
    const size_t asked = static_cast<size_t>(count) * sizeof(T);
    size_t bytes = asked ? (asked + 63) & ~size_t{63} : 64; // never null: not even an empty memset may be given that
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      const bool huge = bytes >= huge_page;
      if (huge)
        bytes = (bytes + huge_page - 1) & ~(huge_page - 1);
      data_ = std::aligned_alloc(huge ? huge_page : 64, bytes);
      if (!data_)
        throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
      if (huge) // panels of many megabytes are walked again and again: page walks cost a fifth of the kernel's time
        madvise(data_, bytes, MADV_HUGEPAGE);
#endif
      size_ = bytes;
    }
    lend(asked);
    return static_cast<T *>(data_);
  }

private:
#if defined(__SANITIZE_ADDRESS__)
  // What lies beyond the bytes asked for is out of bounds, though it is ours; what is read before it is written is NaN.
  void lend(size_t asked) {
    ASAN_UNPOISON_MEMORY_REGION(data_, size_);
    if (size_)
      std::memset(data_, 0xff, size_);
    ASAN_POISON_MEMORY_REGION(static_cast<char *>(data_) + asked, size_ - asked);
  }
#else
  void lend(size_t) {}
#endif

  static constexpr size_t huge_page = size_t{2} << 20;
  void *data_ = nullptr;
  size_t size_ = 0;
};

} // namespace gg::GG_ISA
