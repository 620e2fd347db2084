// How ranks hand packs of 16 bytes to each other: stores into the peer's memory, and loads of the
// own memory until what was stored is there.
//
// A slot that holds kEmptyWord in one of its words has not arrived whole. So data is its own flag:
// no fence, no barrier, no second message, and no order among stores is relied on, only that a word
// of 32 bits arrives in one piece. The pattern is a NaN of every element type; data that holds it
// is sent as another NaN. The reader empties the slot again, long before it is written next: a rank
// writes a half of the slots for call n + 2 after it has read the peer's data of call n + 1, which
// the peer sends after the end of its call n, in which it emptied that half.
#pragma once

#include <cstdint>

#include "peer_memory.h"

namespace fastinfer::cuda {

constexpr uint32_t kEmptyWord = 0xFFFFFFFFu;

__device__ __forceinline__ void store_pack_system(void* p, const uint4& v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// Past the first-level cache.
__device__ __forceinline__ uint4 load_pack_system(const void* p) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

// The first two words of a header: half, dead.
__device__ __forceinline__ uint2 load_pair_gpu(const PeerHeader* p) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(p)
               : "memory");
  return v;
}

__device__ __forceinline__ bool has_arrived(const uint4& v) {
  return v.x != kEmptyWord && v.y != kEmptyWord && v.z != kEmptyWord && v.w != kEmptyWord;
}

// Another NaN instead of the pattern: 0x7FFF in the upper half.
__device__ __forceinline__ uint4 sendable(uint4 v) {
  constexpr uint32_t kNan = 0x7FFFFFFFu;
  v.x = v.x == kEmptyWord ? kNan : v.x;
  v.y = v.y == kEmptyWord ? kNan : v.y;
  v.z = v.z == kEmptyWord ? kNan : v.z;
  v.w = v.w == kEmptyWord ? kNan : v.w;
  return v;
}

__device__ __forceinline__ uint64_t global_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

__device__ __forceinline__ int load_word_system(const int* p) {
  int v;
  asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// What ends a thread's waits: the time limit, or a word from the host, which knows that a rank has
// gone. At the limit the group is dead: the host reads it, and later waits end at once. The word of
// the host ends a wait when it is seen, some hundred polls after it began.
class Patience {
 public:
  __device__ __forceinline__ Patience(PeerHeader* own, int* failed, uint64_t limit_ns, bool dead)
      : own_(own), failed_(failed), limit_ns_(limit_ns), over_(dead) {}

  __device__ __forceinline__ bool is_over() {
    if (over_ || ++polls_ % 256 != 0) return over_;
    const uint32_t now = about_ms(global_ns());
    if (polls_ == 256) {
      start_ms_ = now;
    } else if (now - start_ms_ >= about_ms(limit_ns_)) {
      over_ = true;
      *reinterpret_cast<volatile uint32_t*>(&own_->dead) = 1;
      *static_cast<volatile int*>(failed_) = 1;
      __threadfence_system();
    } else {
      over_ = load_word_system(failed_) != 0;
    }
    return over_;
  }

 private:
  static __device__ __forceinline__ uint32_t about_ms(uint64_t ns) {
    return static_cast<uint32_t>(ns >> 20);
  }

  PeerHeader* own_;
  int* failed_;
  uint64_t limit_ns_;
  uint32_t start_ms_ = 0, polls_ = 0;
  bool over_;
};

// The pack of a slot whose first load gave `v`; the slot is empty afterwards.
__device__ __forceinline__ uint4 take(void* slot, uint4 v, Patience& patience) {
  while (!has_arrived(v)) {
    if (patience.is_over()) break;
    v = load_pack_system(slot);
  }
  store_pack_system(slot, make_uint4(kEmptyWord, kEmptyWord, kEmptyWord, kEmptyWord));
  return v;
}

}  // namespace fastinfer::cuda
