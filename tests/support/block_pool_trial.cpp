// Tries BlockPool with threads, forks and time. Prints "good" where every block was whole and all came back.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#include "ops/block_pool.h"

using ddpm_ext::BlockPool;

namespace {

constexpr size_t kSizes[] = {300'000, 300'001, 1 << 20, 3 << 20, 5 << 20};

void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("%s\n", what);
  std::fflush(stdout);
  std::_Exit(1);
}

struct Held {
  unsigned char* data;
  size_t size;
  unsigned char mark;
};

Held take(BlockPool& pool, size_t size, unsigned char mark) {
  auto* const data = static_cast<unsigned char*>(pool.take(size));
  check(data != nullptr, "no memory");
  for (size_t i = 0; i < size; i += 4096) data[i] = mark;
  data[size - 1] = mark;
  return {data, size, mark};
}

void give(BlockPool& pool, const Held& held) {
  bool whole = held.data[held.size - 1] == held.mark;
  for (size_t i = 0; i < held.size; i += 4096) whole &= held.data[i] == held.mark;
  check(whole, "a block was written by two");
  pool.give(held.data);
}

// Blocks that threads hand on to one another, so that many are freed by another thread than took them.
struct Shelf {
  std::mutex mutex;
  std::vector<Held> held;

  Held swap(Held mine, size_t at) {
    const std::lock_guard<std::mutex> lock(mutex);
    std::swap(held[at % held.size()], mine);
    return mine;
  }
};

void threads(BlockPool& pool) {
  Shelf shelf;
  for (int i = 0; i < 6; ++i) shelf.held.push_back(take(pool, kSizes[i % 5], 200));
  std::vector<std::thread> all;
  for (unsigned char n = 0; n < 6; ++n)
    all.emplace_back([&pool, &shelf, n] {
      std::mt19937 random(n);
      for (int i = 0; i < 120; ++i) {
        give(pool, shelf.swap(take(pool, kSizes[random() % 5], n), random()));
        if (random() % 50 == 0) pool.release();
      }
    });
  for (std::thread& one : all) one.join();
  for (const Held& held : shelf.held) give(pool, held);
}

void same_block_again(BlockPool& pool) {
  pool.release();
  void* const first = pool.take(1 << 20);
  pool.give(first);
  check(pool.take(1 << 20) == first, "a block that was kept was not used again");
  check(pool.state().used == 1 << 20 && pool.state().kept == 0, "the state is wrong");
  pool.give(first);
}

void bounds(BlockPool& pool) {
  std::vector<void*> blocks;
  for (int i = 0; i < 6; ++i) blocks.push_back(pool.take(1 << 20));
  for (void* block : blocks) pool.give(block);
  check(pool.state().kept == 4 << 20, "not four blocks of a size were kept");
  pool.give(pool.take(2 << 20));
  check(pool.state().kept == (2 + 2) << 20, "a new size did not take the place of old blocks");
  pool.set_limit(2 << 20);
  pool.give(pool.take(1 << 20));
  pool.give(pool.take((2 << 20) + 1));
  check(pool.state().kept <= 2 << 20, "more is kept than the limit");
  pool.set_limit(0);
  pool.give(pool.take(1 << 20));
  check(pool.state().kept == 0, "a block was kept with limit 0");
  pool.set_limit(64 << 20);
}

// The child inherits blocks that are used and blocks that are kept, from amid the other threads' work.
void forks(BlockPool& pool) {
  std::atomic<bool> done{false};
  std::thread other([&] {
    while (!done) give(pool, take(pool, kSizes[2], 7));
  });
  for (int i = 0; i < 8; ++i) {
    const Held mine = take(pool, kSizes[3], 9);
    const pid_t child = fork();
    if (child == 0) {
      give(pool, mine);
      for (int j = 0; j < 10; ++j) give(pool, take(pool, kSizes[j % 5], 8));
      std::_Exit(0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    check(status == 0, "a fork failed");
    give(pool, mine);
  }
  done = true;
  other.join();
}

void patience() {
  static auto& pool = *new BlockPool(std::chrono::milliseconds(20));  // its thread may still be asleep at the end
  pool.set_limit(64 << 20);
  for (int round = 0; round < 3; ++round) {
    pool.give(pool.take(1 << 20));
    while (pool.state().kept > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace

int main(int argc, char** argv) {
  BlockPool& pool = BlockPool::instance();
  // What is still kept later must not depend on how long a busy machine takes until then.
  static auto& patient = *new BlockPool(std::chrono::hours(24));
  for (BlockPool* each : {&pool, &patient}) {
    check(each->limit() == 0, "the limit is not 0 at first");
    each->set_limit(64 << 20);
  }
  same_block_again(patient);
  threads(pool);
  if (argc > 1 && std::strcmp(argv[1], "forks") == 0) forks(pool);
  bounds(patient);
  patience();
  for (BlockPool* each : {&pool, &patient}) {
    each->release();
    check(each->state().kept == 0 && each->state().used == 0, "not all blocks came back");
  }
  check(pool.take(SIZE_MAX) == nullptr && pool.take(SIZE_MAX / 2) == nullptr, "a block larger than memory was given");
  std::puts("good");
}
