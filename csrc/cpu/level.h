// The instruction set that the CPU operators use: one binary carries all of them and chooses when it runs.
#pragma once

#include <string>

namespace dwa_fast {

enum class Level { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// "avx512_bf16", "avx512", "avx2" or "baseline": the highest level of this machine, or what set_cpu_level chose.
std::string cpu_level();

// For tests: use a lower level than the machine's. Throws where the name is unknown or the machine cannot run it.
void set_cpu_level(const std::string& name);

struct Kernels;

// The kernels of the level in use.
const Kernels& kernels();

}  // namespace dwa_fast
