// Attention backward for one (sequence, head) per block, 1 to 272 tokens of 64 elements, in one pass, without atomics.
//
//   P = exp(scale Q K^T - lse)      dV = P^T dO      dP = dO V^T      dS = P (dP - delta), delta = rowsum(O dO)
//   dQ = scale dS K                 dK = scale dS^T Q                 (FlashAttention-2, arXiv 2307.08691, section 3.1)
//
// Keys and values stay in shared memory. Each warp owns 16 or 32 keys, their dK and dV in registers, and goes through
// the queries in blocks of 64 rows. It computes the transposed scores (keys x queries), so that P^T and dS^T are A
// fragments of the products dV and dK as they are; only dS goes through shared memory, for dQ, to which all keys
// contribute. Every sum has a fixed order: two runs give the same bits.
// Keys from 256 on (at most 16, class and register tokens of 16 x 16 patches): see backward_tail.cuh.
#pragma once

#include "backward_tail.cuh"

namespace dk {

struct BackwardParams {
  const uint16_t* qkv;       // [sequences * tokens, 3, heads, 64], rows `stride` elements apart
  const uint16_t* out;       // [sequences * tokens, heads, 64], and grad_out alike
  const uint16_t* grad_out;
  const float* lse;          // [sequences * tokens, heads] of the forward pass
  uint16_t* grad_qkv;        // [sequences * tokens, 3, heads, 64]
  int64_t stride;
  int tokens, heads;
  float scale, scale_log2;  // scale_log2 = scale * log2(e)
  int ahead;                // if not 0: what the block so many further on reads is brought into the L2 cache
};

// Shared memory for kKeys keys (256: and the tail), kStages blocks of queries in flight. Offsets in bytes.
template <int kKeys, int kStages>
struct BackwardLayout {
  static constexpr bool kTail = kKeys == kTileTokens;
  static constexpr int kHeld = kKeys + (kTail ? kTailKeys : 0);  // rows of the key and value tiles
  static constexpr int kQueries = round_up(kHeld, kQueryBlock);
  // dS rows, with the tail's dS and P behind. An odd number of 16-byte chunks: eight rows meet in no bank.
  static constexpr int kPitch = (kHeld + (kTail ? kTailKeys : 0)) * 2 + 16;
  static constexpr int kKey = 0;
  static constexpr int kValue = kKey + kHeld * kRowBytes;
  static constexpr int kQuery = kValue + kHeld * kRowBytes;
  static constexpr int kGrad = kQuery + kStages * kQueryBlock * kRowBytes;
  static constexpr int kScore = kGrad + kStages * kQueryBlock * kRowBytes;
  static constexpr int kDelta = kScore + kQueryBlock * kPitch;
  static constexpr int kLse = kDelta + kQueries * 4;
  static constexpr int kSums = kLse + kQueries * 4;
  static constexpr int kBytes = kSums + (kTail ? kTailSumBytes : 0);
  static_assert(kPitch / 16 % 2 == 1 && kScore % 16 == 0 && kSums % 16 == 0, "bank conflicts or misaligned rows");
};

// delta and lse of all query rows; rows beyond the end get 0 and infinity, hence P = dS = 0. Eight threads add up a
// row, and each has the loads of several rows in flight before it needs the first.
template <class Element, int kThreads, int kRows>
DK_DEVICE void load_statistics(int delta, int lse, const BackwardParams& p, int64_t token, int head) {
  constexpr int kStep = kThreads / 8, kBatch = kRows % (kStep * 5) == 0 ? 5 : 4;
  static_assert(kRows % (kStep * kBatch) == 0, "the last batch would write beyond the rows");
  const int part = thread() & 7;
#pragma unroll 1
  for (int first = thread() >> 3; first < round_up(p.tokens, kStep); first += kStep * kBatch) {
    uint32_t o[kBatch][4] = {}, g[kBatch][4] = {};
    float row_lse[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int row = first + b * kStep;
      const int64_t slot = (token + row) * p.heads + head;
      row_lse[b] = INFINITY;
      if (row >= p.tokens) continue;
      load_words(o[b], p.out + slot * kHeadDim + part * 8);
      load_words(g[b], p.grad_out + slot * kHeadDim + part * 8);
      if (part == 0) row_lse[b] = p.lse[slot];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x[2], y[2];
        unpack<Element>(o[b][i], x[0], x[1]);
        unpack<Element>(g[b][i], y[0], y[1]);
        sum += x[0] * y[0] + x[1] * y[1];
      }
#pragma unroll
      for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
      if (part == 0) {
        shared<float>(delta + (first + b * kStep) * 4) = sum;
        shared<float>(lse + (first + b * kStep) * 4) = row_lse[b];
      }
    }
  }
}

// A block fills a multiprocessor, so nothing else computes while it waits for its first tiles. The block that follows
// it there is, about, the one as many further on as there are multiprocessors: this shortens that one's wait.
template <int kThreads>
DK_DEVICE void prefetch_block(const BackwardParams& p, int item) {
  const int head = item % p.heads;
  const int64_t token = static_cast<int64_t>(item / p.heads) * p.tokens;
  const int64_t width = static_cast<int64_t>(p.heads) * kHeadDim;
  for (int row = thread(); row < p.tokens; row += kThreads) {
    const uint16_t* source = p.qkv + (token + row) * p.stride + head * kHeadDim;
    const int64_t cell = (token + row) * width + head * kHeadDim;
    prefetch(source), prefetch(source + width), prefetch(source + 2 * width);
    prefetch(p.out + cell), prefetch(p.grad_out + cell);
  }
}

// A 16 x 16 tile of dS^T, as A fragment, into the rows of dS: row is the query, column the key.
DK_DEVICE void store_score_tile(int scores, int pitch, const uint32_t (&a)[4], int query, int key, int lane) {
  if (has_store_matrices()) {
    store_matrices_transposed(scores + (query + (lane & 7) + ((lane >> 4) << 3)) * pitch +
                                  (key + ((lane >> 3) & 1) * 8) * 2,
                              a);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int cell = scores + (query + (i >> 1) * 8 + 2 * (lane & 3)) * pitch + (key + (i & 1) * 8 + (lane >> 2)) * 2;
      shared<uint16_t>(cell) = static_cast<uint16_t>(a[i]);
      shared<uint16_t>(cell + pitch) = static_cast<uint16_t>(a[i] >> 16);
    }
  }
}

// 16 queries against the keys of this warp: adds to dV and dK, and leaves dS in shared memory.
template <class Element, int kKeyTiles>
DK_DEVICE void backward_keys(float (&grad_key)[kKeyTiles][8][4], float (&grad_value)[kKeyTiles][8][4], int keys,
                             int values, int query, int grad, int scores, int pitch, int delta, int lse, int row,
                             int key, int tokens, float scale_log2, int lane) {
  float s[kKeyTiles][2][4], dp[kKeyTiles][2][4];
#pragma unroll
  for (int m = 0; m < kKeyTiles; ++m) clear(s[m]), clear(dp[m]);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t a[4], b[4];
    load_b(b, query, row, k, lane);
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m) {
      load_a(a, keys, key + m * 16, k, lane);
      mma_pair<Element>(s[m][0], s[m][1], a, b);
    }
    load_b(b, grad, row, k, lane);
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m) {
      load_a(a, values, key + m * 16, k, lane);
      mma_pair<Element>(dp[m][0], dp[m][1], a, b);
    }
  }
  uint32_t p[kKeyTiles][4], ds[kKeyTiles][4];
#pragma unroll
  for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int q = row + j * 8 + 2 * (lane & 3) + (i & 1);
        const bool inside = key + m * 16 + (lane >> 2) + (i >> 1) * 8 < tokens;
        const float probability = inside ? exp2_fast(s[m][j][i] * scale_log2 - shared<float>(lse + q * 4)) : 0.f;
        s[m][j][i] = probability;
        dp[m][j][i] = probability * (dp[m][j][i] - shared<float>(delta + q * 4));
      }
    }
    pack_a<Element>(p[m], s[m][0], s[m][1]);
    pack_a<Element>(ds[m], dp[m][0], dp[m][1]);
    store_score_tile(scores, pitch, ds[m], row, key + m * 16, lane);
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    uint32_t b[4];
    load_b_rows(b, grad, row, n, lane);
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m) mma_pair<Element>(grad_value[m][2 * n], grad_value[m][2 * n + 1], p[m], b);
    load_b_rows(b, query, row, n, lane);
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m) mma_pair<Element>(grad_key[m][2 * n], grad_key[m][2 * n + 1], ds[m], b);
  }
}

// dQ of 16 rows and 16 kGroups columns = dS K, over all keys.
template <class Element, int kGroups>
DK_DEVICE void backward_queries(int scores, int pitch, int keys, int row, int group, int held, uint16_t* target,
                                int64_t stride, int count, float scale, int lane) {
  float dq[2 * kGroups][4];
  clear(dq);
#pragma unroll 2
  for (int key = 0; key < held; key += 16) {
    uint32_t a[4], b[4];
    load_matrices<false>(a, scores + (row + (lane & 15)) * pitch + (key + (lane >> 4) * 8) * 2);
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      load_b_rows(b, keys, key, group + n, lane);
      mma_pair<Element>(dq[2 * n], dq[2 * n + 1], a, b);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + (lane >> 2) + half * 8;
#pragma unroll
    for (int n = 0; n < kGroups; n += 2)
      store_columns<Element>(target + r * stride + (group + n) * 16, r < count, dq, 2 * n, half, scale, lane);
  }
}

template <class Element, int kWarps, int kKeyTiles, int kStages, int kBlocksPerSm>
DK_KERNEL(kWarps * 32, kBlocksPerSm) backward(BackwardParams p) {
  constexpr int kThreads = kWarps * 32, kKeys = kWarps * kKeyTiles * 16;
  constexpr int kGroups = kWarps >= 8 ? 2 : 4;  // a warp's piece of dQ: 16 rows, so many times 16 columns
  constexpr int kPieces = kQueryBlock / 16 * 4 / kGroups;
  using Layout = BackwardLayout<kKeys, kStages>;
  const int lane = thread() & 31, warp = thread() >> 5;
  const int head = block() % p.heads, n = p.tokens, held = round_up(n, 16);
  const int64_t token = static_cast<int64_t>(block() / p.heads) * n;
  const int64_t width = static_cast<int64_t>(p.heads) * kHeadDim;
  const uint16_t* source = p.qkv + token * p.stride + head * kHeadDim;
  const uint16_t* source_grad = p.grad_out + token * width + head * kHeadDim;
  uint16_t* target = p.grad_qkv + token * 3 * width + head * kHeadDim;
  constexpr int keys = Layout::kKey, values = Layout::kValue, scores = Layout::kScore;
  constexpr int delta = Layout::kDelta, lse = Layout::kLse;
  const TailSums sums{Layout::kSums};

  const auto load_block = [&](int row, int stage) {
    const int query = Layout::kQuery + stage * kQueryBlock * kRowBytes;
    const int grad = Layout::kGrad + stage * kQueryBlock * kRowBytes;
    const int rows = round_up(n - row, 16) < kQueryBlock ? round_up(n - row, 16) : kQueryBlock;
    load_rows<kThreads>(query, source + row * p.stride, p.stride, n - row, rows);
    load_rows<kThreads>(grad, source_grad + row * width, width, n - row, rows);
  };
  const int loaded = n > kKeys ? held : round_up(n, kKeyTiles * 16);  // whole warps: zeros behind the last key
  load_rows<kThreads>(keys, source + width, p.stride, n, loaded);
  load_rows<kThreads>(values, source + 2 * width, p.stride, n, loaded);
  load_block(0, 0);
  load_statistics<Element, kThreads, Layout::kQueries>(delta, lse, p, token, head);
  if (Layout::kTail) sums.clear();
  if (p.ahead > 0 && block() + p.ahead < blocks()) prefetch_block<kThreads>(p, block() + p.ahead);

  float grad_key[kKeyTiles][8][4], grad_value[kKeyTiles][8][4];
#pragma unroll
  for (int m = 0; m < kKeyTiles; ++m) clear(grad_key[m]), clear(grad_value[m]);
  const int own = warp * kKeyTiles * 16;
#pragma unroll 1
  for (int first = 0; first < n; first += kQueryBlock) {
    const int stage = kStages == 2 ? (first / kQueryBlock) & 1 : 0;
    const int query = Layout::kQuery + stage * kQueryBlock * kRowBytes;
    const int grad = Layout::kGrad + stage * kQueryBlock * kRowBytes;
    const int count = n - first < kQueryBlock ? n - first : kQueryBlock;
    copy_wait();
    sync_threads();  // the block has landed, and no warp still reads dS or the other stage
    if (kStages == 2 && first + kQueryBlock < n) load_block(first + kQueryBlock, stage ^ 1);

#pragma unroll 1
    for (int row = 0; row < count; row += 16) {
      if (own < n)
        backward_keys<Element>(grad_key, grad_value, keys, values, query, grad, scores, Layout::kPitch,
                               delta + first * 4, lse + first * 4, row, own, n, p.scale_log2, lane);
      if (Layout::kTail && n > kKeys && warp == (first + row) / 16 % kWarps)
        tail_scores<Element>(keys, values, query, grad, scores, Layout::kPitch, delta + first * 4, lse + first * 4,
                             row, n, p.scale_log2, lane);
    }
    sync_threads();  // dS of all keys is there

#pragma unroll
    for (int pass = 0; pass < round_up(kPieces, kWarps) / kWarps; ++pass) {
      const int piece = pass * kWarps + warp;
      const int row = piece / (4 / kGroups) * 16, group = piece % (4 / kGroups) * kGroups;
      if (piece >= kPieces || row >= count) continue;
      backward_queries<Element, kGroups>(scores, Layout::kPitch, keys, row, group, held, target + first * 3 * width,
                                         3 * width, count, p.scale, lane);
    }
    if (Layout::kTail && n > kKeys && warp < 8)
      tail_products<Element>(sums, query, grad, scores, Layout::kPitch, count, warp, lane);
    if (kStages == 1 && first + kQueryBlock < n) {
      sync_threads();
      load_block(first + kQueryBlock, 0);
    }
  }

#pragma unroll
  for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = own + m * 16 + (lane >> 2) + half * 8;
      uint16_t* cell = target + row * 3 * width + width;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        store_columns<Element>(cell + part * 32, row < n, grad_key[m], part * 4, half, p.scale, lane);
        store_columns<Element>(cell + width + part * 32, row < n, grad_value[m], part * 4, half, 1.f, lane);
      }
    }
  }
  if (Layout::kTail && n > kKeys && warp < 8)
    sums.template write<Element>(target + (warp < 4 ? 2 : 1) * width, 3 * width, n, warp < 4 ? 1.f : p.scale, warp,
                                 lane);
}

}  // namespace dk
