// Faults of kernels. A kernel that touches a guard page, or that exceeds its time, ends its launch with an error, as on
// a GPU. It does not end the process.
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

// Whether a kernel's code is running, as opposed to the scheduler's. A fiber may only be left while it is.
extern volatile bool in_kernel;

// During its lifetime, catches faults of the thread that created it, and stops work that takes more than `seconds`.
class CatchFaults {
 public:
  explicit CatchFaults(int seconds);
  ~CatchFaults();
  CatchFaults(const CatchFaults&) = delete;
};

const Fault* caught_fault();  // the fault since the last call, or null

[[noreturn]] void leave_fiber();  // called after a fault was caught

}  // namespace standin
