#include <cuda_runtime.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <csetjmp>

#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <bit>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace cuda_shim {

thread_local Lane* lane = nullptr;
dim3 grid_dim, block_dim;

namespace {

std::mutex one_launch_at_a_time;
std::vector<unsigned char> shared;
struct alignas(16) Slot {
  unsigned char bytes[16];
};
std::vector<Slot> slots;    // one per thread of the block
std::atomic<size_t> waits;  // calls of count_wait in this launch

std::vector<Lane> lanes_of(dim3 block_index, dim3 block) {
  std::vector<Lane> lanes;
  for (unsigned z = 0; z < block.z; ++z) {
    for (unsigned y = 0; y < block.y; ++y) {
      for (unsigned x = 0; x < block.x; ++x) {
        lanes.push_back({dim3(x, y, z), block_index, static_cast<unsigned>(lanes.size())});
      }
    }
  }
  return lanes;
}

std::vector<dim3> blocks_of(dim3 grid) {
  std::vector<dim3> blocks;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back(dim3(x, y, z));
    }
  }
  return blocks;
}

void begin_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  waits = 0;
  grid_dim = grid;
  block_dim = block;
  shared.resize(shared_bytes + 128);
  slots.resize(block.x * block.y * block.z + kWarpSize);
}

void end_launch(dim3 grid, dim3 block, const char* early) {
  const size_t threads = size_t{grid.x} * grid.y * grid.z * block.x * block.y * block.z;
  if (early == nullptr || waits == threads) return;
  throw std::runtime_error(std::string(early) + ": expected a wait for kernels in front in each of " +
                           std::to_string(threads) + " threads, got " + std::to_string(waits));
}

void begin_block() { std::memset(shared.data(), 0xff, shared.size()); }

}  // namespace

void count_wait() { ++waits; }

void* dynamic_shared() {
  const uintptr_t base = reinterpret_cast<uintptr_t>(shared.data());
  return reinterpret_cast<void*>((base + 127) / 128 * 128);
}

void* warp_slot(unsigned warp_lane) { return slots[lane->index / kWarpSize * kWarpSize + warp_lane].bytes; }

#if defined(POP_CUDA_SHIM_THREADS)

namespace {

// Where the lanes of a warp meet without any ordering of memory that ThreadSanitizer would see: relaxed operations on
// one word, and waits in the kernel.
class LanesMeeting {
 public:
  explicit LanesMeeting(size_t lanes) : word_(of({0, 0, static_cast<uint16_t>(lanes)})) {}

  void arrive_and_wait() {
    const State before = change([](State& state) { ++state.arrived; });
    const auto current = [&] { return std::bit_cast<State>(word_.load(std::memory_order_relaxed)); };
    while (current().round == before.round) futex(FUTEX_WAIT_PRIVATE, before.round);
  }

  void drop() {
    change([](State& state) { --state.lanes; });
  }

 private:
  struct State {
    uint32_t round;
    uint16_t arrived, lanes;
  };

  static uint64_t of(State state) { return std::bit_cast<uint64_t>(state); }

  // Applies the change; if that makes everybody present, begins the next round and wakes them. Returns the state
  // before.
  template <class Change>
  State change(const Change& apply) {
    uint64_t old = word_.load(std::memory_order_relaxed);
    for (;;) {
      State state = std::bit_cast<State>(old);
      apply(state);
      const bool complete = state.arrived > 0 && state.arrived == state.lanes;
      if (complete) {
        ++state.round;
        state.arrived = 0;
      }
      if (!word_.compare_exchange_weak(old, of(state), std::memory_order_relaxed)) continue;
      if (complete) futex(FUTEX_WAKE_PRIVATE, INT32_MAX);
      return std::bit_cast<State>(old);
    }
  }

  void futex(int operation, uint32_t value) { syscall(SYS_futex, &word_, operation, value, nullptr, nullptr, 0); }

  std::atomic<uint64_t> word_;  // a State; the futex is its first half, the round
};

std::unique_ptr<std::barrier<>> block_meeting;
std::vector<std::unique_ptr<std::barrier<>>> warp_meetings;
std::vector<std::unique_ptr<LanesMeeting>> lanes_meetings;

}  // namespace

void block_barrier() { block_meeting->arrive_and_wait(); }
void warp_barrier() { warp_meetings[lane->index / kWarpSize]->arrive_and_wait(); }
void lanes_meet() { lanes_meetings[lane->index / kWarpSize]->arrive_and_wait(); }
void yield() { std::this_thread::yield(); }

// The threads live as long as the launch. Each block has its own barriers, since a thread that returned no longer takes
// part.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body, const char* early) {
  std::lock_guard lock(one_launch_at_a_time);
  begin_launch(grid, block, shared_bytes);
  const std::vector<dim3> blocks = blocks_of(grid);
  std::vector<Lane> lanes = lanes_of(dim3(), block);
  const size_t count = lanes.size();
  const auto next_block = [count]() noexcept {
    begin_block();
    block_meeting = std::make_unique<std::barrier<>>(count);
    warp_meetings.clear();
    lanes_meetings.clear();
    for (size_t first = 0; first < count; first += kWarpSize) {
      const size_t lanes = std::min<size_t>(kWarpSize, count - first);
      warp_meetings.push_back(std::make_unique<std::barrier<>>(lanes));
      lanes_meetings.push_back(std::make_unique<LanesMeeting>(lanes));
    }
  };
  next_block();
  std::barrier between(static_cast<std::ptrdiff_t>(count), next_block);
  std::vector<std::thread> threads;
  for (Lane& own : lanes) {
    threads.emplace_back([&] {
      lane = &own;
      for (const dim3& index : blocks) {
        own.block = index;
        body();
        warp_meetings[own.index / kWarpSize]->arrive_and_drop();
        lanes_meetings[own.index / kWarpSize]->drop();
        block_meeting->arrive_and_drop();
        between.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  end_launch(grid, block, early);
}

#else

namespace {

enum class State { ready, at_block_barrier, at_warp_barrier, done };

constexpr size_t kStackBytes = 128 << 10;

// swapcontext enters a context once. After that _setjmp and _longjmp switch, which make no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool entered = false;
  std::unique_ptr<char[]> stack;
  Lane lane;
  State state = State::ready;
};

std::vector<Fiber> fibers;
ucontext_t scheduler_context;
jmp_buf scheduler;
Fiber* running = nullptr;
const std::function<void()>* current_body = nullptr;
unsigned first_to_run = 0;  // changes from block to block, since a kernel must not depend on the order

void enter() {
  (*current_body)();
  running->state = State::done;
  _longjmp(scheduler, 1);
}

void wait(State state) {
  Fiber* self = running;
  self->state = state;
  if (_setjmp(self->resume) == 0) _longjmp(scheduler, 1);
}

// Runs a fiber until it waits or ends.
void resume(Fiber& fiber) {
  running = &fiber;
  lane = &fiber.lane;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.entered) _longjmp(fiber.resume, 1);
  fiber.entered = true;
  swapcontext(&scheduler_context, &fiber.context);
}

// Resumes threads that all wait at one barrier; false if there are none.
bool release(size_t begin, size_t end, State barrier) {
  bool any = false;
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i].state == State::done) continue;
    if (fibers[i].state != barrier) return false;
    any = true;
  }
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i].state == barrier) fibers[i].state = State::ready;
  }
  return any;
}

void run_block(const std::vector<Lane>& lanes) {
  const size_t count = lanes.size();
  if (fibers.size() < count) fibers.resize(count);
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
    fiber.lane = lanes[i];
    fiber.state = State::ready;
    fiber.entered = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  first_to_run = (first_to_run * 5 + 3) % 1021;
  for (;;) {
    bool progress = false, alive = false;
    for (size_t i = 0; i < count; ++i) {
      Fiber& fiber = fibers[(i + first_to_run) % count];
      if (fiber.state != State::ready) continue;
      resume(fiber);
      progress = true;
    }
    for (size_t first = 0; first < count; first += kWarpSize) {
      progress |= release(first, std::min<size_t>(first + kWarpSize, count), State::at_warp_barrier);
    }
    progress |= release(0, count, State::at_block_barrier);
    for (size_t i = 0; i < count; ++i) alive |= fibers[i].state != State::done;
    if (!alive) return;
    if (!progress) throw std::runtime_error("cuda_shim: threads of a block wait at different barriers");
  }
}

}  // namespace

void block_barrier() { wait(State::at_block_barrier); }
void warp_barrier() { wait(State::at_warp_barrier); }
void lanes_meet() { warp_barrier(); }
void yield() { wait(State::ready); }

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body, const char* early) {
  std::lock_guard lock(one_launch_at_a_time);
  begin_launch(grid, block, shared_bytes);
  current_body = &body;
  for (const dim3& index : blocks_of(grid)) {
    begin_block();
    run_block(lanes_of(index, block));
  }
  lane = nullptr;
  end_launch(grid, block, early);
}

#endif

}  // namespace cuda_shim
