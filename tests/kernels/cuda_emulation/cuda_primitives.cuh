// csrc/cuda_primitives.cuh for the CPU, so that the kernels' own source can be tested without a GPU.
//
// Each CUDA thread is a fiber. A random scheduler may switch at every primitive, lanes of a warp included. Bulk copies
// and stores to other blocks are not made when they are asked for but at some later moment, in any order, and at the
// latest when nobody can go on without them: who reads too early, or overwrites too early, gets wrong numbers. A bulk
// store whose warp has not fenced its writes, misaligned copies, unequal collectives, deadlocks, memory written beyond
// its end and blocks that end with work pending raise an error. Under -fsanitize=thread, every fiber is a thread to the
// sanitizer and only what CUDA orders is ordered, so that it reports the races of any schedule.
#pragma once

#include <sys/types.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define TSAN(call) call
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#else
#define TSAN(call)
#endif

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
using std::min;

namespace mrpo {

constexpr int kLanes = 32;
using Barrier = uint64_t;

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

namespace emulation {

inline constexpr unsigned char kPoison = 0xff;  // NaN in every format
inline constexpr size_t kStack = 1 << 16;
inline constexpr int kGuard = 4096;             // bytes behind a block's shared memory that nobody may write

inline void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string("emulated kernel: ") + message);
}

// While it lives, what this fiber touches is the emulation's own and no business of the sanitizer's.
struct Internal {
  Internal() {
    TSAN(AnnotateIgnoreReadsBegin(__FILE__, __LINE__));
    TSAN(AnnotateIgnoreWritesBegin(__FILE__, __LINE__));
  }
  ~Internal() {
    TSAN(AnnotateIgnoreReadsEnd(__FILE__, __LINE__));
    TSAN(AnnotateIgnoreWritesEnd(__FILE__, __LINE__));
  }
  Internal(const Internal&) = delete;
};

struct BarrierState {
  int expected = 0, pending = 0, bytes = 0;
  uint32_t phase = 0;

  void step() {
    if (pending > 0 || bytes != 0) return;
    require(expected > 0, "a barrier is used that was not initialised");
    pending = expected;
    ++phase;
  }
};

struct Warp {
  uint32_t values[2][kLanes];
  const char* kind = "";
  int arrived = 0;
  uint64_t generation = 0;
  int fences[kLanes] = {}, stores = 0;
};

struct Block {
  std::unique_ptr<unsigned char[]> storage;
  unsigned char* shared;
  int shared_bytes, rank, arrived = 0;
  uint64_t generation = 0;
  std::vector<Warp> warps;
  std::map<ptrdiff_t, BarrierState> barriers;  // by offset in shared memory
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  void* tsan = nullptr;
  Block* block;
  int thread;
  bool done = false;
  std::function<bool()> ready;                          // empty: can go on
  std::vector<std::shared_ptr<int>> groups;             // of bulk stores: how many of each are still to be made
  std::shared_ptr<int> open = std::make_shared<int>(0);  // the group that is not committed
};

struct Copy {
  std::function<void()> make;
  std::shared_ptr<char> token = std::make_shared<char>();  // its address orders the copy for the sanitizer
};

struct Machine {
  std::mt19937 random;
  double haste = 0.1;  // probability that a pending copy is made before the next switch
  int64_t blocks = 0, first_block = 0;
  int threads = 0, cluster = 0, cluster_arrived = 0;
  uint64_t cluster_generation = 0;
  std::vector<std::unique_ptr<Block>> members;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Copy> copies;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  void* tsan_scheduler = nullptr;
  std::function<void()> kernel;
  std::string error;

  double uniform() { return std::uniform_real_distribution<>()(random); }
  Warp& warp() { return current->block->warps[current->thread / kLanes]; }
  int lane() const { return current->thread % kLanes; }

  void switch_out() {
    TSAN(__tsan_switch_to_fiber(tsan_scheduler, __tsan_switch_to_fiber_no_sync));
    swapcontext(&current->context, &scheduler);
  }
  // Anything may happen in between.
  void pause() {
    if (uniform() < 0.3) switch_out();
  }
  void wait(std::function<bool()> ready) {
    if (ready()) return pause();
    current->ready = std::move(ready);
    switch_out();
  }

  void make_copy() {
    const size_t which = random() % copies.size();
    Copy copy = std::move(copies[which]);
    copies.erase(copies.begin() + ptrdiff_t(which));
#ifdef __SANITIZE_THREAD__
    void* engine = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(engine, __tsan_switch_to_fiber_no_sync);
    __tsan_acquire(copy.token.get());
    __tsan_acquire(&kernel);
#endif
    copy.make();
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(tsan_scheduler, __tsan_switch_to_fiber_no_sync);
    __tsan_destroy_fiber(engine);
#endif
  }

  void later(std::function<void()> make) {
    Copy copy;
    copy.make = std::move(make);
    TSAN(__tsan_release(copy.token.get()));
    copies.push_back(std::move(copy));
    pause();
  }

  BarrierState& barrier(Block& block, const Barrier* address) {
    const ptrdiff_t offset = reinterpret_cast<const unsigned char*>(address) - block.shared;
    require(offset >= 0 && offset % 8 == 0 && offset + 8 <= block.shared_bytes, "a barrier outside shared memory");
    return block.barriers[offset];
  }

  template <typename T>
  T* at_rank(T* address, int rank) {
    require(rank >= 0 && rank < cluster, "a block that the cluster does not have");
    return reinterpret_cast<T*>(members[size_t(rank)]->shared +
                                (reinterpret_cast<unsigned char*>(address) - current->block->shared));
  }

  // Every lane gives a word and gets those of all.
  const uint32_t* exchange(const char* kind, uint32_t value) {
    pause();
    Warp& w = warp();
    require(w.arrived == 0 || std::strcmp(w.kind, kind) == 0, "lanes of a warp meet in different operations");
    w.kind = kind;
    const uint64_t generation = w.generation;
    uint32_t* values = w.values[generation % 2];
    values[lane()] = value;
    if (++w.arrived == kLanes) {
      w.arrived = 0;
      ++w.generation;
    }
    wait([&w, generation] { return w.generation != generation; });
    return values;
  }

  bool run_one() {
    const size_t start = random() % fibers.size();
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = *fibers[(start + i) % fibers.size()];
      if (fiber.done || (fiber.ready && !fiber.ready())) continue;
      fiber.ready = nullptr;
      current = &fiber;
      TSAN(__tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync));
      swapcontext(&scheduler, &fiber.context);
      return true;
    }
    return false;
  }

  void run_cluster() {
    while (error.empty() && !std::all_of(fibers.begin(), fibers.end(), [](auto& fiber) { return fiber->done; })) {
      while (!copies.empty() && uniform() < haste) make_copy();
      if (run_one()) continue;
      require(!copies.empty(), "deadlock");
      make_copy();
    }
    if (!error.empty()) throw std::runtime_error(error);
    require(copies.empty(), "a block ended before its copies were made");
  }
};

inline Machine* machine = nullptr;

inline void fiber_main() {
  TSAN(__tsan_acquire(&machine->kernel));  // what the host wrote before the launch, it sees
  try {
    machine->kernel();
  } catch (const std::exception& error) {
    machine->error = error.what();
  }
  TSAN(__tsan_release(&machine->error));
  machine->current->done = true;
  machine->switch_out();
}

inline std::unique_ptr<Block> make_block(int rank, int threads, int shared_bytes) {
  auto block = std::make_unique<Block>();
  block->storage = std::make_unique<unsigned char[]>(size_t(shared_bytes) + kGuard + 128);
  block->shared = block->storage.get() + (128 - reinterpret_cast<uintptr_t>(block->storage.get()) % 128);
  std::memset(block->shared, kPoison, size_t(shared_bytes) + kGuard);
  block->shared_bytes = shared_bytes;
  block->rank = rank;
  block->warps.resize(size_t(threads / kLanes));
  return block;
}

// Runs a grid, cluster by cluster.
inline void launch(std::function<void()> kernel, int64_t blocks, int cluster, int threads, int shared_bytes,
                   uint32_t seed, double haste) {
  for (int64_t first = 0; first < blocks; first += cluster) {
    const Internal internal;
    Machine here;
    machine = &here;
    TSAN(__tsan_release(&here.kernel));
    here.random.seed(seed + uint32_t(first));
    here.haste = haste;
    here.kernel = kernel;
    here.blocks = blocks;
    here.first_block = first;
    here.cluster = cluster;
    here.threads = threads;
    TSAN(here.tsan_scheduler = __tsan_get_current_fiber());
    for (int rank = 0; rank < cluster; ++rank) here.members.push_back(make_block(rank, threads, shared_bytes));
    for (int i = 0; i < cluster * threads; ++i) {
      auto fiber = std::make_unique<Fiber>();
      fiber->block = here.members[size_t(i / threads)].get();
      fiber->thread = i % threads;
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = fiber->stack.get();
      fiber->context.uc_stack.ss_size = kStack;
      fiber->context.uc_link = nullptr;
      makecontext(&fiber->context, fiber_main, 0);
      TSAN(fiber->tsan = __tsan_create_fiber(0));
      here.fibers.push_back(std::move(fiber));
    }
    here.run_cluster();
    TSAN(__tsan_acquire(&here.error));
    for (const auto& block : here.members) {
      const unsigned char* guard = block->shared + shared_bytes;
      require(std::all_of(guard, guard + kGuard, [](unsigned char byte) { return byte == kPoison; }),
              "shared memory was written beyond its end");
    }
    for (const auto& fiber : here.fibers) {
      TSAN(__tsan_destroy_fiber(fiber->tsan));
      (void)fiber;
    }
  }
}

template <typename T>
T bits_to(uint32_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
uint32_t to_bits(T value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace emulation

inline int thread_index() {
  const emulation::Internal internal;
  return emulation::machine->current->thread;
}
inline int block_size() {
  const emulation::Internal internal;
  return emulation::machine->threads;
}
inline int64_t block_index() {
  const emulation::Internal internal;
  return emulation::machine->first_block + emulation::machine->current->block->rank;
}
inline int64_t num_blocks() {
  const emulation::Internal internal;
  return emulation::machine->blocks;
}
inline unsigned char* shared_memory() {
  const emulation::Internal internal;
  return emulation::machine->current->block->shared;
}

inline void sync_block() {
  const emulation::Internal internal;
  auto& m = *emulation::machine;
  emulation::Block& block = *m.current->block;
  const uint64_t generation = block.generation;
  TSAN(__tsan_release(&block.generation));
  if (++block.arrived == m.threads) {
    block.arrived = 0;
    ++block.generation;
  }
  m.wait([&block, generation] { return block.generation != generation; });
  TSAN(__tsan_acquire(&block.generation));
}
inline void sync_warp() {
  const emulation::Internal internal;
  auto& m = *emulation::machine;
  TSAN(__tsan_release(&m.warp().generation));
  m.exchange("sync_warp", 0);
  TSAN(__tsan_acquire(&m.warp().generation));
}
inline float shuffle_xor(float value, int mask) {
  const emulation::Internal internal;
  auto& m = *emulation::machine;
  return emulation::bits_to<float>(m.exchange("shuffle", emulation::to_bits(value))[m.lane() ^ mask]);
}
inline uint32_t ballot(bool vote) {
  const emulation::Internal internal;
  const uint32_t* votes = emulation::machine->exchange("ballot", vote);
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= votes[lane] << lane;
  return bits;
}
inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.f : y;  // NaN stays
}

inline uint4 load_streaming(const uint4* address) { return *address; }
inline void store_streaming(uint4* address, uint4 value) { *address = value; }

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return emulation::bits_to<float>(uint32_t(x.bits) << 16); }
inline float to_float(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 0) return std::copysign(std::ldexp(float(fraction), -24), sign ? -1.f : 1.f);
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return emulation::bits_to<float>(sign | wide << 23 | fraction << 13);
}

inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, bfloat16& out) {
  const uint32_t bits = emulation::to_bits(x);
  out.bits = std::isnan(x) ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(float x, float16& out) {
  const uint16_t sign = uint16_t(emulation::to_bits(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (std::isnan(x)) {
    out.bits = 0x7fff;
  } else if (size >= 65520.f) {
    out.bits = sign | 0x7c00;
  } else if (size < 6.103515625e-5f) {
    out.bits = uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(size, 24))));
  } else {
    const uint32_t bits = emulation::to_bits(size) - (112u << 23);
    out.bits = uint16_t(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13);
  }
}

inline void unpack(uint32_t word, float* out, float) { out[0] = emulation::bits_to<float>(word); }
inline uint32_t pack(const float* x, float) { return emulation::to_bits(x[0]); }
template <typename Half>
void unpack(uint32_t word, float* out, Half) {
  out[0] = to_float(Half{uint16_t(word)});
  out[1] = to_float(Half{uint16_t(word >> 16)});
}
template <typename Half>
uint32_t pack(const float* x, Half) {
  Half low, high;
  from_float(x[0], low);
  from_float(x[1], high);
  return uint32_t(low.bits) | uint32_t(high.bits) << 16;
}

#define MRPO_CLUSTERS 1

inline int cluster_rank() {
  const emulation::Internal internal;
  return emulation::machine->current->block->rank;
}
inline int cluster_size() {
  const emulation::Internal internal;
  return emulation::machine->cluster;
}
inline void sync_cluster() {
  const emulation::Internal internal;
  auto& m = *emulation::machine;
  const uint64_t generation = m.cluster_generation;
  TSAN(__tsan_release(&m.cluster_generation));
  if (++m.cluster_arrived == m.cluster * m.threads) {
    m.cluster_arrived = 0;
    ++m.cluster_generation;
  }
  m.wait([&m, generation] { return m.cluster_generation != generation; });
  TSAN(__tsan_acquire(&m.cluster_generation));
}

inline void barrier_init(Barrier* barrier, int arrivals) {
  const emulation::Internal internal;
  auto& m = *emulation::machine;
  auto& state = m.barrier(*m.current->block, barrier);
  emulation::require(state.expected == 0, "a barrier is initialised twice");
  state.expected = state.pending = arrivals;
}
inline void barrier_init_fence() {}
inline void barrier_arrive_expecting(Barrier* barrier, uint32_t bytes) {
  const emulation::Internal internal;
  auto& m = *emulation::machine;
  m.pause();
  auto& state = m.barrier(*m.current->block, barrier);
  TSAN(__tsan_release(&state));
  emulation::require(state.pending > 0, "more arrivals at a barrier than it expects");
  state.bytes += int(bytes);
  --state.pending;
  state.step();
  m.pause();
}
inline void barrier_arrive(Barrier* barrier) { barrier_arrive_expecting(barrier, 0); }
inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  const emulation::Internal internal;
  auto& m = *emulation::machine;
  auto& state = m.barrier(*m.current->block, barrier);
  m.wait([&state, parity] { return state.phase % 2 != parity; });
  TSAN(__tsan_acquire(&state));
}
inline void barrier_wait_cluster(Barrier* barrier, uint32_t parity) { barrier_wait(barrier, parity); }

namespace emulation {

// A copy that reports its bytes to a barrier.
inline void reported(Block& block, Barrier* barrier, uint32_t bytes, std::function<void()> make) {
  auto& state = machine->barrier(block, barrier);
  require(state.expected > 0, "a barrier is used that was not initialised");
  machine->later([&state, bytes, make] {
    make();
    TSAN(__tsan_release(&state));
    const Internal internal;
    state.bytes -= int(bytes);
    state.step();
  });
}

inline void check_bulk(const void* shared, const void* global, uint32_t bytes) {
  const Block& block = *machine->current->block;
  const auto* begin = static_cast<const unsigned char*>(shared);
  require(begin >= block.shared && begin + bytes <= block.shared + block.shared_bytes, "a copy outside shared memory");
  require(bytes > 0 && bytes % 16 == 0 && reinterpret_cast<uintptr_t>(global) % 16 == 0 &&
              (begin - block.shared) % 16 == 0,
          "a bulk copy is not aligned to 16 bytes");
}

}  // namespace emulation

inline void tell(float4* address, int rank, float4 value, Barrier* barrier) {
  const emulation::Internal internal;
  auto& m = *emulation::machine;
  float4* there = m.at_rank(address, rank);
  emulation::reported(*m.members[size_t(rank)], m.at_rank(barrier, rank), sizeof value,
                      [there, value] { *there = value; });
}

inline void bulk_load(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  const emulation::Internal internal;
  auto& m = *emulation::machine;
  emulation::check_bulk(shared, global, bytes);
  emulation::reported(*m.current->block, barrier, bytes, [=] { std::memcpy(shared, global, bytes); });
}
inline void bulk_store(void* global, const void* shared, uint32_t bytes) {
  const emulation::Internal internal;
  auto& m = *emulation::machine;
  emulation::check_bulk(shared, global, bytes);
  const int stores = ++m.warp().stores;
  for (const int fences : m.warp().fences) emulation::require(fences >= stores, "a bulk store of unfenced writes");
  const std::shared_ptr<int> group = m.current->open;
  ++*group;
  m.later([=] {
    std::memcpy(global, shared, bytes);
    TSAN(__tsan_release(group.get()));
    const emulation::Internal internal;
    --*group;
  });
}
inline void bulk_commit() {
  const emulation::Internal internal;
  auto& fiber = *emulation::machine->current;
  fiber.groups.push_back(fiber.open);
  fiber.open = std::make_shared<int>(0);
}
template <int kPending>
void bulk_wait_read() {
  const emulation::Internal internal;
  auto& m = *emulation::machine;
  auto& groups = m.current->groups;
  while (groups.size() > kPending) {
    const std::shared_ptr<int> oldest = groups.front();
    m.wait([oldest] { return *oldest == 0; });
    TSAN(__tsan_acquire(oldest.get()));
    groups.erase(groups.begin());
  }
}
inline void bulk_wait_all() { bulk_wait_read<0>(); }
inline void fence_for_bulk() {
  const emulation::Internal internal;
  auto& m = *emulation::machine;
  ++m.warp().fences[m.lane()];
  m.pause();
}

}  // namespace mrpo
