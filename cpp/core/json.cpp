#include "core/json.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <limits>
#include <stdexcept>

#include "core/text.h"

namespace pop::json {

namespace {

constexpr int kMaxDepth = 64;

class Parser {
 public:
  Parser(const std::string& text, const std::string& what) : text_(text), what_(what) {}

  Value document() {
    Value value = parse_value(0);
    skip_space();
    if (at_ != text_.size()) fail("the end of the text");
    return value;
  }

 private:
  Value parse_value(int depth) {
    if (depth > kMaxDepth) fail("no deeper nesting than " + std::to_string(kMaxDepth));
    skip_space();
    switch (peek()) {
      case '{':
        return parse_object(depth);
      case '[':
        return parse_array(depth);
      case '"':
        return parse_string();
      case 't':
        return literal("true", true);
      case 'f':
        return literal("false", false);
      case 'n':
        return literal("null", Value());
      default:
        return parse_number();
    }
  }

  Value parse_object(int depth) {
    Object members;
    ++at_;
    skip_space();
    if (accept('}')) return members;
    do {
      skip_space();
      if (peek() != '"') fail("a member name in double quotes");
      std::string name = parse_string();
      for (const auto& member : members) {
        if (member.first == name) fail("each member once, not \"" + name + "\" again");
      }
      skip_space();
      if (!accept(':')) fail("':'");
      members.emplace_back(std::move(name), parse_value(depth + 1));
      skip_space();
    } while (accept(','));
    if (!accept('}')) fail("',' or '}'");
    return members;
  }

  Value parse_array(int depth) {
    Array values;
    ++at_;
    skip_space();
    if (accept(']')) return values;
    do {
      values.push_back(parse_value(depth + 1));
      skip_space();
    } while (accept(','));
    if (!accept(']')) fail("',' or ']'");
    return values;
  }

  std::string parse_string() {
    std::string out;
    ++at_;
    while (!accept('"')) {
      const unsigned char c = peek();
      if (at_ == text_.size() || c < 0x20) fail("a closing '\"'");
      ++at_;
      if (c == '\\') {
        parse_escape(out);
      } else {
        out.push_back(static_cast<char>(c));
      }
    }
    return out;
  }

  void parse_escape(std::string& out) {
    static const std::string letters = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
    const char c = peek();
    if (const size_t i = letters.find(c); at_ < text_.size() && i != std::string::npos) {
      ++at_;
      out.push_back(meanings[i]);
      return;
    }
    if (!accept('u')) fail("an escape sequence");
    uint32_t code = parse_hex4();
    if (code >= 0xD800 && code < 0xDC00 && text_.compare(at_, 2, "\\u") == 0) {
      at_ += 2;
      const uint32_t low = parse_hex4();
      if (low < 0xDC00 || low > 0xDFFF) fail("a low surrogate");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else if (code >= 0xD800 && code <= 0xDFFF) {
      fail("a pair of surrogates");
    }
    append_utf8(out, code);
  }

  uint32_t parse_hex4() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = peek();
      if (!std::isxdigit(static_cast<unsigned char>(c))) fail("four hexadecimal digits");
      code = code * 16 + (c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
      ++at_;
    }
    return code;
  }

  static void append_utf8(std::string& out, uint32_t code) {
    const auto tail = [&](int shift) { out.push_back(static_cast<char>(0x80 | ((code >> shift) & 0x3F))); };
    if (code < 0x80) {
      out.push_back(static_cast<char>(code));
    } else if (code < 0x800) {
      out.push_back(static_cast<char>(0xC0 | (code >> 6)));
      tail(0);
    } else if (code < 0x10000) {
      out.push_back(static_cast<char>(0xE0 | (code >> 12)));
      tail(6), tail(0);
    } else {
      out.push_back(static_cast<char>(0xF0 | (code >> 18)));
      tail(12), tail(6), tail(0);
    }
  }

  // -?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?
  Value parse_number() {
    const size_t begin = at_;
    accept('-');
    if (!accept('0')) digits("a value");
    bool integral = true;
    if (accept('.')) {
      integral = false;
      digits("a digit");
    }
    if (accept('e') || accept('E')) {
      integral = false;
      if (!accept('+')) accept('-');
      digits("a digit");
    }
    const char *first = text_.data() + begin, *last = text_.data() + at_;
    int64_t integer = 0;
    double number = 0;
    const auto read = integral ? std::from_chars(first, last, integer) : std::from_chars(first, last, number);
    if (read.ec != std::errc() || read.ptr != last) {
      at_ = begin;
      fail(integral ? "an integer of 64 bits" : "a finite number");
    }
    return integral ? Value(integer) : Value(number);
  }

  void digits(const char* expected) {
    if (!std::isdigit(static_cast<unsigned char>(peek()))) fail(expected);
    while (std::isdigit(static_cast<unsigned char>(peek()))) ++at_;
  }

  Value literal(const std::string& word, Value value) {
    if (text_.compare(at_, word.size(), word) != 0) fail("a value");
    at_ += word.size();
    return value;
  }

  void skip_space() {
    while (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r') ++at_;
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool accept(char c) {
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  [[noreturn]] void fail(const std::string& expected) const {
    const std::string got = at_ == text_.size() ? "the end of the text" : "'" + text_.substr(at_, 16) + "'";
    throw std::invalid_argument(what_ + ": not JSON: expected " + expected + " at offset " + std::to_string(at_) +
                                ", got " + got);
  }

  const std::string& text_;
  const std::string& what_;
  size_t at_ = 0;
};

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out.push_back('\\');
      out.push_back(c);
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", c);
      out += escape;
    } else {
      out.push_back(c);
    }
  }
  return out + '"';
}

// The shortest text that reads back as the same double, never that of an integer.
std::string number_text(double value) {
  const std::string text = to_text(value);  // the shortest that reads back as the same number
  return text.find_first_of(".e") == std::string::npos ? text + ".0" : text;
}

}  // namespace

std::string Value::dump() const {
  const auto joined = [](char open, const auto& items, const auto& text, char close) {
    std::string out(1, open);
    for (const auto& item : items) {
      if (out.size() > 1) out += ", ";
      out += text(item);
    }
    out += close;
    return out;
  };
  const auto member_text = [](const auto& member) {
    std::string out = quoted(member.first);
    out += ": ";
    out += member.second.dump();
    return out;
  };
  if (const bool* value = boolean()) return *value ? "true" : "false";
  if (const int64_t* value = integer()) return std::to_string(*value);
  if (const double* value = number()) return number_text(*value);
  if (const std::string* value = string()) return quoted(*value);
  if (const Array* values = array()) return joined('[', *values, [](const Value& v) { return v.dump(); }, ']');
  if (const Object* members = object()) return joined('{', *members, member_text, '}');
  return "null";
}

Value parse(const std::string& text, const std::string& what) { return Parser(text, what).document(); }

Members::Members(Value value, std::string what) : value_(std::move(value)), what_(std::move(what)) {
  if (value_.object() == nullptr) throw std::invalid_argument(what_ + ": expected a JSON object, got " + value_.dump());
}

bool Members::boolean(const std::string& name) const {
  const Value& value = get(name);
  if (const bool* found = value.boolean()) return *found;
  fail(name, "true or false", value.dump());
}

int64_t Members::integer(const std::string& name) const {
  const Value& value = get(name);
  if (const int64_t* found = value.integer()) return *found;
  fail(name, "an integer", value.dump());
}

double Members::number(const std::string& name) const {
  const Value& value = get(name);
  if (const double* found = value.number()) return *found;
  if (const int64_t* found = value.integer()) return static_cast<double>(*found);
  fail(name, "a number", value.dump());
}

std::string Members::string(const std::string& name) const {
  const Value& value = get(name);
  if (const std::string* found = value.string()) return *found;
  fail(name, "a string", value.dump());
}

std::vector<int64_t> Members::integers(const std::string& name) const {
  const Value& value = get(name);
  const Array* found = value.array();
  if (found == nullptr) fail(name, "a list of integers", value.dump());
  std::vector<int64_t> integers;
  for (const Value& element : *found) {
    if (element.integer() == nullptr) fail(name, "a list of integers", value.dump());
    integers.push_back(*element.integer());
  }
  return integers;
}

void Members::only(const std::vector<std::string>& names) const {
  for (const auto& [name, value] : *value_.object()) {
    if (std::find(names.begin(), names.end(), name) == names.end()) fail(name, "no such member", value.dump());
  }
}

const Value* Members::find(const std::string& name) const {
  for (const auto& member : *value_.object()) {
    if (member.first == name) return &member.second;
  }
  return nullptr;
}

const Value& Members::get(const std::string& name) const {
  const Value* value = find(name);
  if (value == nullptr) fail(name, "a value", "none");
  return *value;
}

void Members::fail(const std::string& name, const std::string& expected, const std::string& got) const {
  throw std::invalid_argument(what_ + ": " + name + ": expected " + expected + ", got " + got);
}

}  // namespace pop::json
