// A small strict JSON reader and writer, for specs and plans.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace pop::json {

class Value;
using Array = std::vector<Value>;
using Object = std::vector<std::pair<std::string, Value>>;  // in the order of the text, no key twice

class Value {
 public:
  Value() = default;
  Value(bool value) : data_(value) {}
  Value(int64_t value) : data_(value) {}
  Value(double value) : data_(value) {}  // finite
  Value(const char* value) : data_(std::string(value)) {}
  Value(std::string value) : data_(std::move(value)) {}
  Value(Array value) : data_(std::move(value)) {}
  Value(Object value) : data_(std::move(value)) {}
  Value(const std::vector<int64_t>& values) : data_(Array(values.begin(), values.end())) {}

  // The content as that type, or null. An integer is a number, too.
  const bool* boolean() const { return std::get_if<bool>(&data_); }
  const int64_t* integer() const { return std::get_if<int64_t>(&data_); }
  const double* number() const { return std::get_if<double>(&data_); }
  const std::string* string() const { return std::get_if<std::string>(&data_); }
  const Array* array() const { return std::get_if<Array>(&data_); }
  const Object* object() const { return std::get_if<Object>(&data_); }

  std::string dump() const;

 private:
  std::variant<std::nullptr_t, bool, int64_t, double, std::string, Array, Object> data_ = nullptr;
};

// Throws std::invalid_argument naming `what`, the place and what was expected.
Value parse(const std::string& text, const std::string& what);

// Reads the members of an object; each getter throws std::invalid_argument naming `what`, the
// member, what was expected and what came.
class Members {
 public:
  Members(Value value, std::string what);

  bool has(const std::string& name) const { return find(name) != nullptr; }
  bool boolean(const std::string& name) const;
  int64_t integer(const std::string& name) const;
  double number(const std::string& name) const;
  std::string string(const std::string& name) const;
  std::vector<int64_t> integers(const std::string& name) const;

  // Throws when there is a member that is not in `names`.
  void only(const std::vector<std::string>& names) const;

 private:
  const Value* find(const std::string& name) const;
  const Value& get(const std::string& name) const;
  [[noreturn]] void fail(const std::string& name, const std::string& expected, const std::string& got) const;

  Value value_;  // an object
  std::string what_;
};

}  // namespace pop::json
