// The fused operations of this crate for NVIDIA GPUs. Activations are of type T (float or bf16), sums, parameters
// and their gradients float. Sums run in a fixed order, so that a step gives the same bits every time; there are no
// atomics. Shapes are named as in lib.rs.
//
// An instance for each T is exported under the name NAME_f32 or NAME_bf16 at the end of the file.

#include <cuda_bf16.h>
#include <mma.h>
#include <type_traits>

#include <math.h>

using bf16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

struct Sum {
  static constexpr float zero = 0.0f;
  __device__ static float combine(float a, float b) { return a + b; }
};
struct Max {
  static constexpr float zero = -INFINITY;
  __device__ static float combine(float a, float b) { return fmaxf(a, b); }
};

// Combines one value of every thread of the block; all threads get the result.
template <typename Op> __device__ float reduce(float value) {
  __shared__ float parts[32];
  for (int offset = 16; offset > 0; offset /= 2)
    value = Op::combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  __syncthreads(); // the parts of an earlier reduction have been read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : Op::zero;
  for (int offset = 16; offset > 0; offset /= 2)
    value = Op::combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

// The rotation of the heads of a row; without one, half is 0.
struct Rotation {
  const float *cos, *sin; // [positions, half]
  int half, rows_per_sequence, first_position;

  // Element i of a row rotated by its position, back when `sign` is -1; `at` reads an element of the row.
  template <typename At> __device__ float turn(At at, int row, int i, float sign) const {
    if (half == 0) return at(i);
    int position = first_position + row % rows_per_sequence;
    int in_head = i % (2 * half);
    int j = position * half + in_head % half;
    float c = cos[j], s = sin[j] * sign;
    return in_head < half ? at(i) * c - at(i + half) * s : at(i) * c + at(i - half) * s;
  }
};

// y = rotate(x / rms(x) * gain), a block a row.
template <typename T>
__device__ void norm_forward(const T *x, const float *gain, T *y, int d, float eps, Rotation rotation) {
  size_t base = (size_t)blockIdx.x * d;
  float squares = 0.0f;
  for (int i = threadIdx.x; i < d; i += blockDim.x) {
    float value = to_float(x[base + i]);
    squares += value * value;
  }
  float r = rsqrtf(reduce<Sum>(squares) / d + eps);
  auto normed = [&](int i) { return to_float(x[base + i]) * r * gain[i]; };
  for (int i = threadIdx.x; i < d; i += blockDim.x)
    y[base + i] = from_float<T>(rotation.turn(normed, blockIdx.x, i, 1.0f));
}

// dx of `rows_per_block` rows a block (added to dx when `add`), and the part of dgain that they make,
// parts [blocks, d]. Shared memory: d floats.
template <typename T>
__device__ void norm_backward(const T *x, const float *gain, const T *dy, T *dx, float *parts, int n_rows, int d,
                              int rows_per_block, float eps, bool add, Rotation rotation) {
  extern __shared__ float dgain[];
  for (int i = threadIdx.x; i < d; i += blockDim.x) dgain[i] = 0.0f;
  int first = blockIdx.x * rows_per_block;
  for (int row = first; row < min(first + rows_per_block, n_rows); row++) {
    size_t base = (size_t)row * d;
    auto gradient = [&](int i) { return to_float(dy[base + i]); };
    float squares = 0.0f, products = 0.0f;
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
      float value = to_float(x[base + i]);
      squares += value * value;
      products += rotation.turn(gradient, row, i, -1.0f) * gain[i] * value;
    }
    float r = rsqrtf(reduce<Sum>(squares) / d + eps);
    float c = reduce<Sum>(products) * r * r * r / d;
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
      float value = to_float(x[base + i]), g = rotation.turn(gradient, row, i, -1.0f);
      dgain[i] += g * value * r;
      float before = add ? to_float(dx[base + i]) : 0.0f;
      dx[base + i] = from_float<T>(before + g * gain[i] * r - value * c);
    }
  }
  for (int i = threadIdx.x; i < d; i += blockDim.x) parts[(size_t)blockIdx.x * d + i] = dgain[i];
}

// hidden [n, r] = silu(a) * b of products [n, 2r] = [a, b].
template <typename T> __device__ void activate(const T *products, T *hidden, size_t n, int r) {
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n * r) return;
  const T *row = products + i / r * 2 * r;
  float a = to_float(row[i % r]), b = to_float(row[r + i % r]);
  hidden[i] = from_float<T>(a * sigmoid(a) * b);
}

// Replaces products by their gradient and dhidden by hidden.
template <typename T> __device__ void activate_backward(T *products, T *dhidden, size_t n, int r) {
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n * r) return;
  T *row = products + i / r * 2 * r;
  float a = to_float(row[i % r]), b = to_float(row[r + i % r]), g = to_float(dhidden[i]);
  float s = sigmoid(a), silu = a * s;
  dhidden[i] = from_float<T>(silu * b);
  row[i % r] = from_float<T>(g * b * (s + silu * (1.0f - s)));
  row[r + i % r] = from_float<T>(g * silu);
}

// A block a row: logits [m, v] become their gradient in dlogits, and losses [m, 2] the negative log-likelihood and the
// loss with the z-loss, both unscaled. A target of 0xffffffff is not scored. Without dlogits there is no gradient.
template <typename T>
__device__ void cross_entropy(const float *logits, T *dlogits, const unsigned *targets, float *losses, int v,
                              float scale, float z_loss) {
  size_t base = (size_t)blockIdx.x * v;
  unsigned target = targets[blockIdx.x];
  bool scored = target != 0xffffffffu;
  float largest = Max::zero, sum = 0.0f;
  if (scored)
    for (int i = threadIdx.x; i < v; i += blockDim.x) largest = fmaxf(largest, logits[base + i]);
  largest = reduce<Max>(largest);
  if (scored)
    for (int i = threadIdx.x; i < v; i += blockDim.x) sum += __expf(logits[base + i] - largest);
  sum = reduce<Sum>(sum);
  float log_sum_exp = scored ? logf(sum) + largest : 0.0f;
  float factor = scored ? scale / sum * (1.0f + 2.0f * z_loss * log_sum_exp) : 0.0f;
  for (int i = threadIdx.x; dlogits && i < v; i += blockDim.x) {
    float g = scored ? __expf(logits[base + i] - largest) * factor - (i == target ? scale : 0.0f) : 0.0f;
    dlogits[base + i] = from_float<T>(g);
  }
  if (threadIdx.x == 0) {
    float nll = scored ? log_sum_exp - logits[base + target] : 0.0f;
    losses[2 * blockIdx.x] = nll;
    losses[2 * blockIdx.x + 1] = nll + z_loss * log_sum_exp * log_sum_exp;
  }
}

// y [n, d] = table [v, d] at ids, a block a row.
template <typename T> __device__ void embed(const float *table, const unsigned *ids, T *y, int d) {
  const float *row = table + (size_t)ids[blockIdx.x] * d;
  for (int i = threadIdx.x; i < d; i += blockDim.x) y[(size_t)blockIdx.x * d + i] = from_float<T>(row[i]);
}

// Adds to the row of each distinct id the gradients of its positions, order[first[b]] .. order[first[b + 1]], a block
// an id.
template <typename T>
__device__ void embed_backward(const T *dy, const unsigned *ids, const unsigned *first, const unsigned *order,
                               float *gradient, int d) {
  float *row = gradient + (size_t)ids[blockIdx.x] * d;
  for (int i = threadIdx.x; i < d; i += blockDim.x) {
    float sum = row[i];
    for (unsigned p = first[blockIdx.x]; p < first[blockIdx.x + 1]; p++) sum += to_float(dy[(size_t)order[p] * d + i]);
    row[i] = sum;
  }
}

// to [d] = or += the sum of the rows of parts [n, d].
extern "C" __global__ void sum_rows(const float *parts, float *to, int n, int d, bool add) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= d) return;
  float sum = add ? to[i] : 0.0f;
  for (int row = 0; row < n; row++) sum += parts[(size_t)row * d + i];
  to[i] = sum;
}

// parts [blocks] = the sum of x² of each block's elements.
extern "C" __global__ void squares(const float *x, double *parts, size_t n) {
  double sum = 0.0;
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
    sum += (double)x[i] * x[i];
  __shared__ double shared[256];
  shared[threadIdx.x] = sum;
  for (int offset = 128; offset > 0; offset /= 2) {
    __syncthreads();
    if (threadIdx.x < offset) shared[threadIdx.x] += shared[threadIdx.x + offset];
  }
  if (threadIdx.x == 0) parts[blockIdx.x] = shared[0];
}

struct AdamW {
  float beta1, beta2, eps, gradient_scale, keep, rate, correction2;
};

// One update of p, m and v in place (arXiv 1711.05101).
extern "C" __global__ void adamw(float *p, const float *g, float *m, float *v, size_t n, AdamW a) {
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float gradient = g[i] * a.gradient_scale;
  m[i] = a.beta1 * m[i] + (1.0f - a.beta1) * gradient;
  v[i] = a.beta2 * v[i] + (1.0f - a.beta2) * gradient * gradient;
  p[i] = p[i] * a.keep - a.rate * m[i] / (sqrtf(v[i] * a.correction2) + a.eps);
}

#include "attention.cuh"

// Instances by type. A macro, since the names that the program asks for must be plain.
#define INSTANCES(T, NAME)                                                                                             \
  extern "C" __global__ void norm_forward_##NAME(const T *x, const float *gain, T *y, int d, float eps, Rotation r) {  \
    norm_forward(x, gain, y, d, eps, r);                                                                               \
  }                                                                                                                    \
  extern "C" __global__ void norm_backward_##NAME(const T *x, const float *gain, const T *dy, T *dx, float *parts,     \
                                                  int n_rows, int d, int rows_per_block, float eps, bool add,          \
                                                  Rotation r) {                                                        \
    norm_backward(x, gain, dy, dx, parts, n_rows, d, rows_per_block, eps, add, r);                                     \
  }                                                                                                                    \
  extern "C" __global__ void activate_##NAME(const T *products, T *hidden, size_t n, int r) {                          \
    activate(products, hidden, n, r);                                                                                  \
  }                                                                                                                    \
  extern "C" __global__ void activate_backward_##NAME(T *products, T *dhidden, size_t n, int r) {                      \
    activate_backward(products, dhidden, n, r);                                                                        \
  }                                                                                                                    \
  extern "C" __global__ void cross_entropy_##NAME(const float *logits, T *dlogits, const unsigned *targets,            \
                                                  float *losses, int v, float scale, float z_loss) {                   \
    cross_entropy(logits, dlogits, targets, losses, v, scale, z_loss);                                                 \
  }                                                                                                                    \
  extern "C" __global__ void embed_##NAME(const float *table, const unsigned *ids, T *y, int d) {                      \
    embed(table, ids, y, d);                                                                                           \
  }                                                                                                                    \
  extern "C" __global__ void embed_backward_##NAME(const T *dy, const unsigned *ids, const unsigned *first,            \
                                                   const unsigned *order, float *gradient, int d) {                    \
    embed_backward(dy, ids, first, order, gradient, d);                                                                \
  }                                                                                                                    \
  extern "C" __global__ void attention_forward_##NAME(const T *q, const T *k, const T *v, T *y, float *log_sum_exp,    \
                                                      Attention a) {                                                   \
    attention_forward(q, k, v, y, log_sum_exp, a);                                                                     \
  }                                                                                                                    \
  extern "C" __global__ void attention_delta_##NAME(const T *y, const T *dy, float *delta, Attention a, int n) {       \
    attention_delta(y, dy, delta, a, n);                                                                               \
  }                                                                                                                    \
  extern "C" __global__ void attention_backward_queries_##NAME(const T *q, const T *k, const T *v, const T *dy,        \
                                                               const float *log_sum_exp, const float *delta, T *dq,    \
                                                               bool add, Attention a) {                                \
    attention_backward_queries(q, k, v, dy, log_sum_exp, delta, dq, add, a);                                           \
  }                                                                                                                    \
  extern "C" __global__ void attention_backward_keys_##NAME(const T *q, const T *k, const T *v, const T *dy,           \
                                                            const float *log_sum_exp, const float *delta, T *dk,       \
                                                            T *dv, bool add_k, bool add_v, Attention a) {              \
    attention_backward_keys(q, k, v, dy, log_sum_exp, delta, dk, dv, add_k, add_v, a);                                 \
  }

INSTANCES(float, f32)
INSTANCES(bf16, bf16)
