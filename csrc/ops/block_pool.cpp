#include "ops/block_pool.h"

#include <algorithm>
#include <cstdint>
#include <new>
#include <system_error>
#include <thread>

#ifdef __linux__
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#endif

namespace ddpm_ext {
namespace {

constexpr size_t kPage = 1u << 12;
constexpr size_t kMostOfASize = 4;  // a step may return two tensors while a loop holds two more
constexpr size_t kMostBlocks = 8;
constexpr std::chrono::seconds kPatience{5};

#ifdef __linux__

constexpr size_t kLargePage = 1u << 21;

void* map(size_t size) {
  // Two large pages and more are worth their alignment.
  const bool large = size >= 2 * kLargePage;
  const size_t taken = large ? size + kLargePage : size;
  void* const begin = mmap(nullptr, taken, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (begin == MAP_FAILED) return nullptr;
  if (!large) return begin;
  char* const first = static_cast<char*>(begin);
  const size_t before = (kLargePage - reinterpret_cast<uintptr_t>(begin) % kLargePage) % kLargePage;
  if (before > 0) munmap(first, before);
  munmap(first + before + size, taken - before - size);
#ifdef MADV_HUGEPAGE
  (void)madvise(first + before, size, MADV_HUGEPAGE);  // a hint, which a system without such pages refuses
#endif
  return first + before;
}

void unmap(void* data, size_t size) { munmap(data, size); }

// The pool is locked while a process forks, so that the child finds it whole.
void survive_forks(void (*lock)(), void (*unlock)(), void (*unlock_child)()) {
  pthread_atfork(lock, unlock, unlock_child);
}

// Starts a thread that receives no signals: they are for the threads of the program.
template <class Function>
void start_thread(Function run) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    std::thread(run).detach();
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

#else

constexpr std::align_val_t kAlignment{64};

void* map(size_t size) { return ::operator new(size, kAlignment, std::nothrow); }

void unmap(void* data, size_t) { ::operator delete(data, kAlignment); }

void survive_forks(void (*)(), void (*)(), void (*)()) {}

template <class Function>
void start_thread(Function run) {
  std::thread(run).detach();
}

#endif

}  // namespace

BlockPool& BlockPool::instance() {
  // Never destroyed: tensors may outlive static objects.
  static BlockPool* const pool = [] {
    survive_forks([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                  [] {
                    instance().watched_ = false;  // the thread stayed with the parent
                    instance().mutex_.unlock();
                  });
    return new BlockPool(kPatience);
  }();
  return *pool;
}

void BlockPool::set_limit(size_t bytes) {
  limit_.store(bytes, std::memory_order_relaxed);
  release();
}

BlockPool::Block BlockPool::pop(std::deque<Block>::iterator block) {
  const Block popped = *block;
  kept_bytes_ -= popped.size;
  kept_.erase(block);
  return popped;
}

// The oldest blocks, as many as hold `bytes`.
BlockPool::Blocks BlockPool::pop_oldest(size_t bytes) {
  Blocks popped;
  for (size_t held = 0; held < bytes && !kept_.empty(); held += popped.back().size)
    popped.push_back(pop(kept_.begin()));
  return popped;
}

void* BlockPool::take(size_t bytes) {
  const size_t size = (bytes + kPage - 1) / kPage * kPage;
  if (size < bytes) return nullptr;
  Blocks others;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto same = std::find_if(kept_.rbegin(), kept_.rend(), [&](const Block& b) { return b.size == size; });
    if (same != kept_.rend()) {
      const Block block = pop(std::prev(same.base()));
      used_.emplace(block.data, size);
      used_bytes_ += size;
      return block.data;
    }
    // A size that is not there takes the place of those that were not used for longest, so that a program whose sizes
    // change needs no more memory than it would without the pool.
    others = pop_oldest(size);
  }
  for (const Block& block : others) unmap(block.data, block.size);
  void* data = map(size);
  if (data == nullptr) {
    release();
    data = map(size);
  }
  if (data == nullptr) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex_);
  used_.emplace(data, size);
  used_bytes_ += size;
  return data;
}

void BlockPool::give(void* data) {
  Blocks surplus;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = used_.find(data);
    const size_t size = found->second;
    used_.erase(found);
    used_bytes_ -= size;
    const auto same = std::count_if(kept_.begin(), kept_.end(), [&](const Block& b) { return b.size == size; });
    const Block block{data, size, Clock::now()};
    if (size > limit() || static_cast<size_t>(same) >= kMostOfASize) {
      surplus.push_back(block);
    } else {
      kept_.push_back(block);
      kept_bytes_ += size;
      while (kept_bytes_ > limit() || kept_.size() > kMostBlocks) surplus.push_back(pop(kept_.begin()));
      start_watch();
    }
  }
  for (const Block& block : surplus) unmap(block.data, block.size);
}

void BlockPool::release() {
  Blocks all;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    all = pop_oldest(kept_bytes_);
  }
  for (const Block& block : all) unmap(block.data, block.size);
}

BlockPool::State BlockPool::state() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {limit(), kept_bytes_, kept_.size(), used_bytes_};
}

void BlockPool::start_watch() {
  if (watched_) return;
  try {
    start_thread([this] { watch(); });
    watched_ = true;
  } catch (const std::system_error&) {
    // The system has no thread to spare. The next block that is freed asks again.
  }
}

void BlockPool::watch() {
  for (;;) {
    std::this_thread::sleep_for(patience_);
    Blocks old;
    bool more;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto before = Clock::now() - patience_;
      while (!kept_.empty() && kept_.front().freed <= before) old.push_back(pop(kept_.begin()));
      watched_ = more = !kept_.empty();
    }
    for (const Block& block : old) unmap(block.data, block.size);
    if (!more) return;
  }
}

}  // namespace ddpm_ext
