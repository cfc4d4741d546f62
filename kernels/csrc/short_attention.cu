// Attention of many short sequences of equal length (1 to 272 tokens, head dim 64), forward and backward: the
// launchers, in plain C. No header of torch; also compiled for the host (-DDK_EMU) by the tests.
//
// variant  forward, 65 to 272 tokens                             backward, 65 to 272 tokens
//    0     2 for 257 and 258 tokens, else 1                      8 warps x 32 keys, queries loaded one block ahead
//    1     8 warps x 16 rows, 64 keys at a time, guarded         as 0, queries not loaded ahead
//    2     as 1, keys from 256 on by scalar products             16 warps x 16 keys, queries loaded one block ahead
//    3     8 warps x 16 rows, 32 keys at a time, unguarded       as 0, the next block's input brought into the L2 cache
//    4     4 warps x 32 rows, 32 keys at a time, unguarded       -
//    5     4 warps x 16 rows, 64 keys at a time, unguarded,      -
//          three blocks per multiprocessor
//
//          forward, 1 to 64 tokens                               backward, 1 to 64 tokens
//    0     4 warps x 16 rows, 64 keys at a time                  4 warps x 16 keys, three blocks per multiprocessor
//    1     4 warps x 16 rows, 32 keys at a time, unguarded,      2 warps x 32 keys
//          four blocks per multiprocessor
// Numbers that are not listed for a length and a direction are invalid. The backward pass of more than 64 tokens takes
// 132 or 148 KiB of shared memory: sm_80 and sm_90 have it; sm_86, sm_89 and sm_120 do not, there it returns an error.
#include "backward.cuh"

namespace dk {

template <class Element>
int forward_variant(const ForwardParams& p, int blocks, int variant, void* stream) {
  const int bytes = forward_shared_bytes(p.tokens);
  if (p.tokens <= 64) {
    if (variant == 0) return launch<forward<Element, 4, 1, 64, false, false, 4>>(blocks, 128, bytes, stream, p);
    if (variant == 1) return launch<forward<Element, 4, 1, 32, true, false, 4>>(blocks, 128, bytes, stream, p);
    return kInvalidValue;
  }
  const int tail = p.tokens - kTileTokens;
  if (variant == 0) variant = tail == 1 || tail == 2 ? 2 : 1;
  switch (variant) {
    case 1:
      return launch<forward<Element, 8, 1, 64, false, false, 2>>(blocks, 256, bytes, stream, p);
    case 2:
      return launch<forward<Element, 8, 1, 64, false, true, 2>>(blocks, 256, bytes, stream, p);
    case 3:
      return launch<forward<Element, 8, 1, 32, true, false, 2>>(blocks, 256, bytes, stream, p);
    case 4:
      return launch<forward<Element, 4, 2, 32, true, false, 2>>(blocks, 128, bytes, stream, p);
    case 5:
      return launch<forward<Element, 4, 1, 64, true, false, 3>>(blocks, 128, bytes, stream, p);
    default:
      return kInvalidValue;
  }
}

template <class Element>
int backward_variant(BackwardParams p, int blocks, int variant, void* stream) {
  if (p.tokens <= 64) {
    constexpr int bytes = BackwardLayout<64, 1>::kBytes;
    if (variant == 0) return launch<backward<Element, 4, 1, 1, 3>>(blocks, 128, bytes, stream, p);
    if (variant == 1) return launch<backward<Element, 2, 2, 1, 4>>(blocks, 64, bytes, stream, p);
    return kInvalidValue;
  }
  switch (variant) {
    case 3:
      p.ahead = multiprocessors();
      [[fallthrough]];
    case 0:
      return launch<backward<Element, 8, 2, 2, 1>>(blocks, 256, BackwardLayout<256, 2>::kBytes, stream, p);
    case 1:
      return launch<backward<Element, 8, 2, 1, 1>>(blocks, 256, BackwardLayout<256, 1>::kBytes, stream, p);
    case 2:
      return launch<backward<Element, 16, 1, 2, 1>>(blocks, 512, BackwardLayout<256, 2>::kBytes, stream, p);
    default:
      return kInvalidValue;
  }
}

inline bool aligned(const void* pointer) { return pointer && reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether the kernels can take these shapes and this scale (positive: maxima are taken before it is applied).
inline bool valid(long stride, int sequences, int tokens, int heads, int dtype, float scale) {
  return scale > 0 && scale < INFINITY && sequences >= 0 && tokens >= 1 && tokens <= kMaxTokens && heads >= 1 &&
         stride >= 3L * heads * kHeadDim && stride % 8 == 0 && (dtype == 0 || dtype == 1) &&
         static_cast<int64_t>(sequences) * heads <= INT32_MAX;
}

}  // namespace dk

// The longest sequence, in tokens.
extern "C" int dk_attention_max_tokens(void) { return dk::kMaxTokens; }

// What a return code means.
extern "C" const char* dk_error_string(int code) { return dk::error_string(code); }

// out = softmax(scale * q k^T) v and lse = log2(sum(exp(scale * q k^T))). qkv is [sequences * tokens, 3, heads, 64]
// with rows qkv_stride elements apart (a multiple of 8), out [sequences * tokens, heads, 64], lse float32
// [sequences * tokens, heads]; all but lse, which is a part of a longer one, at 16-byte boundaries. dtype 0 is bfloat16, 1 float16. Returns a cudaError_t, 0 for
// success.
extern "C" int dk_attention_forward(const void* qkv, long qkv_stride, void* out, float* lse, int sequences, int tokens,
                                    int heads, int dtype, float scale, int variant, void* stream) {
  using namespace dk;
  if (!valid(qkv_stride, sequences, tokens, heads, dtype, scale)) return kInvalidValue;
  if (sequences == 0) return 0;
  if (!aligned(qkv) || !aligned(out) || !lse) return kInvalidValue;
  const ForwardParams p{static_cast<const uint16_t*>(qkv), static_cast<uint16_t*>(out), lse, qkv_stride, tokens, heads,
                        scale * kLog2e};
  return dtype == 0 ? forward_variant<Bf16>(p, sequences * heads, variant, stream)
                    : forward_variant<Fp16>(p, sequences * heads, variant, stream);
}

// The gradient of qkv from that of out: grad_qkv [sequences * tokens, 3, heads, 64], contiguous; the rest as above.
extern "C" int dk_attention_backward(const void* qkv, long qkv_stride, const void* out, const void* grad_out,
                                     const float* lse, void* grad_qkv, int sequences, int tokens, int heads, int dtype,
                                     float scale, int variant, void* stream) {
  using namespace dk;
  if (!valid(qkv_stride, sequences, tokens, heads, dtype, scale)) return kInvalidValue;
  if (sequences == 0) return 0;
  if (!aligned(qkv) || !aligned(out) || !aligned(grad_out) || !lse || !aligned(grad_qkv)) return kInvalidValue;
  const BackwardParams p{static_cast<const uint16_t*>(qkv), static_cast<const uint16_t*>(out),
                         static_cast<const uint16_t*>(grad_out), lse, static_cast<uint16_t*>(grad_qkv), qkv_stride,
                         tokens, heads, scale, scale * kLog2e, 0};
  return dtype == 0 ? backward_variant<Bf16>(p, sequences * heads, variant, stream)
                    : backward_variant<Fp16>(p, sequences * heads, variant, stream);
}
