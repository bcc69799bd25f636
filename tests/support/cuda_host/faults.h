// A fault of a kernel, such as an access to a guard page, ends the launch with an error, as on a GPU, not the process;
// and so does the end of its time.
#pragma once

#include <string>

#include "standin/launch.h"

namespace standin {

struct Fault {
  int signal;
  const void* address;
  cudaError_t code() const;
  std::string text() const;
};

// Whether a kernel's code runs, not the scheduler's: a fiber may be left at any instruction of the one alone.
extern volatile bool in_kernel;

// Catches faults of the thread that made it, as long as it lives, and what takes it more than `seconds`.
class CatchFaults {
 public:
  explicit CatchFaults(int seconds);
  ~CatchFaults();
  CatchFaults(const CatchFaults&) = delete;
};

const Fault* caught_fault();  // since the last call; null: none

[[noreturn]] void leave_fiber();  // called where a fault was caught

}  // namespace standin
