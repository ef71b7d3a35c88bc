// Formats numbers, independent of the locale. No streams: if a process has two C++ libraries, the streams of one find
// the locale facets of the other.
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

// Up to six digits, for messages.
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

// Concatenates texts and numbers.
template <class... Args>
std::string join(const Args&... args) {
  std::string text;
  (append_text(text, args), ...);
  return text;
}

// The beginning of a text that may be long, for an error; cut between characters of UTF-8.
inline std::string shortened(std::string text) {
  constexpr size_t kShown = 200;
  if (text.size() <= kShown) return text;
  size_t end = kShown;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return text.substr(0, end) + "...";
}

}  // namespace pop
