// Memory that tensors share. All tensors here were checked (check_tensor).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace pop {

using torch::stable::Tensor;

struct NamedTensor {
  Tensor tensor;
  std::string name;
};

// From the first element to the last one, both included; of a tensor that is not empty.
int64_t elements_spanned(const Tensor& tensor);

// Checks that no tensor of `written` shares memory with another one, nor two of its own elements with each other.
void check_disjoint(const std::vector<NamedTensor>& written, const std::vector<NamedTensor>& read);

// Tensors that many calls read and none may write, as the weights of a model: sorted once by the memory that they span,
// so that a call pays for a binary search a tensor. The tensors must keep that memory.
class ResidentTensors {
 public:
  ResidentTensors() = default;
  explicit ResidentTensors(std::vector<NamedTensor> tensors);

  // Throws if a tensor that a call is to write shares memory with one of them.
  void check_apart(const NamedTensor& written) const;

 private:
  struct Entry {
    NamedTensor named;
    int64_t begin;
    int64_t end;
    int64_t reach;  // the largest `end` up to this entry: weights may overlap, as tied ones do
  };
  std::vector<Entry> sorted_;  // by `begin`
};

}  // namespace pop
