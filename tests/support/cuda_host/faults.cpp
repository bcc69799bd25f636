#include "faults.h"

#include <pthread.h>
#include <signal.h>
#include <sys/time.h>

#include <array>
#include <sstream>

namespace standin {
namespace {

#ifdef __SANITIZE_ADDRESS__
// AddressSanitizer itself handles SIGSEGV and SIGBUS, with more detail. Its build has no traps (TRAPS in library.py).
constexpr std::array kSignals = {SIGVTALRM};
#else
constexpr std::array kSignals = {SIGVTALRM, SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
#endif

std::array<struct sigaction, kSignals.size()> previous_actions;
pthread_t launching_thread;
Fault fault;
bool caught = false;

void restore() {
  for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &previous_actions[i], nullptr);
}

void on_fault(int signal, siginfo_t* info, void*) {
  const bool in_launching_thread = pthread_equal(launching_thread, pthread_self());
  // Outside a kernel, the timer's signal is ignored, since it comes again soon. Another thread passes it on to the
  // launching thread.
  if (signal == SIGVTALRM && (!in_launching_thread || !in_kernel)) {
    if (!in_launching_thread) pthread_kill(launching_thread, signal);
    return;
  }
  if (!in_launching_thread) return restore();  // the instruction then faults a second time, for the previous handler
  fault = {signal, info->si_addr};
  caught = true;
  leave_fiber();
}

}  // namespace

volatile bool in_kernel = false;

cudaError_t Fault::code() const { return signal == SIGVTALRM ? cudaErrorLaunchTimeout : cudaErrorIllegalAddress; }

std::string Fault::text() const {
  std::ostringstream s;
  if (signal == SIGVTALRM) {
    s << "the launch timed out";
  } else if (signal == SIGSEGV || signal == SIGBUS) {
    s << "illegal access to address " << address;
  } else {
    s << "undefined behaviour that -fsanitize=undefined looks for, at instruction " << address;
  }
  return s.str();
}

CatchFaults::CatchFaults(int seconds) {
  launching_thread = pthread_self();
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags =
      SA_SIGINFO | SA_NODEFER;  // NODEFER: the handler does not return, so it could not unblock the signal
  for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &action, &previous_actions[i]);
  const itimerval timer = {{0, 10000}, {seconds, 0}};  // fires again every hundredth of a second
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

CatchFaults::~CatchFaults() {
  const itimerval none = {};
  setitimer(ITIMER_VIRTUAL, &none, nullptr);
  restore();
}

const Fault* caught_fault() {
  if (!caught) return nullptr;
  caught = false;
  return &fault;
}

}  // namespace standin
