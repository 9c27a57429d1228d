// Memory that repeated steps reuse: what one iteration frees the next one takes, without the system in between.
#pragma once

namespace dwa_fast {

// While one of these lives, tensors of the CPU take their memory from the pool; they may outlive it.
class PoolGuard {
 public:
  PoolGuard();
  ~PoolGuard();
  PoolGuard(const PoolGuard&) = delete;
  PoolGuard& operator=(const PoolGuard&) = delete;
};

// Gives the pool's unused memory back to the system.
void release_pool();

}  // namespace dwa_fast
