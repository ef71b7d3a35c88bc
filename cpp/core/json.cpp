#include "core/json.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <variant>

#include "core/text.h"

#define JSON_NO_IO  // no streams: text goes in and out as std::string
#include <nlohmann/json.hpp>

namespace pop::json {

// Not an nlohmann::json: to destroy one that is an array or an object takes memory, and without any ends the process.
struct Value {
  std::variant<std::nullptr_t, bool, int64_t, double, std::string, std::vector<Value>, Object> data;
};

namespace {

using Array = std::vector<Value>;

constexpr size_t kMaxDepth = 64;

// Reads a text and counts the characters that the parser has taken.
class CountingIterator {
 public:
  using difference_type = std::ptrdiff_t;
  using value_type = char;
  using pointer = const char*;
  using reference = const char&;
  using iterator_category = std::input_iterator_tag;

  CountingIterator(const char* at, size_t* taken) : at_(at), taken_(taken) {}
  reference operator*() const { return *at_; }
  CountingIterator& operator++() {
    ++at_;
    ++*taken_;
    return *this;
  }
  CountingIterator operator++(int) {
    const CountingIterator before = *this;
    ++*this;
    return before;
  }
  bool operator==(const CountingIterator& other) const { return at_ == other.at_; }
  bool operator!=(const CountingIterator& other) const { return at_ != other.at_; }

 private:
  const char* at_;
  size_t* taken_;
};

// What was expected, by a piece of the parser's message. The first piece that the message contains decides.
struct Expectation {
  const char* piece;
  const char* expected;
};
// Between values, where a token of any kind is out of place: the error is where the token begins.
constexpr Expectation kBetweenValues[] = {
    {"; expected end of input", "the end of the text"},
    {"parsing object separator", "':'"},
    {"parsing object -", "',' or '}'"},
    {"parsing array", "',' or ']'"},
};
// Inside a string or a number: the error is at the last character that was read.
constexpr Expectation kInToken[] = {
    {"forbidden character after backslash", "an escape sequence"},
    {"hex digits", "four hexadecimal digits"},
    {"surrogate", "a pair of surrogates"},
    {"missing closing quote", "a closing '\"'"},
    {"control character", "a closing '\"'"},
    {"ill-formed UTF-8", "UTF-8"},
    {"expected digit after '-'", "a value"},
    {"invalid number", "a digit"},
};

// Builds a value from the parser's events, and refuses what the grammar allows and this file does not.
class Builder final : public nlohmann::json_sax<nlohmann::json> {
 public:
  Builder(const std::string& text, const std::string& what, const size_t& taken)
      : text_(text), what_(what), taken_(taken) {}

  Value take() { return std::move(root_); }

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(int64_t value) override { return add(value); }
  bool number_unsigned(uint64_t value) override {
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) fail_number();
    return add(static_cast<int64_t>(value));
  }
  bool number_float(double value, const std::string& token) override {
    // An integer that fits no 64 bits comes as a double.
    if (token.find_first_of(".eE") == std::string::npos) fail_number();
    // A number that is too small for a double comes as zero.
    const std::string digits = token.substr(0, token.find_first_of("eE"));
    if (value == 0 && digits.find_first_of("123456789") != std::string::npos) {
      fail("a finite number", text_.rfind(token, taken_ - token.size()));
    }
    return add(value);
  }
  bool string(std::string& value) override { return add(std::move(value)); }
  bool binary(nlohmann::json::binary_t&) override { return false; }  // no event of a text
  bool start_object(size_t) override { return open({Object()}); }
  bool end_object() override { return close(); }
  bool start_array(size_t) override { return open({Array()}); }
  bool end_array() override { return close(); }

  bool key(std::string& name) override {
    const auto [member, is_new] = std::get<Object>(open_.back()->data).try_emplace(name, nullptr);
    if (!is_new) fail("each member once, not \"" + shortened(name) + "\" again", taken_);
    member_ = &member->second;
    return true;
  }

  bool parse_error(size_t position, const std::string& token, const nlohmann::detail::exception& error) override {
    const std::string_view message = error.what();
    const auto says = [&](const char* piece) { return message.find(piece) != std::string_view::npos; };
    const size_t size = text_.size();
    if (position == 0 || position > size || says("unexpected end of input")) position = size + 1;
    // Where the token begins. `token` also holds the tokens in front of it, unless it is a number or a string.
    const auto begin = [&] {
      const bool number_or_string = says("number") || says("invalid string") || says("unexpected string");
      if (number_or_string && !says("unexpected end of input")) return std::min(position, size) - token.size();
      const bool literal = says("invalid literal");
      if (position > size && !literal) return size;
      size_t at = std::min(position - 1, size);
      if (!literal && !is_letter(text_[at])) return at;
      while (at > 0 && is_letter(text_[at - 1])) --at;
      return at;
    };
    for (const Expectation& entry : kBetweenValues) {
      if (says(entry.piece)) fail(entry.expected, begin());
    }
    const bool is_key = says("parsing object key");
    if (!is_key || says("invalid string")) {
      for (const Expectation& entry : kInToken) {
        if (says(entry.piece)) fail(entry.expected, position - 1);
      }
    }
    if (is_key) fail("a member name in double quotes", begin());
    fail(says("number overflow") ? "a finite number" : "a value", begin());
  }

  [[noreturn]] void fail(const std::string& expected, size_t offset) const {
    const std::string got = offset >= text_.size() ? "the end of the text" : "'" + text_.substr(offset, 16) + "'";
    throw std::invalid_argument(what_ + ": not JSON: expected " + expected + " at offset " + std::to_string(offset) +
                                ", got " + got);
  }

 private:
  static bool is_letter(char c) { return std::isalpha(static_cast<unsigned char>(c)) != 0; }

  Value* place(Value value) {
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    if (auto* array = std::get_if<Array>(&open_.back()->data)) {
      array->push_back(std::move(value));
      return &array->back();
    }
    *member_ = std::make_unique<Value>(std::move(value));
    return member_->get();
  }

  template <class T>
  bool add(T value) {
    place({std::move(value)});
    return true;
  }

  bool open(Value container) {
    if (open_.size() == kMaxDepth + 1) fail("no deeper nesting than " + std::to_string(kMaxDepth), taken_ - 1);
    open_.push_back(place(std::move(container)));
    return true;
  }

  bool close() {
    open_.pop_back();
    return true;
  }

  // The parser has read one character beyond the number, if there is one.
  [[noreturn]] void fail_number() const {
    const auto in_number = [](char c) { return std::isdigit(static_cast<unsigned char>(c)) || c == '-'; };
    size_t begin = taken_;
    while (begin > 0 && !in_number(text_[begin - 1])) --begin;
    while (begin > 0 && in_number(text_[begin - 1])) --begin;
    fail("an integer of 64 bits", begin);
  }

  const std::string& text_;
  const std::string& what_;
  const size_t& taken_;
  Value root_;
  std::vector<Value*> open_;                  // the objects and arrays around the next value, outermost first
  std::unique_ptr<Value>* member_ = nullptr;  // where the value of the member that was named last goes
};

Value parse(const std::string& text, const std::string& what) {
  if (text.size() > kMaxBytes) {
    throw std::invalid_argument(what + ": expected a text of at most " + std::to_string(kMaxBytes) + " bytes, got " +
                                std::to_string(text.size()));
  }
  size_t taken = 0;
  Builder builder(text, what, taken);
  if (text.starts_with("\xEF\xBB\xBF")) builder.fail("a value", 0);  // nlohmann::json skips a byte order mark
  nlohmann::json::sax_parse(CountingIterator(text.data(), &taken), CountingIterator(text.data() + text.size(), &taken),
                            &builder);
  return builder.take();
}

template <class Scalar>
std::string scalar(const Scalar& value) {
  return nlohmann::json(value).dump();
}

void separate(std::string& out, bool first) {
  if (!first) out += ", ";
}

void append(std::string& out, const Value& value) {
  if (const auto* array = std::get_if<Array>(&value.data)) {
    out += '[';
    for (size_t i = 0; i < array->size(); ++i) {
      separate(out, i == 0);
      append(out, (*array)[i]);
    }
    out += ']';
  } else if (const auto* object = std::get_if<Object>(&value.data)) {
    out += '{';
    for (auto member = object->begin(); member != object->end(); ++member) {
      separate(out, member == object->begin());
      out += scalar(member->first) + ": ";
      append(out, *member->second);
    }
    out += '}';
  } else {
    std::visit(
        [&](const auto& leaf) {
          using Leaf = std::decay_t<decltype(leaf)>;
          if constexpr (!std::is_same_v<Leaf, Array> && !std::is_same_v<Leaf, Object>) out += scalar(leaf);
        },
        value.data);
  }
}

std::string text_of(const Value& value) {
  std::string text;
  append(text, value);
  return text;
}

}  // namespace

std::string& Writer::begin(const char* name) {
  separate(members_, members_.empty());
  return members_ += scalar(std::string(name)) + ": ";
}

void Writer::add(const char* name, bool value) { begin(name) += scalar(value); }
void Writer::add(const char* name, int64_t value) { begin(name) += scalar(value); }
void Writer::add(const char* name, double value) { begin(name) += scalar(value); }
void Writer::add(const char* name, const std::string& value) { begin(name) += scalar(value); }
void Writer::add(const char* name, const std::vector<int64_t>& value) {
  std::string& out = begin(name);
  out += '[';
  for (size_t i = 0; i < value.size(); ++i) {
    separate(out, i == 0);
    out += scalar(value[i]);
  }
  out += ']';
}

Members::Members(const std::string& text, std::string what) : what_(std::move(what)) {
  Value value = parse(text, what_);
  Object* object = std::get_if<Object>(&value.data);
  if (object == nullptr) {
    throw std::invalid_argument(what_ + ": expected a JSON object, got " + shortened(text_of(value)));
  }
  object_ = std::move(*object);
}

Members::~Members() = default;

bool Members::boolean(const std::string& name) const { return get<bool>(name, "true or false"); }

int64_t Members::integer(const std::string& name) const { return get<int64_t>(name, "an integer"); }

double Members::number(const std::string& name) const {
  const auto found = object_.find(name);
  const bool is_integer = found != object_.end() && std::holds_alternative<int64_t>(found->second->data);
  return is_integer ? static_cast<double>(integer(name)) : get<double>(name, "a number");
}

std::string Members::string(const std::string& name) const { return get<std::string>(name, "a string"); }

std::vector<int64_t> Members::integers(const std::string& name) const {
  const char* expected = "a list of integers";
  const Array& array = get<Array>(name, expected);
  std::vector<int64_t> values;
  for (const Value& value : array) {
    const int64_t* integer = std::get_if<int64_t>(&value.data);
    if (integer == nullptr) fail(name, expected, text_of(*object_.at(name)));
    values.push_back(*integer);
  }
  return values;
}

void Members::only(std::vector<std::string> names) const {
  std::ranges::sort(names);
  for (const auto& [name, value] : object_) {
    if (!std::ranges::binary_search(names, name)) fail(name, "no such member", text_of(*value));
  }
}

template <class T>
const T& Members::get(const std::string& name, const char* expected) const {
  const auto found = object_.find(name);
  if (found == object_.end()) fail(name, "a value", "none");
  const T* value = std::get_if<T>(&found->second->data);
  if (value == nullptr) fail(name, expected, text_of(*found->second));
  return *value;
}

void Members::fail(const std::string& name, const std::string& expected, const std::string& got) const {
  throw std::invalid_argument(what_ + ": " + shortened(name) + ": expected " + expected + ", got " + shortened(got));
}

}  // namespace pop::json
