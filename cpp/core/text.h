// Numbers as text and back, the same under every locale. No streams: where a compiler brings a C++ library of its own
// into a process that has another, those of one find the locale facets of the other.
#pragma once

#include <charconv>
#include <string>
#include <string_view>
#include <type_traits>

namespace pop {

template <class Number>
std::string to_text(Number value) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof(text), value).ptr};
}

// For people: up to six digits.
inline std::string rounded(double value) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof(text), value, std::chars_format::general, 6).ptr};
}

template <class T>
void append_text(std::string& text, const T& value) {
  if constexpr (std::is_same_v<T, char>) {
    text += value;
  } else if constexpr (std::is_same_v<T, bool>) {
    text += value ? '1' : '0';
  } else if constexpr (std::is_floating_point_v<T>) {
    text += rounded(value);
  } else if constexpr (std::is_integral_v<T>) {
    text += to_text(value);
  } else {
    text += std::string_view(value);
  }
}

// Texts and numbers, one after the other.
template <class... Args>
std::string join(const Args&... args) {
  std::string text;
  (append_text(text, args), ...);
  return text;
}

}  // namespace pop
