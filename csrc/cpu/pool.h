// Memory that repeated steps reuse: what one iteration frees the next one takes, without the system in between.
#pragma once

#include <cstddef>

namespace dwa_fast {

// While one of these lives, tensors of the CPU take their memory from the pool; they may outlive it.
class PoolGuard {
 public:
  PoolGuard();
  ~PoolGuard();
  PoolGuard(const PoolGuard&) = delete;
  PoolGuard& operator=(const PoolGuard&) = delete;
};

// While one of these lives, tensors that this thread makes do not come from the pool, whoever else uses it. For what oneDNN holds for long:
// it frees memory through the allocator of that moment, and the pool would count the block as handed out for ever.
class PoolBypass {
 public:
  PoolBypass();
  ~PoolBypass();
  PoolBypass(const PoolBypass&) = delete;
  PoolBypass& operator=(const PoolBypass&) = delete;
};

// Gives the pool's unused memory back to the system.
void release_pool();

// Blocks that are handed out and have not come back.
std::size_t pool_in_use();

}  // namespace dwa_fast
