// The CUDA kernels: the same functions as in cpu.h, on a device and its stream. No CUDA headers are needed to include this.
#pragma once

#include "call.h"

namespace vadiff {
namespace cuda {

// Doubles of scratch that a call needs; their contents do not matter before or after. 0 for a call without state.
int64_t workspace_size(const Call& call);

// One launch if the state moves and the batch is no larger than 2,048, else two: the ticket is part of the state, which calls
// that do not move it may share; and a large batch is settled by several blocks.
void step(const Call& call);
void backward(const Call& call);
void scale(const Call& call);
void reweight(const Call& call);
void fold(const Call& call);

}  // namespace cuda
}  // namespace vadiff
