// Tiles of 64-element rows in shared memory, and their fragments for mma.m16n8k16.
//
// A lane is known by g = lane / 4 and t = lane % 4. Its parts of a fragment (PTX ISA, mma.m16n8k16):
//   A (16 x 16): word 0 (row g, columns 2t and 2t+1), 1 (row g+8), 2 (row g, columns +8), 3 (row g+8, columns +8)
//   B (16 x 8):  word 0 (rows 2t and 2t+1, column g), 1 (rows +8)
//   C (16 x 8):  0, 1 (row g, columns 2t and 2t+1), 2, 3 (row g+8)
// so two C tiles side by side, packed to 16 bits, are an A fragment: that is how P and dS stay in registers.
#pragma once

#include "rt.h"

namespace dk {

constexpr int kHeadDim = 64;
constexpr int kRowBytes = kHeadDim * 2;
constexpr float kLog2e = 1.4426950408889634f;

DK_BOTH constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// The offset of the 16-byte chunk `chunk` of a row. Rows are 128 bytes, as long as all banks together: without the
// exclusive or, the eight rows of a matrix would meet in the same four banks.
DK_DEVICE int chunk_at(int tile, int row, int chunk) { return tile + row * kRowBytes + ((chunk ^ (row & 7)) << 4); }

// Starts the copy of rows 0..rows-1 into a tile, zeros from row `valid` on. `stride` in elements.
template <int kThreads>
DK_DEVICE void load_rows(int tile, const uint16_t* source, int64_t stride, int valid, int rows) {
  for (int i = thread(); i < rows * 8; i += kThreads) {
    const int row = i >> 3, chunk = i & 7;
    const bool inside = row < valid;
    copy_async(chunk_at(tile, row, chunk), source + (inside ? row * stride : 0) + chunk * 8, inside);
  }
}

// A fragment of rows row..row+15, columns 16k..16k+15.
DK_DEVICE void load_a(uint32_t (&a)[4], int tile, int row, int k, int lane) {
  load_matrices<false>(a, chunk_at(tile, row + (lane & 15), k * 2 + (lane >> 4)));
}

// B fragments (b[0], b[1] and b[2], b[3]) of the transposed tile: rows row..row+15 are the columns of two B tiles.
DK_DEVICE void load_b(uint32_t (&b)[4], int tile, int row, int k, int lane) {
  load_matrices<false>(b, chunk_at(tile, row + (lane & 7) + ((lane >> 4) << 3), k * 2 + ((lane >> 3) & 1)));
}

// B fragments of the tile as it lies: rows row..row+15, columns 16n..16n+7 (b[0], b[1]) and 16n+8..16n+15.
DK_DEVICE void load_b_rows(uint32_t (&b)[4], int tile, int row, int n, int lane) {
  load_matrices<true>(b, chunk_at(tile, row + (lane & 15), n * 2 + (lane >> 4)));
}

template <class Element>
DK_DEVICE void mma_pair(float (&left)[4], float (&right)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma<Element>(left, a, b[0], b[1]);
  mma<Element>(right, a, b[2], b[3]);
}

// Two C tiles side by side as an A fragment.
template <class Element>
DK_DEVICE void pack_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<Element>(left[0], left[1]);
  a[1] = pack<Element>(left[2], left[3]);
  a[2] = pack<Element>(right[0], right[1]);
  a[3] = pack<Element>(right[2], right[3]);
}

template <int kColumns>
DK_DEVICE void clear(float (&tiles)[kColumns][4]) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) tiles[j][0] = tiles[j][1] = tiles[j][2] = tiles[j][3] = 0.f;
}

// words[j] of lane t becomes words[t] of lane j, within each group of four lanes. It turns what a C fragment gives a
// lane (two columns of each of four tiles) into eight neighbouring columns, one 16-byte access, and back.
DK_DEVICE void transpose_quad(uint32_t (&words)[4], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const uint32_t got = shuffle_xor(odd ? words[j] : words[j + 1], 1);
    words[j] = odd ? got : words[j];
    words[j + 1] = odd ? words[j + 1] : got;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t got = shuffle_xor(upper ? words[j] : words[j + 2], 2);
    words[j] = upper ? got : words[j];
    words[j + 2] = upper ? words[j + 2] : got;
  }
}

// Writes 32 columns (four C tiles, from tiles[first]) of one row: row g (half 0) or g + 8 (half 1) of the tiles.
template <class Element, int kColumns>
DK_DEVICE void store_columns(uint16_t* row, bool valid, const float (&tiles)[kColumns][4], int first, int half,
                             float factor, int lane) {
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float* c = tiles[first + j];
    words[j] = pack<Element>(c[2 * half] * factor, c[2 * half + 1] * factor);
  }
  transpose_quad(words, lane);
  if (valid) store_words(row + (lane & 3) * 8, words);
}

}  // namespace dk
