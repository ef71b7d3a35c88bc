// The operators of other libraries that this library calls, with the schemas that the calls were written for.
//
// The dispatcher passes no argument count: an operator that gained an argument in another version would silently read
// past the stack. Python therefore compares these schemas with those of the running process at import and reports which
// it found. An operator with an unknown schema is never called.
#pragma once

#include <string>

namespace pop::foreign {

// One schema per line. The lines of one operator are its variants, numbered from 0.
extern const char* const kSchemas;

// Sets the variant of `name` (with its overload, such as "aten::mm.out") in this process, or -1 and the reason.
void set_variant(const std::string& name, int variant, const std::string& reason);

// Until set_variant is called, aten's operators have variant 0, and those of other libraries are missing (-1).
int variant_of(const std::string& name);

// The reason why the operator is not called; empty if it can be.
std::string reason_against(const std::string& name);

// The variant; throws std::runtime_error with the reason if there is none.
int require(const std::string& name);

}  // namespace pop::foreign
