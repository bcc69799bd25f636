#include "ops/result_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/strides.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>
#include <vector>

namespace ddpm_ext {
namespace {

constexpr size_t kLeast = 1u << 18;  // the C library itself keeps smaller blocks
constexpr size_t kMostBlocks = 8;    // a step may return two tensors, and a loop may hold more
constexpr size_t kHeader = 64;       // bytes before a block's data: hold its size, keep its alignment

size_t& size_of(char* data) { return *reinterpret_cast<size_t*>(data - kHeader); }

// The freed blocks that are kept. There are never more blocks of a size than were in use at once. A request for a size
// that is not in the pool first returns all blocks to the system. So a program whose sizes change needs no more memory
// than without the pool. When a loop ends, its blocks stay until such a request or until release_result_memory().
struct Pool {
  std::mutex mutex;  // guards kept and kept_bytes
  std::vector<char*> kept;
  size_t kept_bytes = 0;
  std::atomic<size_t> limit{0}, used{0};

  std::vector<char*> take_all() {
    kept_bytes = 0;
    return std::exchange(kept, {});
  }
};

Pool& pool() {
  static Pool* const instance = [] {
    // Locks the pool during a fork, so that the child process finds it in a consistent state.
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
    return new Pool;  // never destroyed: tensors may outlive static objects
  }();
  return *instance;
}

void free_all(const std::vector<char*>& blocks) {
  for (char* const data : blocks) c10::free_cpu(data - kHeader);
}

char* allocate_block(size_t size) {
  Pool& pool = ddpm_ext::pool();
  std::vector<char*> evicted;
  char* data = nullptr;
  {
    const std::lock_guard<std::mutex> lock(pool.mutex);
    const auto match =
        std::find_if(pool.kept.begin(), pool.kept.end(), [=](char* kept) { return size_of(kept) == size; });
    if (match != pool.kept.end()) {
      data = *match;
      pool.kept.erase(match);
      pool.kept_bytes -= size;
    } else {
      evicted = pool.take_all();
    }
  }
  free_all(evicted);
  if (data == nullptr) {
    data = static_cast<char*>(c10::alloc_cpu(size + kHeader)) + kHeader;
    size_of(data) = size;
  }
  pool.used += size;
  return data;
}

void free_block(void* block) {
  c10::profiledCPUMemoryReporter().Delete(block);
  Pool& pool = ddpm_ext::pool();
  char* const data = static_cast<char*>(block);
  const size_t size = size_of(data);
  pool.used -= size;
  {
    const std::lock_guard<std::mutex> lock(pool.mutex);
    if (pool.kept.size() < kMostBlocks && pool.kept_bytes + size <= pool.limit) {
      pool.kept.push_back(data);
      pool.kept_bytes += size;
      return;
    }
  }
  free_all({data});
}

// The allocator that torch calls to create and to resize a result's storage.
class ResultAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLeast) return c10::GetCPUAllocator()->allocate(bytes);
    char* const data = allocate_block(bytes);
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &free_block, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

// Creates a tensor without at::empty, whose dispatch takes longer than the allocation.
at::Tensor empty_result_strided(at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype) {
  static auto* const result_allocator = new ResultAllocator;  // never destroyed, like the pool
  const size_t bytes = static_cast<size_t>(c10::multiply_integers(size)) * c10::elementSize(dtype);
  c10::Allocator* const allocator = bytes >= kLeast && pool().limit > 0 ? result_allocator : c10::GetCPUAllocator();
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  return at::Tensor(at::detail::empty_strided_generic(size, stride, allocator, keys, dtype));
}

}  // namespace

at::Tensor empty_result_like(const at::Tensor& like, at::ScalarType dtype) {
  if (!like.is_cpu()) return at::empty_like(like, like.options().dtype(dtype));
  if (like.is_non_overlapping_and_dense()) return empty_result_strided(like.sizes(), like.strides(), dtype);
  return empty_result_strided(like.sizes(), at::infer_dense_strides(like.sizes(), like.strides()), dtype);
}

at::Tensor empty_result(at::IntArrayRef size, const at::TensorOptions& options) {
  const at::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  if (!options.device().is_cpu()) return at::empty(size, options);
  return empty_result_strided(size, c10::contiguous_strides(size), dtype);
}

ResultMemory result_memory() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  return {pool().limit, pool().kept_bytes, pool().kept.size(), pool().used};
}

void release_result_memory() {
  std::unique_lock<std::mutex> lock(pool().mutex);
  const std::vector<char*> blocks = pool().take_all();
  lock.unlock();
  free_all(blocks);
}

void limit_result_memory(size_t bytes) {
  pool().limit = bytes;
  release_result_memory();
}

}  // namespace ddpm_ext
