// Philox4x32-10, a counter-based random generator: 4 words that depend on (key, counter) alone
// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). Plain C++, the same source
// for CPU and CUDA.
//
// How sampling uses it:
//   key     = (seed bits 0-31, seed bits 32-63)
//   counter = (step bits 0-31, step bits 32-63, token / 4, stream)
//   word    = token % 4
// so a token's random word is a function of (seed, step, token, stream): neither the position of
// the row in the batch nor padding of the vocabulary plays a part.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FI_PORTABLE __host__ __device__ __forceinline__
#else
#define FI_PORTABLE static inline __attribute__((always_inline))
#endif

namespace fastinfer {

enum Stream : uint32_t {
  kStreamSample = 0,   // sample, and the last token of verify_draft when every draft was accepted
  kStreamAccept = 1,   // the uniform of an accept test: "token" 0
  kStreamResample = 2  // the replacement of a rejected draft
};

struct PhiloxKey {
  uint32_t key[2];
  uint32_t step[2];
};

struct PhiloxWords {
  uint32_t word[4];
};

FI_PORTABLE PhiloxKey philox_key(int64_t seed, int64_t step) {
  const uint64_t k = static_cast<uint64_t>(seed), s = static_cast<uint64_t>(step);
  return {{static_cast<uint32_t>(k), static_cast<uint32_t>(k >> 32)},
          {static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32)}};
}

FI_PORTABLE PhiloxWords philox(const PhiloxKey& key, uint32_t block, uint32_t stream) {
  uint32_t c0 = key.step[0], c1 = key.step[1], c2 = block, c3 = stream;
  uint32_t k0 = key.key[0], k1 = key.key[1];
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastinfer
