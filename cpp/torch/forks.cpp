#include "torch/forks.h"

#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <atomic>

namespace pop {

void check_threads() {
  static std::atomic<pid_t> with_threads{0};  // the process whose work may have started threads; 0: none has
  if (torch::stable::get_num_threads() == 1) return;
  const pid_t here = getpid();
  pid_t found = 0;
  if (with_threads.compare_exchange_strong(found, here)) return;
  check(found == here,
        "pop: expected a process of its own for work on several threads, got one that was forked after its parent had "
        "run such work, in which it would hang: start processes by spawn (multiprocessing.get_context(\"spawn\")), or "
        "call torch.set_num_threads(1) in the child first");
}

}  // namespace pop
