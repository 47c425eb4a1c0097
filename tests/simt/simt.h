// CUDA's execution model on a CPU, for tests: one fiber per thread, one block at a time.
//
// A fiber runs until it must wait: at __syncthreads for its block, at a warp-wide instruction for its 31 neighbours.
// Which waiting fiber runs next, and which block, is drawn from a seed. What a card would leave undefined is made wrong
// on purpose: shared memory starts as NaNs, the target of an asynchronous copy is NaNs until the copy is waited for,
// device buffers end at guard pages. What a card would hang on or reject is an error: barriers that not all threads
// reach, warps whose lanes disagree on the instruction, misaligned copies, copies outside of the block's shared memory,
// more shared memory than the card has, work on another stream than the caller's. What a launcher must not do it cannot
// say here: there is no cudaMalloc, no synchronisation, no copy to or from the host.
// It knows nothing of time, caches or weak memory order, and of shared memory only the dynamic kind.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <exception>
#include <functional>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <ucontext.h>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace simt {

constexpr int warp_size = 32;

struct Copy {
  void *to;
  const void *from;
  int bytes, valid;
};

struct Fiber {
  dim3 thread;
  int warp = 0, lane = 0;
  bool done = false;
  std::jmp_buf resume;
  bool started = false;
  ucontext_t first;
  std::vector<std::vector<Copy>> groups; // committed, oldest first
  std::vector<Copy> open;
};

// Operands on the way into a warp-wide instruction, results on the way out.
struct alignas(16) Slot {
  unsigned char bytes[64];
};

using Site = std::source_location;

struct Warp {
  Slot slot[warp_size];
  const char *instruction = nullptr;
  Site at;
  int arrived = 0;
};

struct Block {
  dim3 index, size, grid;
  std::vector<Fiber> fibers; // of any block; of this one the first `threads`
  int threads = 0;
  std::vector<Warp> warps;
  std::vector<int> ready;
  int current = -1, alive = 0, at_barrier = 0;
  char *shared = nullptr;
  int64_t shared_bytes = 0;
  std::function<void()> kernel;
  std::exception_ptr error;
  std::jmp_buf scheduler;
};

extern Block block;
inline Fiber &current() { return block.fibers[block.current]; }
inline Warp &current_warp() { return block.warps[current().warp]; }
inline Slot &current_slot() { return current_warp().slot[current().lane]; }

struct Settings {
  uint64_t seed = 0;
  int64_t shared_per_multiprocessor = 0;
  void *stream = nullptr; // the caller's: work on any other one would run before or after its time
  std::string error;      // of the last launch that failed
};
extern Settings settings;

void require(bool ok, const char *what);
bool is_shared(const void *at);
void require_shared(const void *at, int64_t bytes, int64_t alignment);

// Whether the stream is settings.stream; if not, settings.error says so.
bool is_callers_stream(void *stream);

void sync_threads();

// Puts the fiber back among those that can run.
void let_others_run();

// Waits until all lanes of the warp have come to the same instruction, at the same place of the source; the last one
// executes it for all. Where lanes come from two branches a card may mix up, or wait forever for, their operands.
void warp_instruction(const char *name, Site at, const std::function<void(Warp &)> &execute);

void copy_async(void *to, const void *from, int bytes, int valid);
void copy_async_commit();
void copy_async_wait(int pending);

// Runs all blocks; false if one failed, and settings.error says how.
bool run_blocks(int64_t blocks, int threads, int64_t shared_bytes, std::function<void()> kernel);

} // namespace simt
