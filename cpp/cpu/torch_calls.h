// Everything that the CPU backend takes from torch: threads, products, conversions and prepacked weights. No other file
// in cpp/cpu/ includes a torch header.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>

#include "backend/params.h"

namespace pop::cpu {

int64_t num_threads();

// Calls body(context, begin, end) for ranges that cover [first, last), on torch's threads. A range has at least `grain`
// elements, but for the last one.
void parallel_for(int64_t first, int64_t last, int64_t grain, void (*body)(const void*, int64_t, int64_t),
                  const void* context);

// The same with body(begin, end).
template <class Body>
void parallel_for(int64_t first, int64_t last, int64_t grain, const Body& body) {
  const auto call = [](const void* context, int64_t begin, int64_t end) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  parallel_for(first, last, grain, call, &body);
}

// out = a . w^T by aten's matmul: oneDNN or MKL. Operands of one dtype; no scales.
void matmul(const GemmParams& params);

// While one lives, MKL computes the products of this thread with one thread. MKL cuts a product, and so orders its
// sums, by a number of threads of the calling thread's own, also where it may start none. torch sets that number when a
// thread first works, so threads that are older than a call of torch.set_num_threads would give other bits than new
// ones.
class OneMklThread {
 public:
  OneMklThread();
  ~OneMklThread();
  OneMklThread(const OneMklThread&) = delete;
  OneMklThread& operator=(const OneMklThread&) = delete;

 private:
  int before_ = 0;
};

// A matrix in host memory with contiguous rows `stride` elements apart.
struct HostMatrix {
  enum class Type { model, e4m3, int8 };  // elements of `dtype`, 8-bit floats or integers
  DType dtype;
  const void* data;
  int64_t rows, columns, stride;
  Type type = Type::model;
};

// Converts every element to the type of `to` and stores it there.
void convert(const HostMatrix& from, const HostMatrix& to);

// The reason why weights of `dtype` cannot be prepacked in this process; empty if they can.
std::string prepack_missing(DType dtype);

// Copies a weight into the layout that oneDNN's products read. docs/cpu.md says what that gains and costs.
std::unique_ptr<PackedWeight> prepack(const PrepackParams& params);

// A product with a prepacked weight, params.packed. oneDNN returns a new tensor, which is copied to its place some rows
// at a time.
void packed_matmul(const GemmParams& params);

}  // namespace pop::cpu
