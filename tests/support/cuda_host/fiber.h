// Threads of execution that take turns on one thread of the host, each on a stack of its own.
#pragma once

#include <stddef.h>
#include <ucontext.h>

namespace standin {

// What __builtin_setjmp keeps: it saves no signal mask, so that a switch is a few instructions.
using Place = void* [5];

class Fiber {
 public:
  // body is called once for each time that the fiber is started.
  explicit Fiber(void (*body)(Fiber*));
  ~Fiber();
  Fiber(const Fiber&) = delete;

  void run();      // from outside: goes on with the body until it pauses, or starts it anew after it ended
  void pause();    // from inside
  void abandon();  // from outside: the body is not gone on with, the next run starts it anew
  // From inside, also from a signal's handler: as pause, but abandons the body.
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
