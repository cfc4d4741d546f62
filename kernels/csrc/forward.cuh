// Attention forward for one (sequence, head) per block, 1 to 272 tokens of 64 elements.
//
// Keys and values stay in shared memory; each warp walks over tiles of 16 query rows with an online softmax over chunks
// of keys (FlashAttention-2, arXiv 2307.08691, algorithm 1). 257 to 272 tokens (16 x 16 patches plus class and register
// tokens) would leave one row tile for one warp while the others wait; instead the rows from 256 on are one tile that
// all warps share, each with its part of the keys, and the parts are merged through shared memory. The tokens are a set
// for attention, so the last ones of a sequence can take this part whatever they are.
// The keys from 256 on are either one more 16-wide tile, or (kVectorTail) scalar products that start the softmax.
#pragma once

#include "tiles.cuh"

namespace dk {

constexpr int kMaxTokens = 272;
constexpr int kTileTokens = 256;  // what the warps share out evenly; the tokens after them are the tail

struct ForwardParams {
  const uint16_t* qkv;  // [sequences * tokens, 3, heads, 64], rows `stride` elements apart
  uint16_t* out;        // [sequences * tokens, heads, 64]
  float* lse;           // [sequences * tokens, heads], log2 of the sum of exp(scale * q.k)
  int64_t stride;
  int tokens, heads;
  float scale_log2;  // scale * log2(e): the softmax is computed with powers of two
};

constexpr int forward_shared_bytes(int tokens) { return 2 * round_up(tokens, 16) * kRowBytes; }

// The online softmax of one 16-row query tile. Index 0 is row g of the tile, 1 is row g + 8.
struct RowTile {
  uint32_t query[4][4];  // A fragments
  float out[8][4];       // sum of p * value, C fragments
  float most[2];         // largest score so far, before scaling
  float sum[2];          // sum of p; of this lane's columns only, until finish_rows
};

// Rows beyond the end count as zero queries: their result is finite and never stored.
DK_DEVICE void start_rows(RowTile& rows, const uint16_t* query, int64_t stride, int row, int tokens, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + (lane >> 2) + half * 8;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      uint32_t words[4] = {};
      if (r < tokens) load_words(words, query + r * stride + part * 32 + (lane & 3) * 8);
      transpose_quad(words, lane);
#pragma unroll
      for (int j = 0; j < 4; ++j) rows.query[part * 2 + (j >> 1)][(j & 1) * 2 + half] = words[j];
    }
    rows.most[half] = -INFINITY;
    rows.sum[half] = 0.f;
  }
  clear(rows.out);
}

// Brings the state to a new largest score.
DK_DEVICE void rescale(RowTile& rows, int half, float most, float scale_log2) {
  const float factor = exp2_fast((rows.most[half] - most) * scale_log2);
  rows.most[half] = most;
  rows.sum[half] *= factor;
#pragma unroll
  for (int j = 0; j < 8; ++j) rows.out[j][2 * half] *= factor, rows.out[j][2 * half + 1] *= factor;
}

// Adds keys key..key+kChunk-1 to the state. With kPartial only those below `limit`, of which there is at least one.
template <class Element, int kRowTiles, int kChunk, bool kPartial>
DK_DEVICE void attend(RowTile (&rows)[kRowTiles], int keys, int values, int key, int limit, float scale_log2,
                      int lane) {
  float score[kRowTiles][kChunk / 8][4];
#pragma unroll
  for (int j = 0; j < kChunk / 16; ++j) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[m][2 * j][i] = score[m][2 * j + 1][i] = 0.f;
    }
    if (kPartial && key + j * 16 >= limit) continue;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t b[4];
      load_b(b, keys, key + j * 16, k, lane);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
        mma_pair<Element>(score[m][2 * j], score[m][2 * j + 1], rows[m].query[k], b);
    }
  }
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = rows[m].most[half];
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& s = score[m][j][2 * half + e];
          if (kPartial && key + j * 8 + 2 * (lane & 3) + e >= limit) s = -INFINITY;
          most = fmaxf(most, s);
        }
      }
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(most, shuffle_xor(most, 2));
      rescale(rows[m], half, most, scale_log2);
      const float shift = most * scale_log2;
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& s = score[m][j][2 * half + e];
          s = exp2_fast(s * scale_log2 - shift);
          rows[m].sum[half] += s;
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kChunk / 16; ++j) {
    if (kPartial && key + j * 16 >= limit) continue;
    uint32_t p[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) pack_a<Element>(p[m], score[m][2 * j], score[m][2 * j + 1]);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t b[4];
      load_b_rows(b, values, key + j * 16, n, lane);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) mma_pair<Element>(rows[m].out[2 * n], rows[m].out[2 * n + 1], p[m], b);
    }
  }
}

// Adds one key by scalar products: each lane has 16 of the 64 elements of its two query rows.
template <class Element>
DK_DEVICE void attend_vector(RowTile& rows, int keys, int values, int key, float scale_log2, int lane) {
  float score[2] = {0.f, 0.f};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float k[2], q[2];
    unpack<Element>(shared<uint32_t>(chunk_at(keys, key, j) + (lane & 3) * 4), k[0], k[1]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unpack<Element>(rows.query[j >> 1][(j & 1) * 2 + half], q[0], q[1]);
      score[half] += q[0] * k[0] + q[1] * k[1];
    }
  }
  float p[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    score[half] += shuffle_xor(score[half], 1);
    score[half] += shuffle_xor(score[half], 2);
    rescale(rows, half, fmaxf(rows.most[half], score[half]), scale_log2);
    p[half] = exp2_fast((score[half] - rows.most[half]) * scale_log2);
    rows.sum[half] += (lane & 3) == 0 ? p[half] : 0.f;  // the four lanes of a row are added up in the end
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float v[2];
    unpack<Element>(shared<uint32_t>(chunk_at(values, key, j) + (lane & 3) * 4), v[0], v[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) rows.out[j][i] += p[i >> 1] * v[i & 1];
  }
}

DK_DEVICE void finish_rows(RowTile& rows) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rows.sum[half] += shuffle_xor(rows.sum[half], 1);
    rows.sum[half] += shuffle_xor(rows.sum[half], 2);
  }
}

template <class Element>
DK_DEVICE void write_rows(const RowTile& rows, const ForwardParams& p, int64_t token, int head, int count, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = (lane >> 2) + half * 8;
    const int64_t slot = (token + row) * p.heads + head;
    const float factor = 1.f / rows.sum[half];
#pragma unroll
    for (int part = 0; part < 2; ++part)
      store_columns<Element>(p.out + slot * kHeadDim + part * 32, row < count, rows.out, part * 4, half, factor, lane);
    if (row < count && (lane & 3) == 0) p.lse[slot] = rows.most[half] * p.scale_log2 + log2f(rows.sum[half]);
  }
}

// Puts together the warps' parts of the last `count` rows, each the softmax over its own keys: in shared memory, in the
// order of the warps, so the result is the same every time. Overwrites the keys and values; every warp must call it.
template <class Element, int kWarps>
DK_DEVICE void merge_rows(const RowTile& rows, const ForwardParams& p, int64_t token, int head, int count, int warp,
                          int lane) {
  constexpr int kPitch = (kHeadDim + 2) * 4;  // 64 outputs, the largest score, the sum
  constexpr int kMost = kHeadDim * 4, kSum = kMost + 4;
  sync_threads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = (lane >> 2) + half * 8;
    if (row >= count) continue;
    const int part = (warp * count + row) * kPitch;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) shared<float>(part + (j * 8 + 2 * (lane & 3) + e) * 4) = rows.out[j][2 * half + e];
    }
    if ((lane & 3) == 0) shared<float>(part + kMost) = rows.most[half], shared<float>(part + kSum) = rows.sum[half];
  }
  sync_threads();
  for (int i = thread(); i < count * 32; i += kWarps * 32) {
    const int row = i >> 5, column = (i & 31) * 2;
    float most = -INFINITY, sum = 0.f, left = 0.f, right = 0.f;
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, shared<float>((w * count + row) * kPitch + kMost));
    for (int w = 0; w < kWarps; ++w) {
      const int part = (w * count + row) * kPitch;
      const float factor = exp2_fast((shared<float>(part + kMost) - most) * p.scale_log2);
      sum += shared<float>(part + kSum) * factor;
      left += shared<float>(part + column * 4) * factor;
      right += shared<float>(part + column * 4 + 4) * factor;
    }
    const int64_t slot = (token + row) * p.heads + head;
    *reinterpret_cast<uint32_t*>(p.out + slot * kHeadDim + column) = pack<Element>(left / sum, right / sum);
    if (column == 0) p.lse[slot] = most * p.scale_log2 + log2f(sum);
  }
}

// kUnguarded: whole chunks go through code of their own without tests for the end, which the compiler overlaps more,
// and which takes more registers for it.
template <class Element, int kWarps, int kRowTiles, int kChunk, bool kUnguarded, bool kVectorTail, int kBlocksPerSm>
DK_KERNEL(kWarps * 32, kBlocksPerSm) forward(ForwardParams p) {
  constexpr int kPass = kWarps * kRowTiles * 16;      // query rows that the warps cover together
  constexpr int kShare = kTileTokens / kWarps;        // keys of one warp where the warps share rows
  static_assert(kShare % 16 == 0 && (kTileTokens % kPass == 0 || kPass < kTileTokens), "uneven tiles");
  const int lane = thread() & 31, warp = thread() >> 5;
  const int head = block() % p.heads, n = p.tokens, held = round_up(n, 16);
  const int64_t token = static_cast<int64_t>(block() / p.heads) * n;
  const int64_t head_block = static_cast<int64_t>(p.heads) * kHeadDim;
  const uint16_t* query = p.qkv + token * p.stride + head * kHeadDim;
  const int keys = 0, values = held * kRowBytes;  // offsets in shared memory
  load_rows<kWarps * 32>(keys, query + head_block, p.stride, n, held);
  load_rows<kWarps * 32>(values, query + 2 * head_block, p.stride, n, held);

  const bool tail = n > kTileTokens;
  const int passes = tail ? kTileTokens / kPass : (n + kPass - 1) / kPass;
#pragma unroll 1
  for (int pass = 0; pass < passes + tail; ++pass) {
    const bool together = pass == passes;
    const int row = together ? kTileTokens : pass * kPass + warp * kRowTiles * 16;
    RowTile rows[kRowTiles];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) start_rows(rows[m], query, p.stride, row + m * 16, n, lane);
    if (pass == 0) {  // the first queries are on their way together with the keys
      copy_wait();
      sync_threads();
    }
    if (row >= n) continue;

    int key = together ? warp * kShare : 0;
    int limit = together && warp < kWarps - 1 ? key + kShare : n;
    if (kVectorTail && limit > kTileTokens) {
      for (int k = kTileTokens; k < n; ++k) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) attend_vector<Element>(rows[m], keys, values, k, p.scale_log2, lane);
      }
      limit = kTileTokens;
    }
    if (kUnguarded) {
#pragma unroll 1
      for (; key + kChunk <= limit; key += kChunk)
        attend<Element, kRowTiles, kChunk, false>(rows, keys, values, key, limit, p.scale_log2, lane);
    }
#pragma unroll 1
    for (; key < limit; key += kChunk)
      attend<Element, kRowTiles, kChunk, true>(rows, keys, values, key, limit, p.scale_log2, lane);

#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) finish_rows(rows[m]);
    if (together) {
      merge_rows<Element, kWarps>(rows[0], p, token + row, head, n - row, warp, lane);
    } else {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
        write_rows<Element>(rows[m], p, token + row + m * 16, head, n - row - m * 16, lane);
    }
  }
}

}  // namespace dk
