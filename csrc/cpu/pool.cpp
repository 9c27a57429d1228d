// The C library returns large blocks to the system when they are freed and has every page zeroed again when they are next asked for,
// which costs a repeated step more than its pointwise passes. The sizes of a repeated step are the same every time, so blocks are
// kept by size.
#include "cpu/pool.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace dwa_fast {
namespace {

constexpr std::size_t kSmallest = 64 << 10;  // smaller blocks the C library itself keeps
constexpr std::size_t kStep = 64 << 10;      // sizes are rounded up to this
constexpr std::size_t kHugePage = 2 << 20;

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
    for (const auto& [size, blocks] : unused_)
      for (void* data : blocks) std::free(data);
    unused_.clear();
  }

  std::size_t in_use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return used_.size();
  }

 private:
  static constexpr uint8_t kPriority = 100;

  static void give_back(void* data) {
    Pool& pool = get();
    std::unique_lock<std::mutex> lock(pool.mutex_);
    const auto used = pool.used_.find(data);
    if (used == pool.used_.end()) {  // a small block, which the C library keeps
      lock.unlock();
      pool.base_->raw_deallocate(data);
      return;
    }
    pool.unused_[used->second].push_back(data);
    pool.used_.erase(used);
  }

  void* take(std::size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& blocks = unused_[size];
    void* data = nullptr;
    if (blocks.empty()) {
      data = fresh(size);
    } else {
      data = blocks.back();
      blocks.pop_back();
    }
    used_[data] = size;
    return data;
  }

  static void* fresh(std::size_t size) {
    const std::size_t alignment = size >= kHugePage ? kHugePage : 4096;
    void* data = nullptr;
    const int failed = posix_memalign(&data, alignment, size);
    TORCH_CHECK_WITH(OutOfMemoryError, failed == 0, "out of memory: a step asked for ", size >> 20, " MiB more on the CPU");
#ifdef __linux__
    if (size >= kHugePage) madvise(data, size, MADV_HUGEPAGE);
#endif
    return data;
  }

  std::mutex mutex_;
  std::unordered_map<std::size_t, std::vector<void*>> unused_;
  std::unordered_map<void*, std::size_t> used_;
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
