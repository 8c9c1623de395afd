// The CPU kernels: the four functions of a backend, on raw pointers. cuda.h has the same ones for a device.
#pragma once

#include <stdint.h>

#include "step.h"

namespace vadiff {
namespace cpu {

// The instruction sets that are compiled in and that this processor has, the best one first.
const RowKernels* available(int index);  // null past the last

// Which one to use from now on, by name. False if there is none of that name here.
bool select(const char* name);
const char* selected();

}  // namespace cpu

template <class C>
void diffusion_loss(RowsTask<C> rows, int64_t samples, const Levels<C>& levels, const Results<C>& results,
                    const Update& update, int threads);

// `upstream` is a scalar if `mean`, else [B] at `stride`.
template <class C>
void diffusion_loss_backward(RowsTask<C> rows, int64_t samples, const C* upstream, int64_t stride, bool mean, const C* saved,
                             int threads);

template <class C>
void scale_gradient(const void* gradient, void* out, int dtype, int64_t size, const C* upstream, const C* mean_loss,
                    int threads);

// These two are over before a second thread would have woken.
template <class C>
void reweight(const C* loss, int64_t samples, const Levels<C>& levels, const Results<C>& results, const Update& update,
              int threads);

// Merge the batch statistics [parts, 4K + 1] in the order of their rows, then fold them.
void fold(const double* parts, int64_t count, const Update& update, int threads);

}  // namespace vadiff
