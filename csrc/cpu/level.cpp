#include "cpu/level.h"

#include <array>
#include <atomic>
#include <stdexcept>

#include "cpu/kernels.h"

namespace dwa_fast {
namespace {

constexpr std::array<const char*, 4> kNames = {"baseline", "avx2", "avx512", "avx512_bf16"};

Level detect() {
#if defined(__x86_64__)
  // These ask for the operating system's support too.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Level::kAvx512Bf16;
  if (avx512) return Level::kAvx512;
  if (avx2) return Level::kAvx2;
#endif
  return Level::kBaseline;
}

std::atomic<Level>& chosen() {
  static std::atomic<Level> level{detect()};
  return level;
}

}  // namespace

std::string cpu_level() { return kNames.at(static_cast<size_t>(chosen().load(std::memory_order_relaxed))); }

void set_cpu_level(const std::string& name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (name != kNames[i]) continue;
    const Level highest = detect();
    if (static_cast<Level>(i) > highest) {
      throw std::invalid_argument("this machine cannot run level " + name + ", its highest is " + kNames[static_cast<size_t>(highest)]);
    }
    chosen().store(static_cast<Level>(i), std::memory_order_relaxed);
    return;
  }
  throw std::invalid_argument("level must be baseline, avx2, avx512 or avx512_bf16, got " + name);
}

const Kernels& kernels() {
  switch (chosen().load(std::memory_order_relaxed)) {
#if defined(__x86_64__)
    case Level::kAvx512Bf16:
      return avx512_bf16::kKernels;
    case Level::kAvx512:
      return avx512::kKernels;
    case Level::kAvx2:
      return avx2::kKernels;
#endif
    default:
      return baseline::kKernels;
  }
}

}  // namespace dwa_fast
