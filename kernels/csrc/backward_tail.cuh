// The keys from 256 on in the backward pass: class and register tokens beside 16 x 16 patches, 16 at most.
//
// The 256 keys before them fill the warps exactly; a seventeenth tile for one warp would make seven others wait. So its
// work is spread: one warp after the other computes the scores of 16 queries, kept in shared memory behind dS of the
// other keys (dQ = dS K then simply has 16 more keys) and followed by P; then each of eight warps adds 16 columns of
// dV = P^T dO or dK = dS^T Q, in sums of its own. About 5 % more tensor-core work for any number of tail tokens, which
// is what scalar products would need for a single one.
#pragma once

#include "forward.cuh"

namespace dk {

constexpr int kQueryBlock = 64;
constexpr int kTailKeys = kMaxTokens - kTileTokens;
constexpr int kTailSumBytes = 8 * 32 * 2 * 16;  // eight warps, two C tiles each

// dK and dV of the tail, float32. In shared memory, since the registers are full; each lane has its own place, so no
// barrier is needed. Warps 0..3 hold dV (16 columns each), 4..7 dK.
struct TailSums {
  int base;  // offset in shared memory

  DK_DEVICE float& cell(int j, int warp, int lane, int i) const {
    return shared<float>(base + (((warp * 2 + j) * 32 + lane) * 4 + i) * 4);
  }
  DK_DEVICE void clear() const {
    if (thread() >= 256) return;
    for (int i = 0; i < 8; ++i) cell(i >> 2, thread() >> 5, thread() & 31, i & 3) = 0.f;
  }
  // `target` is dV or dK of token 0, rows `stride` elements apart.
  template <class Element>
  DK_DEVICE void write(uint16_t* target, int64_t stride, int tokens, float factor, int warp, int lane) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = kTileTokens + (lane >> 2) + half * 8;
      if (row >= tokens) continue;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float low = cell(j, warp, lane, 2 * half), high = cell(j, warp, lane, 2 * half + 1);
        *reinterpret_cast<uint32_t*>(target + row * stride + (warp & 3) * 16 + j * 8 + 2 * (lane & 3)) =
            pack<Element>(low * factor, high * factor);
      }
    }
  }
};

// dS and P of 16 queries and the tail's keys, into the columns from 256 and 272 on of the rows of dS.
template <class Element>
DK_DEVICE void tail_scores(int keys, int values, int query, int grad, int scores, int pitch, int delta, int lse,
                           int row, int tokens, float scale_log2, int lane) {
  float s[2][4], dp[2][4];
  clear(s), clear(dp);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t a[4], b[4];
    load_a(a, query, row, k, lane);
    load_b(b, keys, kTileTokens, k, lane);
    mma_pair<Element>(s[0], s[1], a, b);
    load_a(a, grad, row, k, lane);
    load_b(b, values, kTileTokens, k, lane);
    mma_pair<Element>(dp[0], dp[1], a, b);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int q = row + (lane >> 2) + half * 8;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = j * 8 + 2 * (lane & 3);
      float p[2], ds[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool inside = kTileTokens + column + e < tokens;
        p[e] = inside ? exp2_fast(s[j][2 * half + e] * scale_log2 - shared<float>(lse + q * 4)) : 0.f;
        ds[e] = p[e] * (dp[j][2 * half + e] - shared<float>(delta + q * 4));
      }
      const int cell = scores + q * pitch + (kTileTokens + column) * 2;
      shared<uint32_t>(cell) = pack<Element>(ds[0], ds[1]);
      shared<uint32_t>(cell + kTailKeys * 2) = pack<Element>(p[0], p[1]);
    }
  }
}

// Adds the products of one block of queries to this warp's sums.
template <class Element>
DK_DEVICE void tail_products(const TailSums& sums, int query, int grad, int scores, int pitch, int count,
                             int warp, int lane) {
  const int right = warp < 4 ? grad : query;
  const int left = scores + (kTileTokens + (warp < 4 ? kTailKeys : 0)) * 2;
  float c[2][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) c[i >> 2][i & 3] = sums.cell(i >> 2, warp, lane, i & 3);
#pragma unroll 1
  for (int row = 0; row < count; row += 16) {
    uint32_t a[4], b[4];  // a: the transposed tile, keys x queries
    load_matrices<true>(a, left + (row + (lane & 7) + ((lane >> 4) << 3)) * pitch + ((lane >> 3) & 1) * 16);
    load_b_rows(b, right, row, warp & 3, lane);
    mma_pair<Element>(c[0], c[1], a, b);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sums.cell(i >> 2, warp, lane, i & 3) = c[i >> 2][i & 3];
}

}  // namespace dk
