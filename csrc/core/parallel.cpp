#include "core/parallel.h"

#include <atomic>
#include <cstdlib>
#include <dlfcn.h>
#include <exception>
#include <mutex>
#include <pthread.h>
#include <sched.h>
#include <thread>
#include <utility>
#include <vector>

namespace gg {
namespace {

// About 20 us of polling: longer than the gap between two phases of one kernel, shorter than anyone would notice.
constexpr int spins_before_sleep = 2000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct Job {
  void (*body)(void *, int64_t);
  void *context;
  int64_t tasks;
};

// libgomp's entry point for a parallel region: runs body(context) on every thread of a team.
using OpenmpRegion = void (*)(void (*body)(void *), void *context, unsigned threads, unsigned flags);
std::atomic<OpenmpRegion> openmp_region{nullptr};
std::atomic<int (*)()> openmp_threads{nullptr}; // how many that runtime would use, which torch.set_num_threads sets

thread_local bool inside_task = false; // whatever a task calls runs serially

class Pool {
public:
  void run(const Job &job, int threads) {
    std::unique_lock<std::mutex> alone(in_use_, std::try_to_lock);
    if (!alone.owns_lock() || threads <= 1 || job.tasks <= 1)
      return serial(job);
    job_ = job;
    next_.store(0, std::memory_order_relaxed);
    on_team(threads);
    if (failing_.test(std::memory_order_relaxed)) {
      failing_.clear(std::memory_order_relaxed);
      std::rethrow_exception(std::exchange(failure_, nullptr));
    }
  }

  static void serial(const Job &job) {
    for (int64_t task = 0; task < job.tasks; ++task)
      job.body(job.context, task);
  }

private:
  void on_team(int threads) {
    if (OpenmpRegion region = openmp_region.load(std::memory_order_relaxed))
      return region(
          [](void *self) {
            const Alone alone;
            static_cast<Pool *>(self)->claim();
          },
          this, static_cast<unsigned>(job_.tasks < threads ? job_.tasks : threads), 0);
    grow(threads - 1);
    uint32_t helpers = static_cast<uint32_t>(job_.tasks - 1 < threads - 1 ? job_.tasks - 1 : threads - 1);
    working_.store(static_cast<int>(helpers), std::memory_order_relaxed);
    state_.store((state_.load(std::memory_order_relaxed) & ~helper_mask) + epoch_step + helpers,
                 std::memory_order_release);
    state_.notify_all();
    claim();
    for (int spins = 0; working_.load(std::memory_order_acquire) != 0; ++spins)
      if (spins < 20 * spins_before_sleep)
        relax();
      else
        std::this_thread::yield();
  }

  // The first exception of a job is the caller's, once all threads are done; tasks that nobody has claimed are dropped.
  void claim() {
    try {
      for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < job_.tasks;)
        job_.body(job_.context, task);
    } catch (...) {
      next_.store(job_.tasks, std::memory_order_relaxed);
      if (!failing_.test_and_set(std::memory_order_relaxed))
        failure_ = std::current_exception(); // seen by the caller, who waits for this thread
    }
  }

  void grow(int workers) {
    while (static_cast<int>(threads_.size()) < workers) {
      uint32_t rank = static_cast<uint32_t>(threads_.size());
      threads_.emplace_back([this, rank, seen = state_.load(std::memory_order_acquire)] { work(rank, seen); });
      threads_.back().detach(); // they sleep until the process ends
    }
  }

  void work(uint32_t rank, uint32_t seen);

  std::mutex in_use_;
  std::vector<std::thread> threads_;
  Job job_{};
  std::atomic<int> working_{0};
  std::atomic<int64_t> next_{0};
  std::atomic_flag failing_; // whether failure_ is some thread's to write
  std::exception_ptr failure_;
  // The number of the job and of the workers that take part in it, in one word: a worker that wakes late can never
  // pair one job with another's count. A worker outside the count never touches job_, so the next run may overwrite it.
  std::atomic<uint32_t> state_{0};
  static constexpr uint32_t helper_mask = 0xfff, epoch_step = 0x1000;
};

void Pool::work(uint32_t rank, uint32_t seen) {
  inside_task = true;
  for (;;) {
    for (int spins = 0; state_.load(std::memory_order_acquire) == seen && spins < spins_before_sleep; ++spins)
      relax();
    state_.wait(seen, std::memory_order_acquire);
    seen = state_.load(std::memory_order_acquire);
    if (rank >= (seen & helper_mask))
      continue;
    claim();
    working_.fetch_sub(1, std::memory_order_release);
  }
}

Pool *pool = nullptr;
std::once_flag pool_made;

Pool &the_pool() {
  std::call_once(pool_made, [] {
    pool = new Pool; // never deleted: its workers outlive static destructors
    // The parent's workers do not exist in a forked child, and its locks may be held by nobody: leave them behind.
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return *pool;
}

int usable_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    return CPU_COUNT(&set);
  return static_cast<int>(std::thread::hardware_concurrency());
}

int wished_threads() {
  const char *wish = std::getenv("GHOSTGRAM_NUM_THREADS");
  return wish ? std::atoi(wish) : 0;
}

std::atomic<int> &set_threads() { // 0: as many as the runtime that was borrowed would use, or else as there are cores
  static std::atomic<int> n{wished_threads()};
  return n;
}

} // namespace

bool borrow_openmp() {
  // RTLD_NOLOAD: only what is there already. A runtime that was unloaded again cannot be noticed, but none ever is.
  if (void *runtime = dlopen("libgomp.so.1", RTLD_NOLOAD | RTLD_LAZY)) {
    openmp_threads.store(reinterpret_cast<int (*)()>(dlsym(runtime, "omp_get_max_threads")), std::memory_order_relaxed);
    openmp_region.store(reinterpret_cast<OpenmpRegion>(dlsym(runtime, "GOMP_parallel")), std::memory_order_relaxed);
  }
  return openmp_region.load(std::memory_order_relaxed) != nullptr;
}

int num_threads() {
  if (const int n = set_threads().load(std::memory_order_relaxed); n > 0)
    return n;
  if (const auto of_openmp = openmp_threads.load(std::memory_order_relaxed))
    return of_openmp();
  static const int cores = usable_cores();
  return cores;
}

void set_num_threads(int n) { set_threads().store(n < 1 ? 1 : n > 4096 ? 4096 : n, std::memory_order_relaxed); }

void parallel_run(int64_t tasks, void (*body)(void *, int64_t), void *context) {
  Job job{body, context, tasks};
  if (inside_task || tasks <= 1)
    return Pool::serial(job);
  const Alone alone;
  the_pool().run(job, num_threads());
}

Alone::Alone() : outer_(std::exchange(inside_task, true)) {}
Alone::~Alone() { inside_task = outer_; }

} // namespace gg
