// The functions of a backend on a call, and the fold of gathered statistics: on the CPU, and on a CUDA device and its stream.
// No CUDA headers are needed to include this.
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
bool select(const char* name);           // for all calls from now on. False if this processor has none of that name

}  // namespace cpu
namespace cuda {

// One launch if the state moves and the batch is no larger than 2,048, else two: the ticket is part of the state, which calls
// that do not move it may share; and a large batch is settled by several blocks.
void step(const Call& call);
void backward(const Call& call);
void scale(const Call& call);
void reweight(const Call& call);
void fold(const Call& call);

// Doubles of scratch that a call needs; their contents do not matter before or after. 0 for a call without state.
int64_t workspace_size(const Call& call);

}  // namespace cuda
}  // namespace vadiff
