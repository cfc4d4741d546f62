// 16-bit floating point on the host: conversions with rounding to the nearest even number, as the GPU's.
#pragma once

#include <cstdint>
#include <cstring>

namespace dk {

struct Bf16 {};
struct Fp16 {};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

template <class Element>
float widen(uint32_t half);
template <>
inline float widen<Bf16>(uint32_t half) {
  return from_bits(half << 16);
}
// Exponents differ by 112 in their bias; the product with a power of two is right for subnormal numbers too.
template <>
inline float widen<Fp16>(uint32_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const uint32_t finite = to_bits(from_bits(magnitude) * 0x1p112f);
  const uint32_t bits = magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : finite;
  return from_bits(bits | (half & 0x8000u) << 16);
}

template <class Element>
uint32_t narrow(float value);
template <>
inline uint32_t narrow<Bf16>(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
template <>
inline uint32_t narrow<Fp16>(float value) {
  const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffu;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more
  // Below 2^-14 the spacing is 2^-24: adding 2^-1, whose spacing that is, rounds; the rest are the last bits.
  if (magnitude < 0x38800000u) return sign | (to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f));
  return sign | (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1)) >> 13;
}

template <class Element>
inline uint32_t pack(float low, float high) {
  return narrow<Element>(low) | narrow<Element>(high) << 16;
}

template <class Element>
inline void unpack(uint32_t word, float& low, float& high) {
  low = widen<Element>(word & 0xffffu);
  high = widen<Element>(word >> 16);
}

}  // namespace dk
