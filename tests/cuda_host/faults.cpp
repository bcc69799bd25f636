#include "faults.h"

#include <pthread.h>
#include <signal.h>

#include <array>
#include <sstream>

namespace standin {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr std::array<int, 0> kSignals = {};  // its own report says more
#else
constexpr std::array<int, 4> kSignals = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
#endif

std::array<struct sigaction, kSignals.size()> before;
pthread_t owner;
Fault fault;
bool caught = false;

void restore() {
  for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &before[i], nullptr);
}

void on_fault(int signal, siginfo_t* info, void*) {
  if (!pthread_equal(owner, pthread_self()))
    return restore();  // not ours: it faults again, under who handled it before
  fault = {signal, info->si_addr};
  caught = true;
  leave_fiber();
}

}  // namespace

std::string Fault::text() const {
  std::ostringstream s;
  if (signal == SIGSEGV || signal == SIGBUS) {
    s << "illegal access to address " << address;
  } else {
    s << "undefined behaviour, of those that -fsanitize=undefined looks for, at instruction " << address;
  }
  return s.str();
}

CatchFaults::CatchFaults() {
  owner = pthread_self();
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;  // the handler doesn't return, so nothing would unblock the signal
  for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &action, &before[i]);
}

CatchFaults::~CatchFaults() { restore(); }

const Fault* caught_fault() {
  if (!caught) return nullptr;
  caught = false;
  return &fault;
}

}  // namespace standin
