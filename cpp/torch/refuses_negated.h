// Operators that write into their arguments, over tensors that are lazily negated.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "torch/checks.h"

namespace pop {

// The name of an operator as a template argument.
template <size_t N>
struct OpName {
  consteval OpName(const char (&given)[N]) {
    for (size_t i = 0; i < N; ++i) text[i] = given[i];
  }
  char text[N];
};

// `kernel` for torch's dispatch key Negative. Without it torch resolves copies of the arguments, calls the operator,
// and fails where it would write the results back: after the others were written.
template <auto kernel, OpName name>
struct RefusesNegated;

template <class Result, class... Args, Result (*kernel)(Args...), OpName name>
struct RefusesNegated<kernel, name> {
  static Result call(Args... args) {
    int64_t index = 0;
    (check_argument(args, index++), ...);
    return kernel(std::move(args)...);
  }

 private:
  template <class Argument>
  static void check_argument(const Argument&, int64_t) {}
  static void check_argument(const Tensor& tensor, int64_t index) {
    if (tensor.defined()) check_resolved(tensor, join(name.text, ": argument ", index));
  }
  static void check_argument(const std::optional<Tensor>& tensor, int64_t index) {
    if (tensor.has_value()) check_argument(*tensor, index);
  }
  static void check_argument(const std::vector<Tensor>& tensors, int64_t index) {
    for (const Tensor& tensor : tensors) check_argument(tensor, index);
  }
};

}  // namespace pop
