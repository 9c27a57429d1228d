// The C library returns large blocks to the system when they are freed and has every page zeroed again when they are next asked for,
// which costs a repeated step more than its pointwise passes. Here blocks are cut from large segments; the smallest one that is unused
// and large enough is taken, and what comes back joins the unused blocks beside it, so that a step keeps little more memory than it
// needs at one time.
#include "cpu/pool.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace dwa_fast {
namespace {

constexpr std::size_t kSmallest = 64 << 10;  // smaller blocks the C library itself keeps
constexpr std::size_t kStep = 64 << 10;      // sizes are rounded up to this
constexpr std::size_t kHugePage = 2 << 20;
constexpr std::size_t kSegment = 64 << 20;  // asked for at once; pages that nothing touches cost nothing

thread_local int guards = 0;  // of this thread

class Pool final : public c10::Allocator {
 public:
  // Never destroyed: tensors that the interpreter drops at its very end still return here.
  static Pool& get() {
    static Pool* pool = new Pool();
    return *pool;
  }

  c10::DataPtr allocate(std::size_t bytes) override {
    if (bytes < kSmallest || guards == 0) return base_->allocate(bytes);
    void* data = take((bytes + kStep - 1) / kStep * kStep);
    return {data, data, &Pool::give_back, c10::Device(c10::DeviceType::CPU)};
  }

  // oneDNN's scratch memory comes and goes by its bare address, within one call.
  c10::DeleterFnPtr raw_deleter() const override { return &Pool::give_back; }

  void copy_data(void* target, const void* source, std::size_t bytes) const override { default_copy_data(target, source, bytes); }

  void enter() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (users_++ == 0) {
      base_ = c10::GetCPUAllocator();
      c10::SetCPUAllocator(this, kPriority);
    }
  }

  void leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--users_ == 0) c10::SetCPUAllocator(base_, kPriority);
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto block = blocks_.begin(); block != blocks_.end();) {
      const auto next = std::next(block);
      if (!block->second.used && block->second.first && (next == blocks_.end() || next->second.first)) {
        unused_.erase({block->second.size, block->first});
        std::free(block->first);
        blocks_.erase(block);
      }
      block = next;
    }
  }

  std::size_t in_use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return blocks_.size() - unused_.size();
  }

 private:
  static constexpr uint8_t kPriority = 100;

  struct Block {
    std::size_t size;
    bool first;  // of its segment
    bool used;
  };
  using Blocks = std::map<char*, Block>;  // by address

  static void give_back(void* data) {
    Pool& pool = get();
    std::unique_lock<std::mutex> lock(pool.mutex_);
    auto block = pool.blocks_.find(static_cast<char*>(data));
    if (block == pool.blocks_.end()) {  // a small block, which the C library keeps
      lock.unlock();
      pool.base_->raw_deallocate(data);
      return;
    }
    block->second.used = false;
    if (const auto next = std::next(block); next != pool.blocks_.end() && !next->second.first && !next->second.used) pool.join(block, next);
    if (!block->second.first && !std::prev(block)->second.used) block = pool.join(std::prev(block), block);
    pool.unused_.insert({block->second.size, block->first});
  }

  // One block, which is not in unused_, of two neighbours that are unused.
  Blocks::iterator join(Blocks::iterator low, Blocks::iterator high) {
    for (const auto& each : {low, high}) unused_.erase({each->second.size, each->first});
    low->second.size += high->second.size;
    blocks_.erase(high);
    return low;
  }

  void* take(std::size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto place = unused_.lower_bound({size, nullptr});
    const auto block = place == unused_.end() ? add_segment(size) : blocks_.find(place->second);
    if (place != unused_.end()) unused_.erase(place);
    if (const std::size_t rest = block->second.size - size; rest > 0) {
      const auto behind = blocks_.insert({block->first + size, {rest, false, false}}).first;
      unused_.insert({rest, behind->first});
      block->second.size = size;
    }
    block->second.used = true;
    return block->first;
  }

  // A segment of one block, which is not in unused_ yet.
  Blocks::iterator add_segment(std::size_t size) {
    const std::size_t whole = size < kSegment ? kSegment : (size + kHugePage - 1) / kHugePage * kHugePage;
    void* data = nullptr;
    const int failed = posix_memalign(&data, kHugePage, whole);
    TORCH_CHECK_WITH(OutOfMemoryError, failed == 0, "out of memory: a step asked for ", whole >> 20, " MiB more on the CPU");
#ifdef __linux__
    madvise(data, whole, MADV_HUGEPAGE);
#endif
    return blocks_.insert({static_cast<char*>(data), {whole, true, false}}).first;
  }

  std::mutex mutex_;
  Blocks blocks_;                                   // all
  std::set<std::pair<std::size_t, char*>> unused_;  // by size, then by address
  c10::Allocator* base_ = c10::GetCPUAllocator();
  int users_ = 0;
};

}  // namespace

void enter_pool() {
  ++guards;
  Pool::get().enter();
}

void leave_pool() {
  Pool::get().leave();
  --guards;
}

void release_pool() { Pool::get().release(); }

std::size_t pool_in_use() { return Pool::get().in_use(); }

}  // namespace dwa_fast
