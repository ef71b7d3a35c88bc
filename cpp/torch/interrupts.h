// Signals such as Ctrl+C during a long call. Python notes a signal when it arrives and handles it between bytecodes:
// for an operator, after its end. So a call polls.
#pragma once

#include <chrono>
#include <cstdint>

namespace pop {

// Sets the function to poll: its result is not 0 if the handler of a signal that had arrived raised an exception, which
// the function keeps for Python. `address` 0: none.
void set_interrupt_check(int64_t address);

class InterruptPoll {
 public:
  // Throws std::runtime_error if the call is to end. Asks at most every 50 ms, since asking takes the interpreter's
  // lock, which another thread may hold for 5 ms.
  void operator()();

 private:
  std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
};

}  // namespace pop
