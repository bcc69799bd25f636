#include "fiber.h"

#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include <new>

#include "control.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace standin {
namespace {

constexpr size_t kStack = size_t{1} << 17;  // bytes of a fiber's stack

// AddressSanitizer must be told of every switch between stacks. host_stack is the stack of the host thread, and
// host_size its size in bytes.
const void* host_stack;
size_t host_size;

void before_switch([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* to, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake_stack, to, size);
#endif
}
void after_switch([[maybe_unused]] void* fake_stack, [[maybe_unused]] bool from_host) {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(fake_stack, &stack, &size);
  if (from_host) host_stack = stack, host_size = size;
#endif
}

[[noreturn, gnu::noinline]] void go(JumpBuffer to) { __builtin_longjmp(to, 1); }

}  // namespace

void poison([[maybe_unused]] void* p, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(p, size);
#endif
}

void unpoison([[maybe_unused]] void* p, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(p, size);
#endif
}

Fiber::Fiber(void (*body)(Fiber*)) : body_(body) {
  const size_t page = sysconf(_SC_PAGESIZE);  // a guard page below the stack, so that an overflow is a fault
  void* memory = mmap(nullptr, page + kStack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<char*>(memory) + page;
  if (mprotect(stack_, kStack, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
}

Fiber::~Fiber() {
  const size_t page = sysconf(_SC_PAGESIZE);
  munmap(stack_ - page, page + kStack);
}

void Fiber::enter(unsigned high, unsigned low) {
  Fiber* fiber = reinterpret_cast<Fiber*>(uintptr_t{high} << 32 | low);
  after_switch(nullptr, true);
  for (;;) {
    fiber->body_(fiber);
    fiber->ended_ = true;
    fiber->pause();
  }
}

[[gnu::noinline]] void Fiber::run() {
  void* fake_stack = nullptr;
  ended_ = false;
  before_switch(&fake_stack, stack_, kStack);
  if (__builtin_setjmp(host_) == 0) {
    if (prepared_) go(here_);
    prepared_ = true;
    getcontext(&start_);
    start_.uc_stack.ss_sp = stack_;
    start_.uc_stack.ss_size = kStack;
    const uintptr_t self = reinterpret_cast<uintptr_t>(this);
    makecontext(&start_, reinterpret_cast<void (*)()>(enter), 2, static_cast<unsigned>(uint64_t{self} >> 32),
                static_cast<unsigned>(self));
    setcontext(&start_);
  }
  after_switch(fake_stack, false);
}

[[gnu::noinline]] void Fiber::pause() {
  void* fake_stack = nullptr;
  before_switch(&fake_stack, host_stack, host_size);
  if (__builtin_setjmp(here_) == 0) go(host_);
  after_switch(fake_stack, true);
}

void Fiber::leave() {
  prepared_ = false;
  before_switch(nullptr, host_stack, host_size);  // null: nothing on this stack is used any more
  go(host_);
}

void Fiber::abandon() {
  prepared_ = false;
  ended_ = true;
  unpoison(stack_, kStack);
}

}  // namespace standin
