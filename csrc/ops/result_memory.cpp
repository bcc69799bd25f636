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

constexpr size_t kLeastBytes = 1u << 18;  // smaller results need no pool: the C library reuses small blocks itself
constexpr size_t kMostBlocks = 8;         // blocks in the pool: a step may return two tensors, and a loop may hold more
constexpr size_t kHeader = 64;            // bytes before a block's data, with its size: 64 so that the data are aligned

size_t& size_of(char* data) { return *reinterpret_cast<size_t*>(data - kHeader); }

// The freed blocks that wait for reuse. There are never more blocks of a size than were in use at the same time. If a
// program requests a size of which the pool has no block, all blocks are first returned to the system. So a program
// whose sizes change needs no more memory than without the pool. After a loop, its blocks stay in the pool until such a
// request or until release_result_memory().
struct Pool {
  std::mutex mutex;  // guards free_blocks and free_bytes
  std::vector<char*> free_blocks;
  size_t free_bytes = 0;
  std::atomic<size_t> limit{0}, used{0};

  // Empties the pool. Returns its blocks, which the caller must free.
  std::vector<char*> take_all() {
    free_bytes = 0;
    return std::exchange(free_blocks, {});
  }
};

Pool& pool() {
  static Pool* const instance = [] {
    // Locks the pool during a fork. Otherwise another thread might be changing it, and the pool of the child process
    // would stay locked.
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
  std::vector<char*> removed;
  char* data = nullptr;
  {
    const std::lock_guard<std::mutex> lock(pool.mutex);
    const auto match = std::find_if(pool.free_blocks.begin(), pool.free_blocks.end(),
                                    [=](char* block) { return size_of(block) == size; });
    if (match != pool.free_blocks.end()) {
      data = *match;
      pool.free_blocks.erase(match);
      pool.free_bytes -= size;
    } else {
      removed = pool.take_all();
    }
  }
  free_all(removed);
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
    if (pool.free_blocks.size() < kMostBlocks && pool.free_bytes + size <= pool.limit) {
      pool.free_blocks.push_back(data);
      pool.free_bytes += size;
      return;
    }
  }
  free_all({data});
}

// The allocator that torch calls to create and to resize a result's storage.
class ResultAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLeastBytes) return c10::GetCPUAllocator()->allocate(bytes);
    char* const data = allocate_block(bytes);
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &free_block, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

// Returns an uninitialised CPU tensor. It is created without at::empty, since the dispatcher of at::empty takes longer
// than the allocation.
at::Tensor empty_result_strided(at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype) {
  static auto* const result_allocator = new ResultAllocator;  // never destroyed, like the pool
  const size_t bytes = static_cast<size_t>(c10::multiply_integers(size)) * c10::elementSize(dtype);
  c10::Allocator* const allocator =
      bytes >= kLeastBytes && pool().limit > 0 ? result_allocator : c10::GetCPUAllocator();
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
  return {pool().limit, pool().free_bytes, pool().free_blocks.size(), pool().used};
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
