// Fibers: functions with separate stacks that take turns on one thread of the host. A thread of a kernel is a fiber.
#pragma once

#include <stddef.h>
#include <ucontext.h>

namespace standin {

// The memory in which __builtin_setjmp saves where to continue. It saves no signal mask, so a switch takes only a few
// instructions.
using JumpBuffer = void* [5];

class Fiber {
 public:
  // Creates a fiber. Each start of the fiber calls `body` once.
  explicit Fiber(void (*body)(Fiber*));
  ~Fiber();
  Fiber(const Fiber&) = delete;

  // Called outside the fiber: continues the body until it pauses or ends. If it has ended, starts it.
  void run();
  // Called in the body: returns to the caller of run().
  void pause();
  // Called outside the fiber: discards the body's state, so that the next run() starts it from its beginning.
  void abandon();
  // Called in the body, even in a signal handler: returns to the caller of run() and discards the body's state.
  [[noreturn]] void leave();

  bool ended() const { return ended_; }

 private:
  static void enter(unsigned high, unsigned low);

  void (*body_)(Fiber*);
  char* stack_;
  ucontext_t start_;
  JumpBuffer here_, host_;
  bool ended_ = true, prepared_ = false;
};

}  // namespace standin
