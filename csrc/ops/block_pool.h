// Blocks of memory that are kept for a while when they are freed, and used again for the same size.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <deque>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace ddpm_ext {

// Safe under threads. A block that was not used again for a while goes back to the system, by a thread that lives only
// while blocks are kept. So a pool must live until the process ends.
class BlockPool {
 public:
  using Clock = std::chrono::steady_clock;
  struct State {
    size_t limit, kept, kept_blocks, used;  // bytes, but for kept_blocks
  };

  explicit BlockPool(Clock::duration patience) : patience_(patience) {}

  static BlockPool& instance();  // the pool of the process, which its forks find whole

  // At most this many bytes are kept. 0, which it is at first: none are.
  size_t limit() const { return limit_.load(std::memory_order_relaxed); }
  void set_limit(size_t bytes);

  void* take(size_t bytes);  // nullptr if the system has no such block
  void give(void* block);    // a block of take's
  void release();            // gives all that is kept back to the system
  State state();

 private:
  struct Block {
    void* data;
    size_t size;
    Clock::time_point freed;
  };
  using Blocks = std::vector<Block>;

  Block pop(std::deque<Block>::iterator block);
  Blocks pop_oldest(size_t bytes);
  void start_watch();
  void watch();

  const Clock::duration patience_;
  std::atomic<size_t> limit_{0};
  std::mutex mutex_;  // for all that follows
  std::unordered_map<void*, size_t> used_;
  std::deque<Block> kept_;  // the oldest first
  size_t used_bytes_ = 0, kept_bytes_ = 0;
  bool watched_ = false;
};

}  // namespace ddpm_ext
