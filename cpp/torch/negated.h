// Operators that write into their arguments, over tensors that are lazily negated.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "torch/checks.h"

namespace pop {

struct SchemaArgument {
  std::string name;  // "pop::prefill: input"
  bool written;
};

// The arguments of the operator of namespace pop with that schema.
std::vector<SchemaArgument> arguments_of(const std::string& schema);

// A tensor of resolved values. Throws if the operator writes it.
Tensor resolved(const Tensor& tensor, const SchemaArgument& argument, const std::string& index = "");

// `kernel` for torch's dispatch key Negative: resolves tensors that it reads, and refuses those that it writes. Without
// it torch resolves copies of all, calls the operator, and fails where it would write the results back: after the
// others were written.
template <auto kernel, const auto& schema>
struct OfNegated;

template <class Result, class... Args, Result (*kernel)(Args...), const auto& schema>
struct OfNegated<kernel, schema> {
  static Result call(Args... args) {
    const std::vector<SchemaArgument> arguments = arguments_of(schema);
    size_t index = 0;
    (resolve(args, arguments.at(index++)), ...);
    return kernel(std::move(args)...);
  }

 private:
  template <class Argument>
  static void resolve(Argument&, const SchemaArgument&) {}  // no tensor; or Tensor[]?, of which kernels see to
  static void resolve(Tensor& tensor, const SchemaArgument& argument) { tensor = resolved(tensor, argument); }
  static void resolve(std::optional<Tensor>& tensor, const SchemaArgument& argument) {
    if (tensor.has_value()) resolve(*tensor, argument);
  }
  static void resolve(std::vector<Tensor>& tensors, const SchemaArgument& argument) {
    for (size_t i = 0; i < tensors.size(); ++i) tensors[i] = resolved(tensors[i], argument, join("[", i, "]"));
  }
};

}  // namespace pop
