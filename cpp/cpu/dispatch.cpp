// Chooses the kernels for the best instruction set that the processor and the operating system support.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/int8_kernels.h"
#include "cpu/kernels.h"

#if defined(POP_HAVE_AVX_VNNI) || defined(POP_HAVE_AMX)
#include <cpuid.h>
#endif
#if defined(POP_HAVE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pop::cpu {
namespace {

// An instruction set, with the tables that need it; a set without a table of a kind leaves it to the next one.
struct Choice {
  const char* name;
  const Kernels* kernels;
  const Int8Kernels* int8_kernels;
  bool supported;
  bool (*request)() = nullptr;  // asks the operating system for what the kernels need, before they run
};

#if defined(POP_HAVE_AVX_VNNI)
// Not every compiler's __builtin_cpu_supports knows this one.
[[maybe_unused]] bool has_avx_vnni() {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1u) != 0;
}
#endif

#if defined(POP_HAVE_AMX)
// Not every compiler's __builtin_cpu_supports knows these either. Needs a processor with AVX.
[[maybe_unused]] bool finds_amx() {
  constexpr unsigned int kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  constexpr unsigned int kTileState = 3u << 17;
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & kNeeded) != kNeeded) return false;
  __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));  // the states that the operating system saves
  return (eax & kTileState) == kTileState;
}

// Linux lets a process use tiles only after it has asked, and refuses where the signal stack of a thread is too small
// to save them.
[[maybe_unused]] bool request_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return true;
#endif
}
#endif

// The compiled kernels, best first. __builtin_cpu_supports also checks that the operating system saves the registers.
std::vector<Choice> choices() {
  std::vector<Choice> all;
#if defined(POP_EMULATE_AVX512)
  all.push_back({"amx", &amx::kernels, &amx::int8_kernels, true});
  all.push_back({"avx512_bf16", &avx512_bf16::kernels, nullptr, true});
  all.push_back({"avx512_vnni", nullptr, &avx512_vnni::int8_kernels, true});
  all.push_back({"avx_vnni", nullptr, &avx_vnni::int8_kernels, true});
#elif defined(POP_HAVE_AVX512_BF16)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
#if defined(POP_HAVE_AMX)
  all.push_back({"amx", &amx::kernels, &amx::int8_kernels, vnni && __builtin_cpu_supports("avx512bf16") && finds_amx(),
                 request_tiles});
#endif
  all.push_back({"avx512_bf16", &avx512_bf16::kernels, nullptr, avx512 && __builtin_cpu_supports("avx512bf16")});
  all.push_back({"avx512_vnni", nullptr, &avx512_vnni::int8_kernels, vnni});
#endif
#if defined(POP_HAVE_AVX2)
  // Every processor with AVX2 has F16C, so it is not checked.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(POP_HAVE_AVX_VNNI) && !defined(POP_EMULATE_AVX512)
  all.push_back({"avx_vnni", nullptr, &avx_vnni::int8_kernels, avx2 && has_avx_vnni()});
#endif
  all.push_back({"avx2", &avx2::kernels, &avx2::int8_kernels, avx2});
#endif
  all.push_back({"baseline", &baseline::kernels, &baseline::int8_kernels, true});
  return all;
}

// The best supported table of one kind, from the set that POP_CPU_ISA names downwards.
template <class Table>
const Table& choose(const Table* Choice::* table) {
  const char* wanted = std::getenv("POP_CPU_ISA");
  bool found = wanted == nullptr || *wanted == '\0';
  std::string supported;
  for (const Choice& choice : choices()) {
    if (!choice.supported) continue;
    found = found || std::string(wanted) == choice.name;
    if (found && choice.*table != nullptr && (choice.request == nullptr || choice.request())) return *(choice.*table);
    supported += (supported.empty() ? "" : ", ") + std::string(choice.name);
  }
  throw std::invalid_argument("POP_CPU_ISA: expected one of " + supported + " on this processor, got '" + wanted + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose(&Choice::kernels);
  return chosen;
}

bool has_amx() {
#if defined(POP_HAVE_AMX)
  static const bool found = __builtin_cpu_supports("avx512f") && finds_amx() && request_tiles();
  return found;
#else
  return false;
#endif
}

const Int8Kernels& int8_kernels() {
  static const Int8Kernels& chosen = choose(&Choice::int8_kernels);
  return chosen;
}

}  // namespace pop::cpu
