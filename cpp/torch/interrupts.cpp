#include "torch/interrupts.h"

#include <atomic>
#include <stdexcept>

namespace pop {

namespace {

using Check = int (*)();
std::atomic<Check> interrupt_check{nullptr};

}  // namespace

void set_interrupt_check(int64_t address) { interrupt_check = reinterpret_cast<Check>(address); }

void InterruptPoll::operator()() {
  const Check check = interrupt_check;
  const auto now = std::chrono::steady_clock::now();
  if (check == nullptr || now - asked_ < std::chrono::milliseconds(50)) return;
  asked_ = now;
  // Python's wrappers know this text (pop_ext.ops.raise_interrupt).
  if (check() != 0) throw std::runtime_error("pop::prefill: interrupted by a signal");
}

}  // namespace pop
