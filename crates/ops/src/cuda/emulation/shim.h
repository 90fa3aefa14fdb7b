// Enough of CUDA to run kernels.cu on a CPU: the threads of a block are threads, blocks run one after another.
// bf16 is rounded as the hardware rounds it; every lane of a warp computes the whole of a tensor-core fragment.

#pragma once
#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __syncthreads() block->barrier.arrive_and_wait()
#define __syncwarp() block->warps[threadIdx.x / 32]->arrive_and_wait()

struct Dim {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local Dim threadIdx, blockIdx;
inline Dim blockDim, gridDim;

struct Block {
  std::barrier<> barrier;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<float> lanes;
  explicit Block(int n) : barrier(n), lanes(n) {
    for (int i = 0; i < n; i += 32) warps.push_back(std::make_unique<std::barrier<>>(32));
  }
};
inline Block *block;

inline float __shfl_xor_sync(unsigned, float value, int offset) {
  block->lanes[threadIdx.x] = value;
  __syncwarp();
  float other = block->lanes[threadIdx.x ^ offset];
  __syncwarp();
  return other;
}

// Runs a kernel over a grid of blocks of n threads, n a multiple of 32.
inline void launch(Dim grid, int n, const std::function<void()> &kernel) {
  blockDim = {(unsigned)n, 1, 1};
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        Block here(n);
        block = &here;
        std::vector<std::thread> threads;
        for (unsigned i = 0; i < (unsigned)n; i++)
          threads.emplace_back([=, &kernel] {
            threadIdx = {i, 0, 0};
            blockIdx = {x, y, z};
            kernel();
          });
        for (auto &thread : threads) thread.join();
      }
}

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>((uint32_t)x.bits << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::max;
using std::min;

namespace nvcuda::wmma {
struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major };
template <typename Use, int M, int N, int K, typename T, typename Layout = row_major> struct fragment {
  float at[16][16];
};
template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout> &to, const T *from, int ld) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++)
      to.at[i][j] = __bfloat162float(std::is_same_v<Layout, row_major> ? from[i * ld + j] : from[j * ld + i]);
}
template <typename F> void load_matrix_sync(F &to, const float *from, int ld, layout_t) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) to.at[i][j] = from[i * ld + j];
  __syncwarp();
}
template <typename F> void store_matrix_sync(float *to, const F &from, int ld, layout_t) {
  if (threadIdx.x % 32 == 0)
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < 16; j++) to[i * ld + j] = from.at[i][j];
}
template <typename F> void fill_fragment(F &to, float value) {
  for (auto &row : to.at)
    for (auto &x : row) x = value;
}
template <typename C, typename A, typename B> void mma_sync(C &c, const A &a, const B &b, const C &from) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) {
      float sum = from.at[i][j];
      for (int l = 0; l < 16; l++) sum += a.at[i][l] * b.at[l][j];
      c.at[i][j] = sum;
    }
}
} // namespace nvcuda::wmma
