// Chooses the instruction set once per process: the best one of the CPU, or the one that the environment variable
// DDPM_EXT_CPU names.
#include <c10/util/Exception.h>
#include <stdlib.h>
#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#include <string>
#include <vector>

#include "cpu/operators.h"

namespace ddpm_ext::cpu {
namespace {

// Returns the kernels of the instruction sets that this CPU has, the best one first.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> tables;
#if defined(__x86_64__) && defined(__GNUC__)
  unsigned a, b, c = 0, d;
  const bool f16c =
      __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);  // __builtin_cpu_supports does not know f16c in older compilers
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw"))
    tables.push_back(&avx512::kernels);
  if (has_avx2) tables.push_back(&avx2::kernels);
  tables.push_back(&sse2::kernels);
#elif defined(__aarch64__)
  tables.push_back(&neon::kernels);
#endif
  tables.push_back(&portable::kernels);
  return tables;
}

const Kernels& choose() {
  const auto tables = available();
  const char* chosen_name = getenv("DDPM_EXT_CPU");
  if (chosen_name == nullptr || *chosen_name == '\0') return *tables.front();
  std::string names;
  for (const Kernels* table : tables) {
    if (std::string(table->name) == chosen_name) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  TORCH_CHECK_VALUE(false, "DDPM_EXT_CPU is '", chosen_name, "', expected one that this CPU has: ", names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* instruction_set() { return kernels().name; }

}  // namespace ddpm_ext::cpu
