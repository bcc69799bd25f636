// Fibers: threads of execution that take turns on one thread of the host. Each fiber has its own stack.
#pragma once

#include <stddef.h>
#include <ucontext.h>

namespace standin {

// The state that __builtin_setjmp saves. It has no signal mask, so a switch takes only a few instructions.
using Place = void* [5];

class Fiber {
 public:
  // `body` is called once each time the fiber is started.
  explicit Fiber(void (*body)(Fiber*));
  ~Fiber();
  Fiber(const Fiber&) = delete;

  void run();      // from outside: continues the body until it pauses, or restarts it after its end
  void pause();    // from inside
  void abandon();  // from outside: drops the body's state, so that the next run restarts it
  // From inside, even from a signal handler: like pause, but drops the body's state.
  [[noreturn]] void leave();

  bool ended() const { return ended_; }

 private:
  static void enter(unsigned high, unsigned low);
  void return_to_host(void** fake_stack);

  void (*body_)(Fiber*);
  char* stack_;
  ucontext_t start_;
  Place here_, host_;
  bool ended_ = true, prepared_ = false;
};

}  // namespace standin
