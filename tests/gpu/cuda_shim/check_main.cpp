// Runs every registered check, or those named on the command line. Prints one line each and returns 1 if one failed.
// With
// --list it prints the names and runs none.
#include <algorithm>
#include <cstdio>

#include "checks.h"

namespace checks {

namespace {

struct Entry {
  const char* name;
  void (*run)();
};

std::vector<Entry>& entries() {
  static std::vector<Entry> list;
  return list;
}

}  // namespace

Check::Check(const char* name, void (*run)()) { entries().push_back({name, run}); }

}  // namespace checks

int main(int count, char** names) {
  if (count == 2 && std::string(names[1]) == "--list") {
    for (const auto& entry : checks::entries()) std::printf("%s\n", entry.name);
    return 0;
  }
  int failed = 0, ran = 0;
  for (const auto& entry : checks::entries()) {
    const auto named = [&](const char* name) { return std::string(name) == entry.name; };
    if (count > 1 && std::none_of(names + 1, names + count, named)) continue;
    ++ran;
    try {
      entry.run();
      std::printf("ok %s\n", entry.name);
    } catch (const std::exception& error) {
      std::printf("FAILED %s: %s\n", entry.name, error.what());
      ++failed;
    }
    std::fflush(stdout);
  }
  std::printf("%d checks, %d failed\n", ran, failed);
  return failed > 0 || ran == 0 ? 1 : 0;
}
