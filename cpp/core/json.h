// Strict JSON for model specs and plans: nlohmann::json under rules of its own.
//
// Beyond the grammar: a member name comes once per object, nesting is at most 64 deep, integers have 64 bits, numbers
// are finite. A text has at most kMaxBytes bytes. Every error is a std::invalid_argument that says what was expected,
// what came and where.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#define JSON_NO_IO  // no streams: text goes in and out as std::string
#include <nlohmann/json.hpp>

namespace pop::json {

constexpr size_t kMaxBytes = size_t{16} << 20;

// Members in the order in which they are added. For writing only: look-up is linear in the number of members.
using Writer = nlohmann::ordered_json;

// The text of `value`, with a space after every colon and comma. Throws nlohmann::json::type_error for a string that
// is not UTF-8.
std::string dump(const Writer& value);

// The members of a JSON object. Each getter throws std::invalid_argument naming `what`, the member, what was expected
// and what came.
class Members {
 public:
  // `what` is the subject of every error text, such as "plan".
  Members(const std::string& text, std::string what);

  bool has(const std::string& name) const { return object_.contains(name); }
  bool boolean(const std::string& name) const;
  int64_t integer(const std::string& name) const;
  double number(const std::string& name) const;  // an integer is a number, too
  std::string string(const std::string& name) const;
  std::vector<int64_t> integers(const std::string& name) const;

  // Throws if there is a member that is not in `names`.
  void only(std::vector<std::string> names) const;

 private:
  const nlohmann::json& get(const std::string& name) const;
  [[noreturn]] void fail(const std::string& name, const std::string& expected, const std::string& got) const;

  nlohmann::json object_;
  std::string what_;
};

}  // namespace pop::json
