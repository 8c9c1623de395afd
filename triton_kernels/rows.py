"""Kernels over the elements of the samples: per-sample loss with gradient, gradient alone, gradient times upstream.

Grids are fixed (a few programs per multiprocessor) and stride over work items: an item is one of `splits` runs of
`chunk` elements of one sample. Every sum has a fixed order, and no address arithmetic is done in 32 bits.

Names: `_ptr` pointers (None: not given, resolved at compile time), `o_` offsets, `m_` masks; upper case is constexpr.
The bool EVEN promises rows that start at a multiple of 16 elements: without it the loads of a row cannot be wide.
"""

import triton
import triton.language as tl

BLOCK = 2048  # elements per step: 16 per thread, two 128-bit loads in bf16, four in float32; <= 4096 (sums are float32)
NUM_WARPS = 4
# Not compiled in: a last batch of another size must not wait for the compiler in the middle of a training.
SIZES = ["samples", "elements", "splits", "chunk"]


@triton.jit
def item_offsets(item, elements, splits, chunk, EVEN: tl.constexpr):
    """Sample, first and last-plus-one element of an item, and where its sample starts; all int64."""
    long = tl.full((), 1, tl.int64)
    sample = item // splits  # in 32 bits: the 64-bit division is a subroutine
    start = (item - sample * splits) * (chunk * long)
    sample = sample * long
    end = tl.minimum(start + chunk, elements)
    row = sample * elements
    if EVEN:  # what the compiler cannot know of arguments that it does not specialise on
        row = tl.multiple_of(row, 16)
        end = tl.multiple_of(end, 16)
    return sample, tl.multiple_of(start, 16), end, row


@triton.jit
def load_coefficient(coefficient_ptr, coefficient, sample):
    """One sample's coefficient: loaded if there is one per sample, else the number."""
    if coefficient_ptr is not None:
        value = tl.load(coefficient_ptr + sample).to(tl.float32)
    else:
        value = coefficient
    return value


@triton.jit
def load_residual(prediction_ptr, target_ptr, noise_ptr, a, b, c, o, m):
    """r = a*F + b*x0 + c*eps in float32 for elements `o`; 0 where masked out. m: mask, None for all of them."""
    other: tl.constexpr = None if m is None else 0.0
    r = a * tl.load(prediction_ptr + o, mask=m, other=other).to(tl.float32)
    if target_ptr is not None:
        r += b * tl.load(target_ptr + o, mask=m, other=other).to(tl.float32)
    if noise_ptr is not None:
        r += c * tl.load(noise_ptr + o, mask=m, other=other).to(tl.float32)
    return r


@triton.jit
def element_loss(r, huber_delta, HUBER: tl.constexpr):
    """r**2, or Huber's function of r."""
    if HUBER:
        size = tl.abs(r)
        e = tl.where(size <= huber_delta, 0.5 * r * r, huber_delta * (size - 0.5 * huber_delta))
    else:
        e = r * r
    return e


@triton.jit
def sum_of_four(e, BLOCK: tl.constexpr):
    """Sums of four neighbours of e [BLOCK] in float32, as [BLOCK/4] float64."""
    return tl.sum(tl.reshape(e, (BLOCK // 4, 4)), axis=1).to(tl.float64)


@triton.jit
def store_gradient(gradient_ptr, factor, masked, r, huber_delta, o, m, HUBER: tl.constexpr):
    """factor * (2r, or r clamped to +-delta) in the gradient's dtype; exactly 0 where masked."""
    if HUBER:
        # Without PropagateNan a NaN would become +-delta.
        slope = tl.minimum(tl.maximum(r, -huber_delta, tl.PropagateNan.ALL), huber_delta, tl.PropagateNan.ALL)
    else:
        slope = 2.0 * r
    g = tl.where(masked, 0.0, factor * slope)
    tl.store(gradient_ptr + o, g.to(gradient_ptr.dtype.element_ty), mask=m)


@triton.jit
def load_weights(
    log_snr,  # float32, any shape
    base_weight_ptr,  # [B] float32 or None
    sample_weight_ptr,  # [B] float32 or None
    weight_ptr,  # [B] float32 or None
    log_weights_ptr,  # [K] float32 or None: ln w at the bin centres
    sample,  # index, of log_snr's shape
    m,  # mask, of log_snr's shape
    low, inv_width, bins,
):  # fmt: skip
    """w, u, v of each sample. w: given, else linear in the table of ln w and flat beyond the outer centres, else 1; NaN
    where log-SNR is."""
    w = tl.where(m, 1.0, 1.0)  # ones of log_snr's shape
    u = w
    v = w
    if base_weight_ptr is not None:
        u = tl.load(base_weight_ptr + sample, mask=m, other=1.0)
    if sample_weight_ptr is not None:
        v = tl.load(sample_weight_ptr + sample, mask=m, other=1.0)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + sample, mask=m, other=1.0)
    elif log_weights_ptr is not None:
        position = (log_snr - low) * inv_width - 0.5
        position = tl.where(position == position, position, 0.0)  # NaN
        position = tl.minimum(tl.maximum(position, 0.0), bins - 1.0)
        left = tl.minimum(tl.floor(position), bins - 2.0)
        o_left = left.to(tl.int32)
        at_left = tl.load(log_weights_ptr + o_left, mask=m, other=0.0)
        at_right = tl.load(log_weights_ptr + o_left + 1, mask=m, other=0.0)
        w = tl.exp(at_left + (position - left) * (at_right - at_left))
    w = tl.where(log_snr == log_snr, w, log_snr)
    return w, u, v


@triton.jit(do_not_specialize=SIZES)
def rows_kernel(
    prediction_ptr,  # [B, D] float32, bfloat16 or float16
    target_ptr,  # [B, D] likewise, or None
    noise_ptr,  # [B, D] likewise, or None
    a_ptr,  # [B] float32 or None
    b_ptr,  # [B] float32 or None
    c_ptr,  # [B] float32 or None
    a, b, c,
    log_snr_ptr,  # [B] float32
    base_weight_ptr,  # [B] float32 or None
    sample_weight_ptr,  # [B] float32 or None
    weight_ptr,  # [B] float32 or None
    log_weights_ptr,  # [K] float32 or None
    partial_ptr,  # [B, splits] float64, out: sum of the element losses of each item
    gradient_ptr,  # [B, D] or None, out: gradient of the mean loss
    low, inv_width, bins, huber_delta,
    scale,  # 1 / (B*D)
    samples,  # B
    elements,  # D
    splits,
    chunk,  # elements per item, a multiple of BLOCK
    HUBER: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per-item sums of the element losses and, with `gradient_ptr`, the gradient: one pass over the data.

    Four neighbours, which one thread holds, are summed in float32, everything else in float64: the error does not grow
    with the sample, and no thread waits for another before the item's end."""
    for item in range(tl.program_id(0), samples * splits, tl.num_programs(0)):
        sample, start, end, row = item_offsets(item, elements, splits, chunk, EVEN)
        a_i = load_coefficient(a_ptr, a, sample)
        b_i = load_coefficient(b_ptr, b, sample)
        c_i = load_coefficient(c_ptr, c, sample)
        factor = 0.0
        masked = False
        if gradient_ptr is not None:
            log_snr = tl.load(log_snr_ptr + sample)
            w, u, v = load_weights(
                log_snr, base_weight_ptr, sample_weight_ptr, weight_ptr, log_weights_ptr, sample, sample >= 0,
                low, inv_width, bins,
            )  # fmt: skip
            masked = (u == 0.0) | (v == 0.0)
            factor = w * u * v * a_i * scale
        total = tl.zeros((BLOCK // 4,), tl.float64)
        whole = start + (end - start) // BLOCK * BLOCK
        for block in range(start, whole, BLOCK):
            o = row + tl.multiple_of(block, 16) + tl.arange(0, BLOCK)
            r = load_residual(prediction_ptr, target_ptr, noise_ptr, a_i, b_i, c_i, o, None)
            total += sum_of_four(element_loss(r, huber_delta, HUBER), BLOCK)  # before the store: ptxas spills otherwise
            if gradient_ptr is not None:
                store_gradient(gradient_ptr, factor, masked, r, huber_delta, o, None, HUBER)
        if whole < end:
            o_tail = whole + tl.arange(0, BLOCK)
            m = o_tail < end
            r = load_residual(prediction_ptr, target_ptr, noise_ptr, a_i, b_i, c_i, row + o_tail, m)
            total += sum_of_four(element_loss(r, huber_delta, HUBER), BLOCK)
            if gradient_ptr is not None:
                store_gradient(gradient_ptr, factor, masked, r, huber_delta, row + o_tail, m, HUBER)
        tl.store(partial_ptr + item, tl.sum(total))


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    upstream_ptr,  # scalar (stride 0) or [B] float32
    factor_ptr,  # [B] float32: w*u*v
    masked_ptr,  # [B] float32: 1 where masked
    prediction_ptr,  # [B, D]
    target_ptr,  # [B, D] or None
    noise_ptr,  # [B, D] or None
    a_ptr,  # [B] float32 or None
    b_ptr,  # [B] float32 or None
    c_ptr,  # [B] float32 or None
    a, b, c,
    gradient_ptr,  # [B, D], out
    upstream_stride, huber_delta,
    scale,  # 1/D, or 1/(B*D) for the mean loss
    samples, elements, splits, chunk, HUBER: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient from the saved inputs (deferred mode): upstream enters in float32, before any rounding."""
    for item in range(tl.program_id(0), samples * splits, tl.num_programs(0)):
        sample, start, end, row = item_offsets(item, elements, splits, chunk, EVEN)
        a_i = load_coefficient(a_ptr, a, sample)
        b_i = load_coefficient(b_ptr, b, sample)
        c_i = load_coefficient(c_ptr, c, sample)
        upstream = tl.load(upstream_ptr + sample * upstream_stride).to(tl.float32)
        factor = tl.load(factor_ptr + sample) * upstream * a_i * scale
        masked = tl.load(masked_ptr + sample) != 0.0
        whole = start + (end - start) // BLOCK * BLOCK
        for block in range(start, whole, BLOCK):
            o = row + tl.multiple_of(block, 16) + tl.arange(0, BLOCK)
            r = load_residual(prediction_ptr, target_ptr, noise_ptr, a_i, b_i, c_i, o, None)
            store_gradient(gradient_ptr, factor, masked, r, huber_delta, o, None, HUBER)
        if whole < end:
            o_tail = whole + tl.arange(0, BLOCK)
            m = o_tail < end
            r = load_residual(prediction_ptr, target_ptr, noise_ptr, a_i, b_i, c_i, row + o_tail, m)
            store_gradient(gradient_ptr, factor, masked, r, huber_delta, row + o_tail, m, HUBER)


@triton.jit
def scale_kernel(
    gradient_ptr,  # [N], in and out
    upstream_ptr,  # scalar float32
    total,  # N
    BLOCK: tl.constexpr,
):
    """gradient *= upstream. With upstream 1 there is nothing to do."""
    upstream = tl.load(upstream_ptr).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    last = tl.where(upstream == 1.0, 0, total + first * 0)
    for block in range(first, last, tl.num_programs(0).to(tl.int64) * BLOCK):
        o = tl.multiple_of(block, 16) + tl.arange(0, BLOCK)
        if block + BLOCK <= last:
            g = tl.load(gradient_ptr + o).to(tl.float32) * upstream
            tl.store(gradient_ptr + o, g.to(gradient_ptr.dtype.element_ty))
        else:
            m = o < last
            g = tl.load(gradient_ptr + o, mask=m, other=0.0).to(tl.float32) * upstream
            tl.store(gradient_ptr + o, g.to(gradient_ptr.dtype.element_ty), mask=m)
