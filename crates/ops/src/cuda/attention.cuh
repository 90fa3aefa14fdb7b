// Causal attention with per-document masks: tiles of 64 queries against tiles of 64 keys in shared memory, softmax
// online (Dao et al., arXiv 2205.14135), scores computed again in the backward. Tiles that no query sees are skipped.
//
// bf16 products run on tensor cores with float sums; float ones, which serve to check the same code, on plain ones.

#pragma once

constexpr int TILE = 64;
constexpr int WARPS = 4; // of a block

// Leading dimensions in shared memory, padded against bank conflicts and aligned for tensor cores.
constexpr int SCORES = TILE + 4;
constexpr int WEIGHTS = TILE + 8;

// c [m, n] = or += a · b, where a is [m, k] or its transpose and b [k, n] or its transpose. Sizes are multiples of 16;
// all in shared memory. The caller synchronises.
template <bool TA, bool TB>
__device__ void tile_product(const bf16 *a, int lda, const bf16 *b, int ldb, float *c, int ldc, int m, int n, int k,
                             bool add) {
  using namespace nvcuda::wmma;
  using LayoutA = std::conditional_t<TA, col_major, row_major>;
  using LayoutB = std::conditional_t<TB, col_major, row_major>;
  for (int tile = threadIdx.x / 32; tile < m / 16 * (n / 16); tile += WARPS) {
    int i = tile / (n / 16) * 16, j = tile % (n / 16) * 16;
    fragment<accumulator, 16, 16, 16, float> sums;
    if (add)
      load_matrix_sync(sums, c + i * ldc + j, ldc, mem_row_major);
    else
      fill_fragment(sums, 0.0f);
    for (int l = 0; l < k; l += 16) {
      fragment<matrix_a, 16, 16, 16, bf16, LayoutA> left;
      fragment<matrix_b, 16, 16, 16, bf16, LayoutB> right;
      load_matrix_sync(left, TA ? a + l * lda + i : a + i * lda + l, lda);
      load_matrix_sync(right, TB ? b + j * ldb + l : b + l * ldb + j, ldb);
      mma_sync(sums, left, right, sums);
    }
    store_matrix_sync(c + i * ldc + j, sums, ldc, mem_row_major);
  }
}

template <bool TA, bool TB>
__device__ void tile_product(const float *a, int lda, const float *b, int ldb, float *c, int ldc, int m, int n, int k,
                             bool add) {
  for (int element = threadIdx.x; element < m * n; element += blockDim.x) {
    int i = element / n, j = element % n;
    float sum = add ? c[i * ldc + j] : 0.0f;
    for (int l = 0; l < k; l++) sum += a[TA ? l * lda + i : i * lda + l] * b[TB ? j * ldb + l : l * ldb + j];
    c[i * ldc + j] = sum;
  }
}

struct Attention {
  const unsigned *starts; // [B, T]
  int queries, keys, heads, head_width;

  __device__ int width() const { return heads * head_width; }
  __device__ int ld() const { return head_width + 8; }
  __device__ float scale() const { return rsqrtf((float)head_width); }
  // Key position of query t.
  __device__ int position(int t) const { return keys - queries + t; }
  __device__ bool sees(int sequence, int t, int key) const {
    return t < queries && key <= position(t) && key >= starts[sequence * queries + t];
  }
};

// Copies up to 64 rows of one head to shared memory, rows beyond n as zeros.
template <typename T> __device__ void load_rows(T *to, const T *from, int n, const Attention &a) {
  for (int i = threadIdx.x; i < TILE * a.head_width; i += blockDim.x) {
    int row = i / a.head_width, column = i % a.head_width;
    to[row * a.ld() + column] = row < n ? from[(size_t)row * a.width() + column] : from_float<T>(0.0f);
  }
}

// Pieces of the block's shared memory, in order.
struct Shared {
  char *next;
  template <typename T> __device__ T *take(int n) {
    T *piece = (T *)next;
    next += (n * sizeof(T) + 127) / 128 * 128;
    return piece;
  }
};

extern __shared__ __align__(128) char shared_memory[];

// Grid: (query tiles, heads, sequences).
template <typename T>
__device__ void attention_forward(const T *q, const T *k, const T *v, T *y, float *log_sum_exp, Attention a) {
  Shared shared{shared_memory};
  T *q_tile = shared.take<T>(TILE * a.ld()), *k_tile = shared.take<T>(TILE * a.ld());
  T *v_tile = shared.take<T>(TILE * a.ld()), *weights = shared.take<T>(TILE * WEIGHTS);
  float *scores = shared.take<float>(TILE * SCORES), *sums = shared.take<float>(TILE * a.ld());
  float *largest = shared.take<float>(TILE), *total = shared.take<float>(TILE);
  int first_row = blockIdx.x * TILE, head = blockIdx.y, sequence = blockIdx.z;
  int n_rows = min(TILE, a.queries - first_row);
  size_t q_base = ((size_t)sequence * a.queries + first_row) * a.width() + head * a.head_width;
  size_t k_base = (size_t)sequence * a.keys * a.width() + head * a.head_width;
  load_rows(q_tile, q + q_base, n_rows, a);
  for (int i = threadIdx.x; i < TILE * a.ld(); i += blockDim.x) sums[i] = 0.0f;
  for (int i = threadIdx.x; i < TILE; i += blockDim.x) largest[i] = -INFINITY, total[i] = 0.0f;
  // Documents begin in order, so the first row of the tile sees the first key.
  int first_key = a.starts[sequence * a.queries + first_row] / TILE * TILE;
  int end_key = a.position(first_row + n_rows - 1) + 1;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int key = first_key; key < end_key; key += TILE) {
    __syncthreads();
    load_rows(k_tile, k + k_base + (size_t)key * a.width(), min(TILE, a.keys - key), a);
    load_rows(v_tile, v + k_base + (size_t)key * a.width(), min(TILE, a.keys - key), a);
    __syncthreads();
    tile_product<false, true>(q_tile, a.ld(), k_tile, a.ld(), scores, SCORES, TILE, TILE, a.head_width, false);
    __syncthreads();
    for (int row = warp; row < TILE; row += WARPS) {
      float s[2], row_largest = largest[row];
      for (int j = 0; j < 2; j++) {
        bool sees = a.sees(sequence, first_row + row, key + lane + 32 * j);
        s[j] = sees ? scores[row * SCORES + lane + 32 * j] * a.scale() : -INFINITY;
        row_largest = fmaxf(row_largest, s[j]);
      }
      for (int offset = 16; offset > 0; offset /= 2)
        row_largest = fmaxf(row_largest, __shfl_xor_sync(0xffffffffu, row_largest, offset));
      float shift = row_largest == -INFINITY ? 0.0f : row_largest;
      float row_total = 0.0f;
      for (int j = 0; j < 2; j++) {
        float p = __expf(s[j] - shift);
        row_total += p;
        weights[row * WEIGHTS + lane + 32 * j] = from_float<T>(p);
      }
      for (int offset = 16; offset > 0; offset /= 2)
        row_total += __shfl_xor_sync(0xffffffffu, row_total, offset);
      float keep = __expf(largest[row] - shift);
      for (int i = lane; i < a.head_width; i += 32) sums[row * a.ld() + i] *= keep;
      __syncwarp();
      if (lane == 0) largest[row] = row_largest, total[row] = total[row] * keep + row_total;
    }
    __syncthreads();
    tile_product<false, false>(weights, WEIGHTS, v_tile, a.ld(), sums, a.ld(), TILE, a.head_width, TILE, true);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n_rows * a.head_width; i += blockDim.x) {
    int row = i / a.head_width, column = i % a.head_width;
    y[q_base + (size_t)row * a.width() + column] = from_float<T>(sums[row * a.ld() + column] / total[row]);
  }
  for (int row = threadIdx.x; row < n_rows; row += blockDim.x)
    log_sum_exp[((size_t)sequence * a.heads + head) * a.queries + first_row + row] = logf(total[row]) + largest[row];
}

// The weights p and the gradient ds of the scores of one tile, from its scores and dp = dy·vᵀ in shared memory.
template <typename T>
__device__ void weights_and_gradient(const float *scores, const float *dp, T *p, T *ds, const float *log_sum_exp,
                                     const float *delta, int sequence, int first_row, int first_key, const Attention &a) {
  for (int i = threadIdx.x; i < TILE * TILE; i += blockDim.x) {
    int row = i / TILE, column = i % TILE;
    bool sees = a.sees(sequence, first_row + row, first_key + column);
    float weight = sees ? __expf(scores[row * SCORES + column] * a.scale() - log_sum_exp[row]) : 0.0f;
    p[row * WEIGHTS + column] = from_float<T>(weight);
    ds[row * WEIGHTS + column] = from_float<T>(weight * (dp[row * SCORES + column] - delta[row]) * a.scale());
  }
}

// delta [B, H, T] = the sum over a head of y ⊙ dy, a warp a row of all heads.
template <typename T> __device__ void attention_delta(const T *y, const T *dy, float *delta, Attention a, int n) {
  int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= n) return;
  int sequence = row / (a.heads * a.queries), head = row / a.queries % a.heads, t = row % a.queries;
  size_t base = ((size_t)sequence * a.queries + t) * a.width() + head * a.head_width;
  float sum = 0.0f;
  for (int i = lane; i < a.head_width; i += 32) sum += to_float(y[base + i]) * to_float(dy[base + i]);
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (lane == 0) delta[row] = sum;
}

// What both backward kernels hold of a pair of tiles.
template <typename T> struct Pair {
  T *q, *dy, *k, *v, *p, *ds;
  float *scores, *dp, *log_sum_exp, *delta;

  __device__ Pair(Shared &shared, const Attention &a)
      : q(shared.take<T>(TILE * a.ld())), dy(shared.take<T>(TILE * a.ld())), k(shared.take<T>(TILE * a.ld())),
        v(shared.take<T>(TILE * a.ld())), p(shared.take<T>(TILE * WEIGHTS)), ds(shared.take<T>(TILE * WEIGHTS)),
        scores(shared.take<float>(TILE * SCORES)), dp(shared.take<float>(TILE * SCORES)),
        log_sum_exp(shared.take<float>(TILE)), delta(shared.take<float>(TILE)) {}

  __device__ void load_queries(const T *q_rows, const T *dy_rows, const float *all_log_sum_exp, const float *all_delta,
                               size_t first, int n, const Attention &a) {
    load_rows(q, q_rows, n, a);
    load_rows(dy, dy_rows, n, a);
    for (int i = threadIdx.x; i < TILE; i += blockDim.x) {
      log_sum_exp[i] = i < n ? all_log_sum_exp[first + i] : 0.0f;
      delta[i] = i < n ? all_delta[first + i] : 0.0f;
    }
  }

  __device__ void scores_and_gradient(int sequence, int first_row, int first_key, const Attention &a) {
    tile_product<false, true>(q, a.ld(), k, a.ld(), scores, SCORES, TILE, TILE, a.head_width, false);
    tile_product<false, true>(dy, a.ld(), v, a.ld(), dp, SCORES, TILE, TILE, a.head_width, false);
    __syncthreads();
    weights_and_gradient(scores, dp, p, ds, log_sum_exp, delta, sequence, first_row, first_key, a);
    __syncthreads();
  }
};

// to [n, head_width] of one head = or += the sums in shared memory.
template <typename T> __device__ void store_rows(T *to, const float *sums, int n, bool add, const Attention &a) {
  for (int i = threadIdx.x; i < n * a.head_width; i += blockDim.x) {
    int row = i / a.head_width, column = i % a.head_width;
    T *element = to + (size_t)row * a.width() + column;
    *element = from_float<T>((add ? to_float(*element) : 0.0f) + sums[row * a.ld() + column]);
  }
}

// Gradient of the queries. Grid: (query tiles, heads, sequences).
template <typename T>
__device__ void attention_backward_queries(const T *q, const T *k, const T *v, const T *dy, const float *log_sum_exp,
                                           const float *delta, T *dq, bool add, Attention a) {
  Shared shared{shared_memory};
  Pair<T> pair(shared, a);
  float *sums = shared.take<float>(TILE * a.ld());
  int first_row = blockIdx.x * TILE, head = blockIdx.y, sequence = blockIdx.z;
  int n_rows = min(TILE, a.queries - first_row);
  size_t q_base = ((size_t)sequence * a.queries + first_row) * a.width() + head * a.head_width;
  size_t k_base = (size_t)sequence * a.keys * a.width() + head * a.head_width;
  size_t first = ((size_t)sequence * a.heads + head) * a.queries + first_row;
  pair.load_queries(q + q_base, dy + q_base, log_sum_exp, delta, first, n_rows, a);
  for (int i = threadIdx.x; i < TILE * a.ld(); i += blockDim.x) sums[i] = 0.0f;
  int first_key = a.starts[sequence * a.queries + first_row] / TILE * TILE;
  for (int key = first_key; key < a.position(first_row + n_rows - 1) + 1; key += TILE) {
    __syncthreads();
    load_rows(pair.k, k + k_base + (size_t)key * a.width(), min(TILE, a.keys - key), a);
    load_rows(pair.v, v + k_base + (size_t)key * a.width(), min(TILE, a.keys - key), a);
    __syncthreads();
    pair.scores_and_gradient(sequence, first_row, key, a);
    tile_product<false, false>(pair.ds, WEIGHTS, pair.k, a.ld(), sums, a.ld(), TILE, a.head_width, TILE, true);
  }
  __syncthreads();
  store_rows(dq + q_base, sums, n_rows, add, a);
}

// Gradients of keys and values. Grid: (key tiles, heads, sequences).
template <typename T>
__device__ void attention_backward_keys(const T *q, const T *k, const T *v, const T *dy, const float *log_sum_exp,
                                        const float *delta, T *dk, T *dv, bool add_k, bool add_v, Attention a) {
  Shared shared{shared_memory};
  Pair<T> pair(shared, a);
  float *k_sums = shared.take<float>(TILE * a.ld()), *v_sums = shared.take<float>(TILE * a.ld());
  int first_key = blockIdx.x * TILE, head = blockIdx.y, sequence = blockIdx.z;
  int n_keys = min(TILE, a.keys - first_key);
  size_t k_base = ((size_t)sequence * a.keys + first_key) * a.width() + head * a.head_width;
  load_rows(pair.k, k + k_base, n_keys, a);
  load_rows(pair.v, v + k_base, n_keys, a);
  for (int i = threadIdx.x; i < TILE * a.ld(); i += blockDim.x) k_sums[i] = 0.0f, v_sums[i] = 0.0f;
  // The first query that may see the first key stands at it.
  int first_query = max(0, first_key - (a.keys - a.queries)) / TILE * TILE;
  for (int row = first_query; row < a.queries; row += TILE) {
    // Documents begin in order: later tiles see none of these keys either.
    if (a.starts[sequence * a.queries + row] >= first_key + n_keys) break;
    __syncthreads();
    size_t q_base = ((size_t)sequence * a.queries + row) * a.width() + head * a.head_width;
    size_t first = ((size_t)sequence * a.heads + head) * a.queries + row;
    pair.load_queries(q + q_base, dy + q_base, log_sum_exp, delta, first, min(TILE, a.queries - row), a);
    __syncthreads();
    pair.scores_and_gradient(sequence, row, first_key, a);
    tile_product<true, false>(pair.p, WEIGHTS, pair.dy, a.ld(), v_sums, a.ld(), TILE, a.head_width, TILE, true);
    tile_product<true, false>(pair.ds, WEIGHTS, pair.q, a.ld(), k_sums, a.ld(), TILE, a.head_width, TILE, true);
  }
  __syncthreads();
  store_rows(dk + k_base, k_sums, n_keys, add_k, a);
  store_rows(dv + k_base, v_sums, n_keys, add_v, a);
}
