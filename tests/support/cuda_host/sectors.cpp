#include <map>
#include <set>
#include <utility>
#include <vector>

#include "control.h"
#include "standin/threads.h"

namespace standin {
namespace {

constexpr uintptr_t kSector = 32;

// For the running block: the sectors of each load and of each store of a warp (the key is the warp's number, and
// whether the access is a store), and the number of loads or stores of each thread so far.
std::map<std::pair<unsigned, bool>, std::vector<std::set<uintptr_t>>> by_warp;
std::map<std::pair<std::pair<unsigned, bool>, int>, size_t> noted;

}  // namespace

void note_access(bool happens, bool store, const void* p, size_t bytes) {
  if (!control.counts_sectors) return;
  const std::pair<unsigned, bool> kind = {warp(), store};
  std::vector<std::set<uintptr_t>>& accesses = by_warp[kind];
  const size_t number = noted[{kind, lane()}]++;
  if (number == accesses.size()) accesses.emplace_back();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  if (!happens) return;
  for (uintptr_t sector = begin / kSector; sector * kSector < begin + bytes; ++sector) accesses[number].insert(sector);
}

void count_sectors() {
  for (const auto& [kind, accesses] : by_warp)
    for (const std::set<uintptr_t>& sectors : accesses)
      (kind.second ? control.sectors.stored : control.sectors.loaded) += static_cast<int64_t>(sectors.size());
  by_warp.clear();
  noted.clear();
}

}  // namespace standin
