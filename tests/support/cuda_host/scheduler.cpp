// Runs a launch: the blocks one after the other, and the threads of a block in turns. The seed decides both orders. A
// thread runs until it reaches a barrier or ends, then another thread runs. Barriers open only when no thread can run.
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "control.h"
#include "faults.h"
#include "fiber.h"
#include "standin/launch.h"
#include "standin/threads.h"

namespace standin {
namespace {

constexpr unsigned kMaxThreads = 1024;

struct Error {
  cudaError_t code = cudaSuccess;
  std::string text;
};
Error error;       // of the current launch
Error last_error;  // for cudaGetLastError and cudaGetErrorString

enum class State { ready, at_block_barrier, at_warp_barrier, ended };

struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned number;
  State state;
  Site site;      // where in the source it waits
  unsigned mask;  // the lanes that take part in the warp barrier at which it waits
  uint64_t bits;  // the value that the thread passes to a shuffle, for the other threads of the warp

  Thread();
};

std::vector<std::unique_ptr<Thread>> threads;  // reused by later launches
unsigned live;                                 // the number of threads of the current block
Thread* running;
void (*kernel_call)(void*);
void* kernel;

Thread::Thread()
    : fiber([](Fiber*) {
        in_kernel = true;
        kernel_call(kernel);
        in_kernel = false;
      }) {}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint32_t below(uint64_t n) {  // splitmix64
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return static_cast<uint32_t>(((z ^ z >> 31) >> 32) * n >> 32);
  }
  template <class T>
  void shuffle(std::vector<T>& v) {
    for (size_t n = v.size(); n > 1; --n) std::swap(v[n - 1], v[below(n)]);
  }

 private:
  uint64_t state_;
};

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}
std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

// Sets the error of the launch, if it has none yet.
void fail(cudaError_t code, const std::string& what) {
  if (error.code == cudaSuccess) error = {code, what + " in block " + text(blockIdx)};
}

bool same(Site a, Site b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

// Pauses the running thread until its barrier opens.
void wait(State state, unsigned mask, Site site) {
  running->state = state;
  running->mask = mask;
  running->site = site;
  in_kernel = false;
  running->fiber.pause();
  in_kernel = true;
}

// Returns the threads of the warp barrier at which `first` waits: those in its mask. Returns none if a thread of the
// mask does not wait at that barrier.
std::vector<Thread*> met_in_warp(const Thread& first) {
  std::vector<Thread*> met;
  for (unsigned i = 0; i < warpSize; ++i) {
    if ((first.mask >> i & 1) == 0) continue;
    const unsigned number = first.number / warpSize * warpSize + i;
    if (number >= live) return {};
    Thread& t = *threads[number];
    if (t.state != State::at_warp_barrier || t.mask != first.mask || !same(t.site, first.site)) return {};
    met.push_back(&t);
  }
  return met;
}

// Opens every barrier that all of its threads have reached. Returns whether there was such a barrier. A thread that has
// ended does not take part in the block's barriers.
bool open_barriers() {
  bool all = true, opened = false;
  const Thread* first = nullptr;
  for (unsigned i = 0; i < live; ++i) {
    const Thread& t = *threads[i];
    if (t.state == State::ended) continue;
    if (first == nullptr) first = &t;
    all = all && t.state == State::at_block_barrier && same(t.site, first->site);
  }
  for (unsigned i = 0; i < live; ++i) {
    Thread& t = *threads[i];
    if (all && t.state == State::at_block_barrier) t.state = State::ready, opened = true;
    if (t.state != State::at_warp_barrier) continue;
    for (Thread* met : met_in_warp(t)) met->state = State::ready, opened = true;
  }
  return opened;
}

// Describes how many threads wait at which barriers, for an error message.
std::string describe_waiting() {
  std::string result;
  std::vector<bool> told(live);
  for (unsigned i = 0; i < live; ++i) {
    const Thread& t = *threads[i];
    if (told[i] || t.state == State::ended) continue;
    unsigned count = 0;
    for (unsigned k = i; k < live; ++k) {
      const Thread& other = *threads[k];
      if (other.state != t.state || !same(other.site, t.site)) continue;
      told[k] = true;
      ++count;
    }
    result += (result.empty() ? "" : ", ") + std::to_string(count) + " wait at " + text(t.site);
  }
  return result;
}

void run_block(Random& random) {
  std::vector<Thread*> turns;
  for (unsigned i = 0; i < live; ++i) {
    threads[i]->state = State::ready;
    turns.push_back(threads[i].get());
  }
  while (!turns.empty()) {
    random.shuffle(turns);
    for (Thread* thread : turns) {
      running = thread;
      threadIdx = thread->index;
      thread->state = State::ready;
      thread->fiber.run();
      if (const Fault* fault = caught_fault()) fail(fault->code(), fault->text());
      if (error.code != cudaSuccess) {
        error.text += ", thread " + text(thread->index);
        return;
      }
      if (thread->fiber.ended()) thread->state = State::ended;
    }
    const bool opened = open_barriers();
    turns.clear();
    unsigned waiting = 0;
    for (unsigned i = 0; i < live; ++i) {
      if (threads[i]->state == State::ready) turns.push_back(threads[i].get());
      if (threads[i]->state != State::ended) ++waiting;
    }
    if (!opened && waiting > 0) {
      return fail(cudaErrorLaunchFailure, "barriers that never open: of " + std::to_string(live) + " threads, " +
                                              std::to_string(live - waiting) + " ended, " + describe_waiting());
    }
  }
}

bool valid(dim3 grid, dim3 block) {
  const uint64_t count = uint64_t{block.x} * block.y * block.z;
  return grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535 &&
         count >= 1 && count <= kMaxThreads && block.x <= 1024 && block.y <= 1024 && block.z <= 64;
}

void run_grid(dim3 grid, dim3 block) {
  gridDim = grid;
  blockDim = block;
  live = block.x * block.y * block.z;
  while (threads.size() < live) threads.push_back(std::make_unique<Thread>());
  for (unsigned i = 0; i < live; ++i) {
    threads[i]->number = i;
    threads[i]->index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
  Random random(control.seed);
  std::vector<uint64_t> order;
  if (control.blocks) {
    order = *control.blocks;
  } else {
    const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
    for (uint64_t i = 0; i < count; ++i) order.push_back(i);
  }
  random.shuffle(order);
  const CatchFaults catching(control.seconds);
  for (const uint64_t number : order) {
    blockIdx = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                static_cast<unsigned>(number / grid.x / grid.y)};
    run_block(random);
    count_sectors();
    if (error.code == cudaSuccess) continue;
    for (auto& thread : threads) thread->fiber.abandon();
    return;
  }
}

}  // namespace

void wait_for_block(Site site) { wait(State::at_block_barrier, 0, site); }

void wait_for_warp(unsigned mask, Site site) {
  if ((mask >> lane() & 1) == 0) {
    fail(cudaErrorLaunchFailure, "a mask without the calling thread at " + text(site));
    leave_fiber();
  }
  wait(State::at_warp_barrier, mask, site);
}

int lane() { return static_cast<int>(running->number % warpSize); }
unsigned warp() { return running->number / warpSize; }

uint64_t exchange(unsigned mask, uint64_t bits, int source, Site site) {
  running->bits = bits;
  wait_for_warp(mask, site);
  if ((mask >> source & 1) == 0) {
    fail(cudaErrorLaunchFailure, "a shuffle from a thread that the mask leaves out at " + text(site));
    leave_fiber();
  }
  const uint64_t result = threads[running->number / warpSize * warpSize + source]->bits;
  wait_for_warp(mask, site);  // waits until all threads have read the bits
  return result;
}

void note_stream(cudaStream_t stream) { control.works.push_back({stream, current_device}); }

void leave_fiber() {
  in_kernel = false;
  running->fiber.leave();
}

cudaError_t launch(const cudaLaunchConfig_t& config, void (*call)(void*), void* kernel_of_launch) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  control.launches.push_back({config.gridDim, config.blockDim});
  note_stream(config.stream);
  error = {};
  if (control.refuse || !valid(config.gridDim, config.blockDim)) {
    error = {cudaErrorInvalidConfiguration, "invalid configuration argument"};
  } else {
    kernel_call = call;
    kernel = kernel_of_launch;
    run_grid(config.gridDim, config.blockDim);
  }
  if (error.code != cudaSuccess) last_error = error;
  return error.code;
}

}  // namespace standin

cudaError_t cudaGetLastError() {
  const cudaError_t code = standin::last_error.code;
  standin::last_error.code = cudaSuccess;
  return code;
}

cudaError_t cudaMalloc(void** p, size_t bytes) {
  if (standin::control.full > 0) {
    --standin::control.full;
    standin::last_error = {cudaErrorMemoryAllocation, "out of memory"};
    return cudaErrorMemoryAllocation;
  }
  *p = malloc(bytes);
  memset(*p, 0xa5, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = standin::current_device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = standin::kMultiprocessors[device];
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaSuccess ? "no error" : standin::last_error.text.c_str();
}
