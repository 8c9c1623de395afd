// The CPU kernels: the four functions of a backend, and the fold of gathered statistics. cuda.h has the same for a device.
#pragma once

#include "call.h"
#include "cpu_rows.h"

namespace vadiff {
namespace cpu {

void step(const Call& call);
void backward(const Call& call);
void scale(const Call& call);
void reweight(const Call& call);
void fold(const Call& call);  // merges `gathered` in the order of its rows, then folds

// The instruction sets that are compiled in and that this processor has, the best one first.
const RowKernels* available(int index);  // null past the last

bool select(const char* name);  // false if this processor has no instruction set of that name
const char* selected();

}  // namespace cpu
}  // namespace vadiff
