// The CUDA kernels: the four functions of a backend, on raw pointers and a stream. No CUDA headers are needed to include this.
#pragma once

#include <stdint.h>

#include "step.h"

namespace vadiff {

struct Where {
  int device;
  void* stream;       // cudaStream_t
  double* workspace;  // of workspace_size() doubles; contents do not matter before or after
};

namespace cuda {
int64_t workspace_size(int64_t samples, int64_t elements, int bins, int device);
}

// One launch if statistics move and the batch is no larger than 2,048, else two: the ticket belongs to the statistics, and calls
// that do not move them may overlap; and a large batch is settled by several blocks.
template <class C>
void diffusion_loss(RowsTask<C> rows, int64_t samples, const Levels<C>& levels, const Results<C>& results,
                    const Update& update, const Where& where);

template <class C>
void diffusion_loss_backward(RowsTask<C> rows, int64_t samples, const C* upstream, int64_t stride, bool mean, const C* saved,
                             const Where& where);

template <class C>
void scale_gradient(const void* gradient, void* out, int dtype, int64_t size, const C* upstream, const C* mean_loss,
                    const Where& where);

template <class C>
void reweight(const C* loss, int64_t samples, const Levels<C>& levels, const Results<C>& results, const Update& update,
              const Where& where);

void fold(const double* parts, int64_t count, const Update& update, const Where& where);

}  // namespace vadiff
