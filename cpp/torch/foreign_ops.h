// The operators of other libraries that this one calls, each under the schemas it was written against.
//
// The dispatcher passes no argument count: an operator that gained an argument in another version
// would read past the stack, silently. So Python compares these schemas with those of the running
// process at import (python/pop_ext/operators.py) and reports which of them it found; an operator
// whose schema is unknown is not called.
#pragma once

#include <string>

namespace pop::foreign {

// One schema a line. Lines of one operator are its variants, in order from 0.
extern const char* const kSchemas;

// Variant of `name` (with its overload, "aten::mm.out") in this process, or -1 and why there is none.
void set_variant(const std::string& name, int variant, const std::string& reason);

// aten's operators are taken to be of variant 0, those of other libraries to be missing, until Python has looked.
int variant_of(const std::string& name);

// Why it is not called; empty where it can be.
std::string reason_against(const std::string& name);

// The variant; throws std::runtime_error with the reason where there is none.
int require(const std::string& name);

}  // namespace pop::foreign
