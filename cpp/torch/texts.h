// Texts that cross torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace pop {

// A str argument of an operator. Used in place of std::string, whose conversion in torch's headers (2.13) makes a
// second string and never frees it.
struct TextArgument {
  std::string text;
};

// A text that an operator returns, as int[]: torch frees lists, but no string (2.13).
using Utf8 = std::vector<int64_t>;
inline Utf8 utf8(const std::string& text) {
  Utf8 bytes;
  for (const char c : text) bytes.push_back(static_cast<unsigned char>(c));
  return bytes;
}

}  // namespace pop

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)

template <>
struct ToImpl<pop::TextArgument> {
  static pop::TextArgument call(StableIValue value, uint64_t /*build_version*/, bool /*is_internal*/) {
    const auto discard = [](StringHandle owned) { torch_delete_string(owned); };
    const std::unique_ptr<StringOpaque, decltype(discard)> handle(to<StringHandle>(value), discard);
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle.get(), &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle.get(), &data));
    return {std::string(data, length)};
  }
};

HIDDEN_NAMESPACE_END(torch, stable, detail)
