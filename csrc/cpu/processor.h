// Which instruction sets this processor has. Numbers rise with what they can do.
#pragma once

#include "passes.h"

namespace rsa {

int best_instruction_set();
// Its number, or -1 if there is none of that name here.
int instruction_set_of(const char* name);
const char* name_of(int instruction_set);
const Passes& passes_for(int instruction_set, Element element);

}  // namespace rsa
