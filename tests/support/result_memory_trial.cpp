// A library in which several threads allocate results and free the results of other threads, while the process forks.
#include <ATen/core/Tensor.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

#include "ops/result_memory.h"

namespace {

// A result whose first and last element are a unique mark. If the marks change, its memory was used for another result,
// too.
struct Marked {
  at::Tensor tensor;
  int64_t mark;

  Marked(int64_t size, int64_t mark) : tensor(ddpm_ext::empty_result({size}, at::kLong)), mark(mark) {
    ends()[0] = ends()[tensor.numel() - 1] = mark;
  }
  int64_t* ends() const { return tensor.mutable_data_ptr<int64_t>(); }
  bool whole() const { return ends()[0] == mark && ends()[tensor.numel() - 1] == mark; }
};

std::mutex mutex;  // guards `shelf` and all_whole
std::vector<Marked> shelf;
bool all_whole = true;

std::atomic<bool> done{false};  // tells the threads to stop

void work(int64_t thread) {
  for (int64_t i = 0; !done; ++i) {
    Marked other(40'000 + i / 16 % 2, (thread << 40) + i);
    const std::lock_guard<std::mutex> lock(mutex);
    std::swap(other, shelf[(i * 7 + thread) % shelf.size()]);
    all_whole = all_whole && other.whole();
  }
}

}  // namespace

// Returns whether all marks of results were unchanged, all children ended without an error, and no memory was left, in
// use or kept for reuse.
extern "C" bool try_results(int64_t threads, int64_t forks) {
  ddpm_ext::limit_result_memory(1 << 30);
  for (int64_t i = 0; i < 6; ++i) shelf.emplace_back(40'000, i);
  std::vector<std::thread> all;
  for (int64_t n = 0; n < threads; ++n) all.emplace_back(work, n);
  for (int64_t i = 0; i < forks; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      for (int64_t k = 0; k < 10; ++k) Marked(40'000, k), Marked(40'001, k);
      _exit(0);
    }
    int status = 1;
    all_whole = waitpid(child, &status, 0) == child && status == 0 && all_whole;
  }
  done = true;
  for (std::thread& one : all) one.join();
  shelf.clear();
  ddpm_ext::release_result_memory();
  const ddpm_ext::ResultMemory left = ddpm_ext::result_memory();
  return all_whole && left.kept == 0 && left.used == 0;
}
