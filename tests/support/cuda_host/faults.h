// Catches faults of kernels. If a kernel accesses a guard page, has undefined behaviour that its compiled code traps,
// or exceeds its time, its launch ends with an error, as on a GPU, and the process continues. In the build with
// AddressSanitizer, which itself reports illegal accesses and ends the process, this file only limits the time.
#pragma once

#include <string>

#include "standin/launch.h"

namespace standin {

// The signal of a fault, and the address that the signal reports.
struct Fault {
  int signal;
  const void* address;
  cudaError_t code() const;
  std::string text() const;
};

// Whether the code of a kernel is running, and not that of the scheduler. leave_fiber may be called only in a kernel's
// code.
extern volatile bool in_kernel;

// While an object exists, faults of the thread that created it are caught. A launch that takes more than `seconds`
// seconds of processor time is stopped, which is a fault, too.
class CatchFaults {
 public:
  explicit CatchFaults(int seconds);
  ~CatchFaults();
  CatchFaults(const CatchFaults&) = delete;
};

const Fault* caught_fault();  // returns the fault that was caught after the previous call, or null

[[noreturn]] void leave_fiber();  // ends the running thread's fiber, after a fault or an error

}  // namespace standin
