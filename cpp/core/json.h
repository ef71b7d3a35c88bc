// Strict JSON for model specs and plans: the parser of nlohmann::json under rules of its own.
//
// Beyond the grammar: a member name comes once per object, nesting is at most 64 deep, integers have 64 bits, numbers
// are finite. A text has at most kMaxBytes bytes. Every error is a std::invalid_argument that says what was expected,
// what came and where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace pop::json {

constexpr size_t kMaxBytes = size_t{16} << 20;

// Writes an object: its members in the order in which they are added, with a space after every colon and comma. Throws
// an exception of nlohmann::json for a string that is not UTF-8.
class Writer {
 public:
  void add(const char* name, bool value);
  void add(const char* name, int64_t value);
  void add(const char* name, double value);
  void add(const char* name, const std::string& value);
  void add(const char* name, const char* value) { add(name, std::string(value)); }
  void add(const char* name, const std::vector<int64_t>& value);

  std::string text() const { return "{" + members_ + "}"; }

 private:
  std::string& begin(const char* name);

  std::string members_;
};

struct Value;
using Object = std::map<std::string, std::unique_ptr<Value>>;

// The members of a JSON object. Each getter throws std::invalid_argument naming `what`, the member, what was expected
// and what came.
class Members {
 public:
  // `what` is the subject of every error text, such as "plan".
  Members(const std::string& text, std::string what);
  ~Members();

  bool has(const std::string& name) const { return object_.contains(name); }
  bool boolean(const std::string& name) const;
  int64_t integer(const std::string& name) const;
  double number(const std::string& name) const;  // an integer is a number, too
  std::string string(const std::string& name) const;
  std::vector<int64_t> integers(const std::string& name) const;

  // Throws if there is a member that is not in `names`.
  void only(std::vector<std::string> names) const;

 private:
  template <class T>
  const T& get(const std::string& name, const char* expected) const;
  [[noreturn]] void fail(const std::string& name, const std::string& expected, const std::string& got) const;

  Object object_;
  std::string what_;
};

}  // namespace pop::json
