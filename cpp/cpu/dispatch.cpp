// Chooses the kernels for the best instruction set that the processor and the operating system support.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace pop::cpu {
namespace {

struct Choice {
  const Kernels* kernels;
  bool supported;
};

// The compiled kernels, best first. __builtin_cpu_supports also checks that the operating system saves the registers.
std::vector<Choice> choices() {
  std::vector<Choice> all;
#if defined(POP_EMULATE_AVX512)
  all.push_back({&avx512_bf16::kernels, true});
#elif defined(POP_HAVE_AVX512_BF16)
  all.push_back({&avx512_bf16::kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                            __builtin_cpu_supports("avx512bf16")});
#endif
#if defined(POP_HAVE_AVX2)
  // Every processor with AVX2 has F16C, so it is not checked.
  all.push_back({&avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
  all.push_back({&baseline::kernels, true});
  return all;
}

const Kernels& choose() {
  const char* wanted = std::getenv("POP_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string supported;
  for (const Choice& choice : choices()) {
    if (!choice.supported) continue;
    if (any || std::string(wanted) == choice.kernels->name) return *choice.kernels;
    supported += (supported.empty() ? "" : ", ") + std::string(choice.kernels->name);
  }
  throw std::invalid_argument("POP_CPU_ISA: expected one of " + supported + " on this processor, got '" + wanted + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace pop::cpu
