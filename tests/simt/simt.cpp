#include "simt.h"

#include <algorithm>
#include <csignal>
#include <cstring>
#include <map>
#include <numeric>
#include <sys/mman.h>
#include <unistd.h>

namespace simt {

Block block;
Settings settings;

namespace {

constexpr int64_t stack_bytes = 64 * 1024;
constexpr int most_threads = 1024, poison = 0xff; // all ones: a NaN in every floating format
std::mt19937_64 random_order;
sigjmp_buf fault;

int64_t page_bytes() { return sysconf(_SC_PAGESIZE); }

char *map_pages(int64_t bytes) {
  void *pages = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED)
    throw std::bad_alloc();
  return static_cast<char *>(pages);
}

// Memory between two pages that fault when touched, filled with poison.
struct Guarded {
  char *pages;
  int64_t inner, bytes, before; // bytes between the pages, of the memory asked for, and in front of it

  Guarded(int64_t bytes, bool at_end, int64_t alignment) : bytes(bytes) {
    const int64_t page = page_bytes();
    inner = (bytes + page - 1) / page * page;
    before = at_end ? (inner - bytes) / alignment * alignment : 0;
    pages = map_pages(inner + 2 * page);
    std::memset(pages + page, poison, size_t(inner));
    mprotect(pages, size_t(page), PROT_NONE);
    mprotect(pages + page + inner, size_t(page), PROT_NONE);
  }
  ~Guarded() { munmap(pages, size_t(inner + 2 * page_bytes())); }
  Guarded(const Guarded &) = delete;

  char *data() const { return pages + page_bytes() + before; }
  bool slack_untouched() const {
    const auto untouched = [](const char *from, const char *to) {
      return std::all_of(from, to, [](char c) { return static_cast<unsigned char>(c) == poison; });
    };
    const char *first = pages + page_bytes();
    return untouched(first, data()) && untouched(data() + bytes, first + inner);
  }
};

// Back to the scheduler, until it resumes this fiber.
void wait() {
  if (!_setjmp(current().resume))
    _longjmp(block.scheduler, 1);
}

void finish_fiber() {
  Fiber &fiber = current();
  fiber.done = true;
  --block.alive;
  if (block.alive && block.at_barrier == block.alive) { // threads that have left do not hold the others up
    block.at_barrier = 0;
    for (int i = 0; i < block.threads; ++i)
      if (!block.fibers[i].done)
        block.ready.push_back(i);
  }
}

// One block after the other: to set a fiber up anew for each takes longer than most blocks do.
void enter_fiber() {
  for (;; wait()) {
    try {
      block.kernel();
    } catch (...) {
      block.error = std::current_exception();
    }
    finish_fiber();
  }
}

void run_block(char *stacks, int threads) {
  block.fibers.resize(most_threads);
  block.threads = threads;
  block.warps.assign((threads + warp_size - 1) / warp_size, Warp{});
  block.ready.resize(threads);
  std::iota(block.ready.begin(), block.ready.end(), 0);
  block.alive = threads;
  block.at_barrier = 0;
  block.error = nullptr;
  for (int i = 0; i < threads; ++i) {
    Fiber &fiber = block.fibers[i];
    fiber.thread = {unsigned(i), 0, 0};
    fiber.warp = i / warp_size;
    fiber.lane = i % warp_size;
    fiber.done = false;
    fiber.groups.clear();
    fiber.open.clear();
    if (fiber.started)
      continue;
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = stacks + i * stack_bytes;
    fiber.first.uc_stack.ss_size = stack_bytes;
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, enter_fiber, 0);
  }
  while (block.alive && !block.error) {
    require(!block.ready.empty(), "deadlock: no thread can go on, and not all are at the same barrier");
    std::swap(block.ready[random_order() % block.ready.size()], block.ready.back());
    block.current = block.ready.back();
    block.ready.pop_back();
    if (!_setjmp(block.scheduler)) {
      Fiber &fiber = current();
      if (fiber.started)
        _longjmp(fiber.resume, 1);
      fiber.started = true;
      setcontext(&fiber.first);
    }
  }
  if (block.error)
    std::rethrow_exception(block.error);
}

// Turns memory faults of a kernel into errors of its launch, and leaves those of others alone.
class Faults {
public:
  Faults() {
    struct sigaction action = {};
    action.sa_handler = [](int signal) { siglongjmp(fault, signal); };
    action.sa_flags = SA_ONSTACK;
    stack_t stack = {alternate, 0, sizeof alternate};
    sigaltstack(&stack, &stack_before);
    for (int i = 0; i < 3; ++i)
      sigaction(signals[i], &action, &before[i]);
  }
  ~Faults() {
    for (int i = 0; i < 3; ++i)
      sigaction(signals[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
  }

private:
  static constexpr int signals[3] = {SIGSEGV, SIGBUS, SIGILL};
  static inline char alternate[64 * 1024];
  struct sigaction before[3];
  stack_t stack_before;
};

std::map<void *, Guarded *> &buffers() {
  static std::map<void *, Guarded *> all;
  return all;
}

} // namespace

void require(bool ok, const char *what) {
  if (!ok)
    throw std::runtime_error(what);
}

bool is_shared(const void *at) {
  const char *place = static_cast<const char *>(at);
  return place >= block.shared && place < block.shared + block.shared_bytes;
}

bool is_callers_stream(void *stream) {
  const bool is = stream == settings.stream;
  if (!is)
    settings.error = "work on another stream than the caller's";
  return is;
}

void require_shared(const void *at, int64_t bytes, int64_t alignment) {
  const char *from = static_cast<const char *>(at);
  require(from >= block.shared && from + bytes <= block.shared + block.shared_bytes, "outside of shared memory");
  require(reinterpret_cast<uintptr_t>(at) % alignment == 0, "misaligned address in shared memory");
}

void sync_threads() {
  if (++block.at_barrier < block.alive)
    return wait();
  block.at_barrier = 0;
  for (int i = 0; i < block.threads; ++i)
    if (!block.fibers[i].done && i != block.current)
      block.ready.push_back(i);
}

void let_others_run() {
  block.ready.push_back(block.current);
  wait();
}

void warp_instruction(const char *name, Site at, const std::function<void(Warp &)> &execute) {
  Warp &warp = current_warp();
  if (warp.arrived == 0)
    warp.instruction = name, warp.at = at;
  require(std::strcmp(warp.instruction, name) == 0, "the lanes of a warp are at different instructions");
  require(warp.at.line() == at.line() && warp.at.column() == at.column() &&
              std::strcmp(warp.at.file_name(), at.file_name()) == 0,
          "the lanes of a warp are at the same instruction in different places");
  if (++warp.arrived < warp_size)
    return wait();
  warp.arrived = 0;
  execute(warp);
  for (int lane = 0; lane < warp_size; ++lane)
    if (lane != current().lane)
      block.ready.push_back(current().warp * warp_size + lane);
}

void copy_async(void *to, const void *from, int bytes, int valid) {
  require_shared(to, bytes, bytes);
  require(valid >= 0 && valid <= bytes, "a copy of more bytes than its size");
  require(!valid || reinterpret_cast<uintptr_t>(from) % bytes == 0, "misaligned source of a copy");
  std::memset(to, poison, size_t(bytes));
  current().open.push_back({to, from, bytes, valid});
}

void copy_async_commit() {
  current().groups.push_back(std::move(current().open));
  current().open.clear();
}

void copy_async_wait(int pending) {
  auto &groups = current().groups;
  while (int(groups.size()) > pending) {
    for (const Copy &copy : groups.front()) {
      std::memset(copy.to, 0, size_t(copy.bytes));
      std::memcpy(copy.to, copy.from, size_t(copy.valid));
    }
    groups.erase(groups.begin());
  }
}

bool run_blocks(int64_t blocks, int threads, int64_t shared_bytes, std::function<void()> kernel) {
  constexpr int64_t reserved = 1024; // of the multiprocessor's shared memory, for each block
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > most_threads || threads % warp_size)
    settings.error = "a launch that no card accepts";
  else if (shared_bytes + reserved > settings.shared_per_multiprocessor)
    settings.error = "more shared memory than a block of this card may have";
  if (!settings.error.empty())
    return false;
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  random_order.seed(settings.seed);
  std::shuffle(order.begin(), order.end(), random_order);

  static char *stacks = map_pages(most_threads * stack_bytes);
  block.kernel = std::move(kernel);
  block.size = {unsigned(threads)};
  block.grid = {unsigned(blocks)};
  block.shared_bytes = (shared_bytes + 15) / 16 * 16;
  const Faults faults;
  try {
    for (int64_t i : order) {
      const Guarded shared(block.shared_bytes, true, 16);
      block.shared = shared.data();
      block.index = {unsigned(i), 0, 0};
      if (sigsetjmp(fault, 1) == 0)
        run_block(stacks, threads);
      else
        throw std::runtime_error("memory fault or undefined behaviour in a kernel");
      require(shared.slack_untouched(), "a write in front of shared memory");
    }
  } catch (const std::exception &error) {
    settings.error = error.what();
    block.fibers.clear(); // wherever they stand
  }
  return settings.error.empty();
}

} // namespace simt

// What tests call through ctypes.
extern "C" {
void simt_configure(uint64_t seed, int64_t shared_per_multiprocessor) {
  simt::settings.seed = seed;
  simt::settings.shared_per_multiprocessor = shared_per_multiprocessor;
  simt::settings.error.clear();
}

const char *simt_error() { return simt::settings.error.c_str(); }

// A device buffer that begins at a guard page, or else ends at one as nearly as the alignment allows.
void *simt_allocate(int64_t bytes, bool at_end, int64_t alignment) {
  auto *buffer = new simt::Guarded(bytes, at_end, alignment);
  simt::buffers()[buffer->data()] = buffer;
  return buffer->data();
}

// Whether nothing was written beside the buffer.
bool simt_free(void *data) {
  simt::Guarded *buffer = simt::buffers().at(data);
  simt::buffers().erase(data);
  const bool untouched = buffer->slack_untouched();
  delete buffer;
  return untouched;
}
}
