// A fault of a kernel, such as an access to a guard page, ends the launch with an error, as on a GPU, not the process.
#pragma once

#include <string>

namespace standin {

struct Fault {
  int signal;
  const void* address;
  std::string text() const;
};

// Catches faults of the thread that made it, as long as it lives.
class CatchFaults {
 public:
  CatchFaults();
  ~CatchFaults();
  CatchFaults(const CatchFaults&) = delete;
};

const Fault* caught_fault();  // since the last call; null: none

[[noreturn]] void leave_fiber();  // called where a fault was caught

}  // namespace standin
