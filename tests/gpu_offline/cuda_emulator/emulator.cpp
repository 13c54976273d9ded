#include "emulator.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#ifdef EMULATOR_ADDRESS_SANITIZER
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMULATOR_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
#endif

#ifndef __x86_64__
#error "the switch between fibers is written for x86-64"
#endif

// Saves the registers that a function must preserve and the stack pointer, and takes up another stack.
extern "C" void emulator_switch(void** saved_stack, void* other_stack);
asm(".text\n"
    "emulator_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");

namespace emulator {
namespace {

constexpr int kSavedRegisters = 6;
constexpr unsigned kWarp = 32;

// ---- what the sanitizers must be told

#ifdef EMULATOR_THREAD_SANITIZER
constexpr bool kReuseStacks = false;      // a fiber must not look ordered after the one whose stack it has
constexpr size_t kStackBytes = 32 << 10;  // fresh ones cost time
void release(void* tag) { __tsan_release(tag); }
void acquire(void* tag) { __tsan_acquire(tag); }
#else
constexpr bool kReuseStacks = true;
constexpr size_t kStackBytes = 256 << 10;
void release(void*) {}
void acquire(void*) {}
#endif

#ifdef EMULATOR_THREAD_SANITIZER
// What ThreadSanitizer takes for threads. A launch begins with those that the last one began with, and takes as many as
// it can before it takes one again: two blocks that share them look as if one came after the other.
class Contexts {
 public:
  void* take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (next_ == kMost) next_ = 0;
    if (next_ == made_.size()) made_.push_back(__tsan_create_fiber(0));
    return made_[next_++];
  }

  void begin_launch() { next_ = 0; }

 private:
  static constexpr size_t kMost = 1280;  // each takes 0.8 MB; more than two blocks of 512 threads
  std::mutex mutex_;
  std::vector<void*> made_;
  size_t next_ = 0;
};

Contexts& contexts() {
  static Contexts all;
  return all;
}
#endif

// Memory that threads may still have been working on when their launch was given up: to free it would look like a race.
void abandon(std::unique_ptr<char[]>& memory) { static_cast<void>(memory.release()); }

enum class State { ready, at_barrier, in_shuffle, done };

struct Fiber {
  Thread thread;
  unsigned number = 0;
  State state = State::ready;
  Place place{};
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack;
  unsigned barriers = 0;  // reached so far
  uint32_t mask = 0;
  uint64_t value = 0;
  int source = 0;
#ifdef EMULATOR_THREAD_SANITIZER
  void* context = nullptr;
#endif
};

// One bit for each thread that can run.
class ReadySet {
 public:
  void insert(unsigned number) { words_[number / 64] |= uint64_t{1} << number % 64; }
  void erase(unsigned number) { words_[number / 64] &= ~(uint64_t{1} << number % 64); }

  std::optional<unsigned> first_from(unsigned number) const {
    for (unsigned i = number; i < kSize; i = (i / 64 + 1) * 64)
      if (const uint64_t word = words_[i / 64] >> i % 64) return i + static_cast<unsigned>(__builtin_ctzll(word));
    return std::nullopt;
  }

  std::optional<unsigned> last_before(unsigned number) const {
    for (unsigned end = number; end > 0; end = (end - 1) / 64 * 64)
      if (const uint64_t word = words_[(end - 1) / 64] << (63 - (end - 1) % 64))
        return end - 1 - static_cast<unsigned>(__builtin_clzll(word));
    return std::nullopt;
  }

  static constexpr unsigned kSize = 1024;

 private:
  uint64_t words_[kSize / 64] = {};
};

std::string text(Index index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string text(Place place) { return std::string(place.file) + ":" + std::to_string(place.line); }

class Block {
 public:
  Block(Index size, void (*kernel)(void*), void* arguments) : size_(size), kernel_(kernel), arguments_(arguments) {
    fibers_.resize(size_t{size.x} * size.y * size.z);
  }

  // What went wrong, or nothing.
  std::string run(Index index, Index grid_size, uint64_t seed);

  // Orders what follows after everything that the blocks have done.
  void join() { acquire(&ended_); }

  // ---- called by fibers

  Fiber& current() { return *current_; }
  void barrier(Place place);
  uint64_t shuffle(uint32_t mask, uint64_t value, int source, Place place);
  void* shared_memory(const void* key, size_t bytes);
  void enter();

 private:
  void start(Fiber& fiber);
  void finish(Fiber& fiber);
  void clean_up();
  void resume(Fiber& fiber);
  void leave();
  void be_scheduler();
  void be_thread();
  [[noreturn]] void fail(const std::string& what, Place place);
  std::optional<unsigned> choose();
  std::string complaint() const;
  void complete_shuffle(unsigned first_of_warp, uint32_t mask);
  std::string missing_lanes(unsigned first_of_warp, uint32_t mask) const;

  Index size_;
  void (*kernel_)(void*);
  void* arguments_;
  std::vector<Fiber> fibers_;
  ReadySet ready_;
  unsigned last_ = 0;
  unsigned waiting_ = 0;  // at the barrier
  Place barrier_place_{};
  unsigned done_ = 0;
  std::mt19937_64 random_;
  std::string failure_;
  std::map<const void*, std::unique_ptr<char[]>> shared_;
  Fiber* current_ = nullptr;
  void* scheduler_stack_ = nullptr;
  char started_ = 0, ended_ = 0, shared_made_ = 0, barriers_[2] = {};  // tags
#ifdef EMULATOR_THREAD_SANITIZER
  void* scheduler_context_ = nullptr;
#endif
#ifdef EMULATOR_ADDRESS_SANITIZER
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_bytes_ = 0;
#endif
};

thread_local Block* this_block = nullptr;

void enter_fiber() { this_block->enter(); }

std::string Block::run(Index index, Index grid_size, uint64_t seed) {
  this_block = this;
  random_.seed(seed);
  waiting_ = done_ = 0;
  const Order order = options().order;
  last_ = order == Order::reverse ? 0 : static_cast<unsigned>(fibers_.size()) - 1;
  for (unsigned number = 0; number < fibers_.size(); ++number) {
    Fiber& fiber = fibers_[number];
    fiber.number = number;
    const Index position{number % size_.x, number / size_.x % size_.y, number / size_.x / size_.y};
    fiber.thread = {position, index, size_, grid_size};
    start(fiber);
  }
  release(&started_);
  while (const std::optional<unsigned> number = choose()) {
    last_ = *number;
    resume(fibers_[*number]);
    if (!failure_.empty()) break;
  }
  if (failure_.empty()) failure_ = complaint();
  clean_up();
  return failure_;
}

// In a context of its own: were this thread ordered after the block, so would be the next block that it runs.
void Block::clean_up() {
#ifdef EMULATOR_THREAD_SANITIZER
  void* const worker = __tsan_get_current_fiber();
  void* const cleaner = contexts().take();
  __tsan_switch_to_fiber(cleaner, __tsan_switch_to_fiber_no_sync);
#endif
  acquire(&ended_);
  for (Fiber& fiber : fibers_) finish(fiber);
  for (auto& [key, memory] : shared_)
    if (!failure_.empty()) abandon(memory);
  shared_.clear();
#ifdef EMULATOR_THREAD_SANITIZER
  __tsan_switch_to_fiber(worker, __tsan_switch_to_fiber_no_sync);
#endif
}

std::optional<unsigned> Block::choose() {
  const unsigned count = static_cast<unsigned>(fibers_.size());
  switch (options().order) {
    case Order::forward:
      if (const auto next = ready_.first_from(last_ + 1)) return next;
      return ready_.first_from(0);
    case Order::reverse:
      if (const auto next = ready_.last_before(last_)) return next;
      return ready_.last_before(ReadySet::kSize);
    case Order::greedy:
      return ready_.first_from(0);
    case Order::greedy_reverse:
      return ready_.last_before(ReadySet::kSize);
    case Order::random:
      break;
  }
  const unsigned somewhere = static_cast<unsigned>(random_() % count);
  if (const auto next = ready_.first_from(somewhere)) return next;
  return ready_.first_from(0);
}

// Nobody can run: either all have returned, or some wait for what will never happen.
std::string Block::complaint() const {
  if (done_ == fibers_.size()) return "";
  for (const Fiber& fiber : fibers_) {
    if (fiber.state == State::in_shuffle)
      return "warp operation at " + text(fiber.place) + ": lanes of its mask never reach it; block " +
             text(fiber.thread.block) + ", thread " + text(fiber.thread.thread);
  }
  const Fiber& fiber = *std::find_if(fibers_.begin(), fibers_.end(),
                                     [](const Fiber& candidate) { return candidate.state == State::at_barrier; });
  return "barrier at " + text(fiber.place) + ": reached by " + std::to_string(waiting_) + " of " +
         std::to_string(fibers_.size()) + " threads of block " + text(fiber.thread.block);
}

// ---- fibers

void Block::start(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  const uintptr_t end = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) & ~uintptr_t{15};
  void** top = reinterpret_cast<void**>(end);
  *--top = nullptr;  // where enter_fiber would return to
  *--top = reinterpret_cast<void*>(&enter_fiber);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.barriers = 0;
  fiber.state = State::ready;
  ready_.insert(fiber.number);
#ifdef EMULATOR_THREAD_SANITIZER
  fiber.context = contexts().take();
#endif
}

void Block::finish(Fiber& fiber) {
  ready_.erase(fiber.number);
  if (!failure_.empty()) abandon(fiber.stack);
  if (!kReuseStacks) fiber.stack.reset();
}

// Whose accesses ThreadSanitizer sees from now on.
void Block::be_thread() {
#ifdef EMULATOR_THREAD_SANITIZER
  scheduler_context_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(current_->context, __tsan_switch_to_fiber_no_sync);
#endif
}

void Block::be_scheduler() {
#ifdef EMULATOR_THREAD_SANITIZER
  __tsan_switch_to_fiber(scheduler_context_, __tsan_switch_to_fiber_no_sync);
#endif
}

void Block::resume(Fiber& fiber) {
  current_ = &fiber;
  be_thread();
#ifdef EMULATOR_ADDRESS_SANITIZER
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackBytes);
#endif
  emulator_switch(&scheduler_stack_, fiber.stack_pointer);
#ifdef EMULATOR_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Block::leave() {
  Fiber& fiber = *current_;
  be_scheduler();
#ifdef EMULATOR_ADDRESS_SANITIZER
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(fiber.state == State::done ? nullptr : &fake_stack, scheduler_bottom_,
                                 scheduler_bytes_);
#endif
  emulator_switch(&fiber.stack_pointer, scheduler_stack_);
#ifdef EMULATOR_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_bottom_, &scheduler_bytes_);
#endif
}

void Block::enter() {
#ifdef EMULATOR_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom_, &scheduler_bytes_);
#endif
  acquire(&started_);
  kernel_(arguments_);
  release(&ended_);
  current_->state = State::done;
  ready_.erase(current_->number);
  ++done_;
  leave();
  std::abort();  // nobody resumes a thread that has returned
}

// The fiber is left where it is, and the launch given up.
void Block::fail(const std::string& what, Place place) {
  release(&ended_);
  failure_ = what + " at " + text(place) + "; block " + text(current_->thread.block) + ", thread " +
             text(current_->thread.thread);
  leave();
  std::abort();
}

// ---- barriers, shuffles, shared memory

void Block::barrier(Place place) {
  Fiber& fiber = *current_;
  // Two tags take turns: who has gone on to the next barrier has not ordered its accesses before those who have not.
  char* tag = &barriers_[fiber.barriers++ % 2];
  release(tag);
  fiber.place = place;
  fiber.state = State::at_barrier;
  ready_.erase(fiber.number);
  if (waiting_ == 0) barrier_place_ = place;
  if (barrier_place_.line != place.line)
    fail("two barriers at once: some threads wait at " + text(barrier_place_) + ", others", place);
  if (++waiting_ == fibers_.size()) {
    waiting_ = 0;
    for (Fiber& other : fibers_) {
      other.state = State::ready;
      ready_.insert(other.number);
    }
  }
  leave();
  acquire(tag);
}

uint64_t Block::shuffle(uint32_t mask, uint64_t value, int source, Place place) {
  Fiber& fiber = *current_;
  const unsigned lane = fiber.number % kWarp, first_of_warp = fiber.number - lane;
  if ((mask >> lane & 1) == 0) fail("warp operation: the lane is not in its own mask", place);
  if ((mask >> source & 1) == 0) fail("warp operation: takes the value of a lane outside of its mask", place);
  fiber.mask = mask;
  fiber.value = value;
  fiber.source = source;
  fiber.place = place;
  fiber.state = State::in_shuffle;
  ready_.erase(fiber.number);
  if (const std::string missing = missing_lanes(first_of_warp, mask); !missing.empty()) fail(missing, place);
  complete_shuffle(first_of_warp, mask);
  leave();
  return fiber.value;
}

// Lanes of the mask that can never arrive.
std::string Block::missing_lanes(unsigned first_of_warp, uint32_t mask) const {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const unsigned number = first_of_warp + lane;
    if (number >= fibers_.size()) return "warp operation: its mask names lanes that do not exist";
    const Fiber& other = fibers_[number];
    if (other.state == State::done) return "warp operation: a lane of its mask has returned";
    if (other.state == State::in_shuffle && (other.mask != mask || other.place.line != current_->place.line))
      return "warp operation: a lane of its mask is in another one, at " + text(other.place);
  }
  return "";
}

void Block::complete_shuffle(unsigned first_of_warp, uint32_t mask) {
  uint64_t values[kWarp] = {};
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const Fiber& fiber = fibers_[first_of_warp + lane];
    if (fiber.state != State::in_shuffle) return;
    values[lane] = fiber.value;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    Fiber& fiber = fibers_[first_of_warp + lane];
    fiber.value = values[fiber.source];
    fiber.state = State::ready;
    ready_.insert(fiber.number);
  }
}

// It belongs to the block: no thread's making it is ordered with what the thread does.
void* Block::shared_memory(const void* key, size_t bytes) {
  std::unique_ptr<char[]>& memory = shared_[key];
  if (!memory) {
    be_scheduler();
    memory.reset(new char[bytes]);
    std::memset(memory.get(), 0xFF, bytes);
    release(&shared_made_);
    be_thread();
  }
  acquire(&shared_made_);
  return memory.get();
}

// ---- launches

class Launch {
 public:
  Launch(Index grid_size, Index block_size, void (*kernel)(void*), void* arguments)
      : grid_size_(grid_size), block_size_(block_size), kernel_(kernel), arguments_(arguments) {
    total_ = int64_t{grid_size.x} * grid_size.y * grid_size.z;
    next_ = std::min(options().first_block, total_);
  }

  void run() {
#ifdef EMULATOR_THREAD_SANITIZER
    contexts().begin_launch();
#endif
    std::vector<std::thread> workers;
    for (int i = 1; i < options().workers; ++i) workers.emplace_back([this] { work(); });
    work();
    for (std::thread& worker : workers) worker.join();
    if (!failure_.empty()) throw std::runtime_error("emulator: " + failure_);
  }

 private:
  void work() {
    const auto block = std::make_unique<Block>(block_size_, kernel_, arguments_);
    for (int64_t turn; !stopped_ && (turn = next_++) < total_;) {
      const int64_t number = number_of_turn(turn);
      const int64_t x = grid_size_.x, y = grid_size_.y;
      const Index index{static_cast<unsigned>(number % x), static_cast<unsigned>(number / x % y),
                        static_cast<unsigned>(number / x / y)};
      const std::string found = block->run(index, grid_size_, options().seed * 1000003 + static_cast<uint64_t>(number));
      if (!found.empty()) stop(found);
    }
    block->join();
  }

  int64_t number_of_turn(int64_t turn) const {
    const Order order = options().order;
    const bool backwards = order == Order::reverse || order == Order::greedy_reverse ||
                           (order == Order::random && options().seed % 2 == 1);
    return backwards ? total_ - 1 - (turn - options().first_block) : turn;
  }

  void stop(const std::string& found) {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
    if (failure_.empty()) failure_ = found;
  }

  Index grid_size_, block_size_;
  void (*kernel_)(void*);
  void* arguments_;
  int64_t total_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> stopped_{false};
  std::mutex mutex_;
  std::string failure_;
};

}  // namespace

Options& options() {
  static Options chosen;
  return chosen;
}

const Thread& self() { return this_block->current().thread; }

void barrier(Place place) { this_block->barrier(place); }

uint64_t shuffle(uint32_t mask, uint64_t value, int source, Place place) {
  return this_block->shuffle(mask, value, source, place);
}

void* shared_memory(const void* key, size_t bytes) { return this_block->shared_memory(key, bytes); }

void launch(Index grid_size, Index block_size, void (*kernel)(void*), void* arguments) {
  Launch(grid_size, block_size, kernel, arguments).run();
}

}  // namespace emulator

// For programs that load a library with an emulator in it.
extern "C" __attribute__((visibility("default"))) void emulator_set_options(int order, uint64_t seed, int workers,
                                                                            int64_t first_block) {
  emulator::options() = {static_cast<emulator::Order>(order), seed, workers, first_block};
}
