#include "torch/negated.h"

#include <algorithm>

#include "torch/aten.h"

namespace pop {

std::vector<SchemaArgument> arguments_of(const std::string& schema) {
  const size_t open = schema.find('('), close = schema.find(") ->");
  const std::string op = "pop::" + schema.substr(0, open) + ": ";
  std::vector<SchemaArgument> arguments;
  for (size_t begin = open + 1; begin < close;) {
    const size_t end = std::min(schema.find(',', begin), close);
    const std::string text = schema.substr(begin, end - begin);  // " Tensor(a!)[] key_cache", "float eps=1e-6"
    const std::string declared = text.substr(0, text.find('='));
    arguments.push_back({op + declared.substr(declared.rfind(' ') + 1), declared.find('!') != std::string::npos});
    begin = end + 1;
  }
  return arguments;
}

Tensor resolved(const Tensor& tensor, const SchemaArgument& argument, const std::string& index) {
  if (!tensor.defined() || !aten::is_neg(tensor)) return tensor;  // kernels refuse what is undefined
  check_tensor(tensor, argument.name + index);
  check(!argument.written, argument.name, index,
        ": expected resolved values in a tensor that is written, got a lazily negated one (pass resolve_neg() of it)");
  return aten::resolve_neg(tensor);
}

}  // namespace pop
