#include "core/plan.h"

#include <algorithm>
#include <stdexcept>

#include "core/json.h"

namespace pop {

namespace {

[[noreturn]] void fail(const char* field, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(std::string(field) + ": expected " + expected + ", got " + got);
}

constexpr int64_t kMaxLayers = 100'000;  // so that a wrong number of layers costs no memory

void at_least(const char* field, int64_t value, int64_t least) {
  if (value < least) fail(field, "an integer >= " + std::to_string(least), std::to_string(value));
}

// Maximal runs of consecutive numbers in sorted `layers`.
std::vector<LayerRange> runs_of(const std::vector<int64_t>& layers) {
  std::vector<LayerRange> runs;
  for (const int64_t layer : layers) {
    if (!runs.empty() && runs.back().end == layer) {
      ++runs.back().end;
    } else {
      runs.push_back({layer, layer + 1});
    }
  }
  return runs;
}

}  // namespace

void Plan::validate() {
  at_least("num_layers", num_layers, 1);
  if (num_layers > kMaxLayers) {
    fail("num_layers", "an integer <= " + std::to_string(kMaxLayers), std::to_string(num_layers));
  }
  at_least("boundary", boundary, 1);
  at_least("min_tokens", min_tokens, 0);
  std::sort(omit.begin(), omit.end());
  for (size_t i = 0; i < omit.size(); ++i) {
    if (omit[i] < 0 || omit[i] >= num_layers) {
      fail("omit", "layers in 0..." + std::to_string(num_layers - 1), std::to_string(omit[i]));
    }
    if (i > 0 && omit[i] == omit[i - 1]) fail("omit", "each layer once", std::to_string(omit[i]) + " twice");
  }
  if (static_cast<int64_t>(omit.size()) == num_layers) {
    fail("omit", "at least one layer of " + std::to_string(num_layers) + " retained", "all of them omitted");
  }
}

std::vector<LayerRange> Plan::runs() const { return runs_of(omit); }

std::vector<LayerRange> Plan::projected_runs() const {
  std::vector<int64_t> projected = omit;
  if (projected.empty() || projected.back() != num_layers - 1) projected.push_back(num_layers - 1);
  return runs_of(projected);
}

std::string Plan::to_json() const {
  json::Writer members;
  members.add("num_layers", num_layers);
  members.add("omit", omit);
  members.add("boundary", boundary);
  members.add("min_tokens", min_tokens);
  return members.text();
}

Plan Plan::from_json(const std::string& text) {
  const json::Members members(text, "plan");
  // The last two are Python's: a typo in a name would change nothing, and say nothing.
  members.only({"num_layers", "omit", "boundary", "min_tokens", "origin", "projections"});
  Plan plan;
  plan.num_layers = members.integer("num_layers");
  plan.omit = members.integers("omit");
  if (members.has("boundary")) plan.boundary = members.integer("boundary");
  if (members.has("min_tokens")) plan.min_tokens = members.integer("min_tokens");
  plan.validate();
  return plan;
}

}  // namespace pop
