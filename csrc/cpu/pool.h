// Memory that repeated steps reuse: what one iteration frees the next one takes, without the system in between.
#pragma once

#include <cstddef>

namespace dwa_fast {

// Between these two calls tensors that this thread makes on the CPU take their memory from the pool; they may outlive it. Other threads
// never do: oneDNN frees its memory through the allocator that is installed at that time, and the pool would never get such a block back.
void enter_pool();
void leave_pool();

class PoolGuard {
 public:
  PoolGuard() { enter_pool(); }
  ~PoolGuard() { leave_pool(); }
  PoolGuard(const PoolGuard&) = delete;
  PoolGuard& operator=(const PoolGuard&) = delete;
};

// Gives the pool's unused memory back to the system.
void release_pool();

// Blocks that are handed out and have not come back.
std::size_t pool_in_use();

}  // namespace dwa_fast
