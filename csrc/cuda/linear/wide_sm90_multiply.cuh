// The products of the wgmma kernel: acc += W X^T over the steps of a job, W made from its codes in
// registers.
//
// Products are issued in batches, one fence and one wait each (a wait per product costs more
// instructions than it hides): half a step, while whose products run the operands of the other half
// are made; or, where tensor cores decide anyway, a whole step.
//
// Scales (of the three kinds of wide_sm90.cuh): once per group, with the step that begins it.
#pragma once

#include "../ptx/wgmma_rk.cuh"
#include "wide_sm90_finish.cuh"

namespace fastinfer::cuda::wide {

// Keeps a value in its register: the compiler would rather compute it again in the loop.
__device__ __forceinline__ void keep_register(uint32_t& x) { asm volatile("" : "+r"(x)); }

template <class T, class Tile>
struct Multiply : Finish<T, Tile> {
  using Base = Finish<T, Tile>;
  using Base::acc, Base::group, Base::kBlocks, Base::lane, Base::p, Base::shared, Base::warp;
  using Code = Codes<T, Tile::kBits>;
  static constexpr int kAcc = Tile::kAccumulators;
  static constexpr int kWords = Tile::kBits / 4 * 4;  // of a lane, block and step
  static constexpr bool kFloats = !Tile::kHalf && !Tile::kScratch;
  // A loop for no zero points; with 64 tokens registers would not do for one more.
  static constexpr bool kPlain = Code::kWide && Tile::kScratch && Tile::kTokens <= 32;

  float scratch[Tile::kScratch ? kBlocks : 1][Tile::kScratch ? kAcc : 1];
  float scale[kBlocks][2];          // not kHalf
  uint32_t scale_pair[kBlocks][2];  // kHalf: twice the scale of a row
  uint32_t offset[kBlocks][2];
  uint32_t words[kBlocks][kWords];
  uint32_t operand[4 * kBlocks][4];  // [part][block][16 columns]
  Ring<Tile::kStages> ring;
  // This lane's first entry in stage 0.
  uint32_t words_at, scales_at, zeros_at, empty_at;

  __device__ __forceinline__ Multiply(const WideParams& params, const WideShared<Tile>& s, int g,
                                      int w, int l, int32_t rank, int32_t ranks)
      : Base{params, s, g, w, l, rank, ranks} {
    const uint32_t entry = g * kBlocks * 64 + l / 4 * 8 + 2 * w;
    words_at = s.w + g * kBlocks * Tile::kBlockBytes + w * (128 * kWords) + l * (4 * kWords);
    scales_at = s.scales + entry * (params.scale_dtype == DType::f32 ? 4 : 2);
    zeros_at = s.zeros + entry;
    empty_at = ptx::shared_address(s.empty);
    keep_register(words_at), keep_register(scales_at), keep_register(zeros_at);
    keep_register(empty_at);
  }

  // The accumulators of the products.
  __device__ __forceinline__ float (&target(int b))[kAcc] {
    if constexpr (Tile::kScratch)
      return scratch[b];
    else
      return acc[b];
  }
  // kOwn: blocks of this warpgroup in this tile.
  template <int kOwn>
  __device__ __forceinline__ void load_words() {
    const uint32_t at = words_at + ring.index * Tile::kWBytes;
#pragma unroll
    for (int b = 0; b < kOwn; ++b)
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 v = load_shared(at + b * Tile::kBlockBytes + 4 * i);
        words[b][i] = v.x, words[b][i + 1] = v.y, words[b][i + 2] = v.z, words[b][i + 3] = v.w;
      }
  }
  // Scales and zero points of group `which` of the step: those that the operands are made with, and
  // (kScratch) scales that the sums of the group will be multiplied with.
  __device__ __forceinline__ uint32_t scales_of(int which) const {
    return scales_at + (Tile::kStepGroups * ring.index + which) * Tile::kScaleGroup;
  }
  template <int kOwn>
  __device__ __forceinline__ void load_operand_terms(int which) {
    if constexpr (Tile::kHalf) {
#pragma unroll
      for (int b = 0; b < kOwn; ++b) {
        uint32_t both;
        asm volatile("ld.shared.u32 %0, [%1];"
                     : "=r"(both)
                     : "r"(scales_of(which) + 128 * b)
                     : "memory");
        scale_pair[b][0] = __byte_perm(both, both, 0x1010);
        scale_pair[b][1] = __byte_perm(both, both, 0x3232);
      }
    } else if constexpr (!Tile::kScratch) {
      load_scales<kOwn>(which);
    }
    if (!p.zeros) return;
    const uint32_t at = zeros_at + (Tile::kStepGroups * ring.index + which) * Tile::kZeroGroup;
#pragma unroll
    for (int b = 0; b < kOwn; ++b) {
      uint32_t both;
      asm volatile("ld.shared.u16 %0, [%1];" : "=r"(both) : "r"(at + 64 * b) : "memory");
      offset[b][0] = Code::offset(both & 0xFF, kFloats);
      offset[b][1] = Code::offset(both >> 8 & 0xFF, kFloats);
    }
  }
  template <int kOwn>
  __device__ __forceinline__ void load_scales(int which) {
    const uint32_t at = scales_of(which);
#pragma unroll
    for (int b = 0; b < kOwn; ++b) {
      if (p.scale_dtype == DType::f32) {
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                     : "=f"(scale[b][0]), "=f"(scale[b][1])
                     : "r"(at + 256 * b)
                     : "memory");
      } else {
        uint32_t both;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(both) : "r"(at + 128 * b) : "memory");
        const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&both));
        const bool half = p.scale_dtype == DType::f16;
        scale[b][0] = half ? f.x : __uint_as_float(both << 16);
        scale[b][1] = half ? f.y : __uint_as_float(both & 0xFFFF0000u);
      }
    }
  }
  // Operand registers of k step i of block b.
  template <bool kZeros>
  __device__ __forceinline__ void dequantise(uint32_t (&to)[4], int b, int i) {
    const uint32_t* w = words[b] + i * (Tile::kBits / 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (Tile::kHalf) {
        to[j] = multiply2<T>(Code::pair(w, j, offset[b][j % 2]), scale_pair[b][j % 2]);
      } else if constexpr (!kZeros) {
        to[j] = int8_to_bf16x2(w[j / 2], j % 2);
      } else if constexpr (Tile::kScratch) {
        to[j] = Code::pair(w, j, offset[b][j % 2]);
      } else {
        float low, high;
        Code::floats(w, j, offset[b][j % 2], low, high);
        to[j] = pack_half2<Base::kBf16>(__fmul_rn(low, scale[b][j % 2]),
                                        __fmul_rn(high, scale[b][j % 2]));
      }
    }
  }
  // Of a part of a step, to operands of its own: those from `first` on.
  template <int kParts, int kOwn, bool kZeros>
  __device__ __forceinline__ void make_operands(int part, int first) {
    constexpr int kSteps = 4 / kParts;
#pragma unroll
    for (int u = 0; u < kSteps * kOwn; ++u)
      dequantise<kZeros>(operand[first + u], u / kSteps, part * kSteps + u % kSteps);
  }
  template <int kCount>
  __device__ __forceinline__ void hold_operands(int first) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) ptx::hold(operand[first + u]);
  }
  // The finished group joins the result.
  template <int kOwn>
  __device__ __forceinline__ void close_group() {
    if constexpr (Tile::kScratch) {
#pragma unroll
      for (int b = 0; b < kOwn; ++b) {
        ptx::hold(scratch[b]);
#pragma unroll
        for (int i = 0; i < kAcc; ++i)
          acc[b][i] = fmaf(scratch[b][i], scale[b][i % 4 / 2], acc[b][i]);
      }
    }
  }
  __device__ __forceinline__ void release(int index) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty_at + 8 * index) : "memory");
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      offset[b][0] = offset[b][1] = Code::offset(1u << (Tile::kBits - 1), kFloats);
#pragma unroll
      for (int i = 0; i < kAcc; ++i) acc[b][i] = 0.0f;
      if constexpr (Tile::kScratch) {
#pragma unroll
        for (int i = 0; i < kAcc; ++i) scratch[b][i] = 0.0f;
      }
    }
  }

  // kParts = 2: a step in halves, each with operands of its own, which are made while the products
  // of the other run; groups of 32 columns have their sums closed in between. !kZeros: 8-bit codes
  // without zero points, quicker.
  template <int kParts, int kOwn, bool kZeros>
  __device__ __forceinline__ void steps(const Job& job, int32_t k) {
    constexpr int kSteps = 4 / kParts, kSet = kSteps * kOwn;  // of 16 columns; operands of a part
    clear();
    int last = 0;
    GroupWalk walk;
#pragma unroll 1
    for (int32_t step = job.begin; step < job.end; ++step) {
      const bool first = walk.starts(p, job, step);
      const bool two = Tile::kStepGroups == 2 && two_groups(p, step, k);
      const uint64_t x =
          ptx::slab_descriptor(ptx::uniform(shared.x + ring.index * Tile::kXBytes), 16);
      ptx::mbarrier_wait(&shared.full[ring.index], ring.phase);
      load_words<kOwn>();
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const bool starts = part == 0 ? first : two;
        const auto products_done = [&] {
          ptx::wgmma_wait<0>();
          hold_operands<kSet>((kParts - 1 - part) * kSet);
          if (part == 0 && step > job.begin) release(last);
          if (Tile::kScratch && starts) {
            if (part > 0 || step > job.begin) close_group<kOwn>();
            load_scales<kOwn>(part);
          }
        };
        if (kParts == 1) products_done();
        if (starts) load_operand_terms<kOwn>(part);
        make_operands<kParts, kOwn, kZeros>(part, part * kSet);
        hold_operands<kSet>(part * kSet);  // not among the products
        if (kParts == 2) products_done();
        ptx::wgmma_fence();
        const int keep = Tile::kScratch ? !starts : 1;
#pragma unroll
        for (int i = 0; i < kSteps; ++i)
#pragma unroll
          for (int b = 0; b < kOwn; ++b)
            ptx::wgmma_rk<T, Tile::kTokens>(target(b), operand[part * kSet + b * kSteps + i],
                                            x + 2 * (part * kSteps + i), i == 0 ? keep : 1);
        ptx::wgmma_commit();
      }
      last = ring.index;
      ring.next();
    }
    ptx::wgmma_wait<0>();
    hold_operands<kParts * kSet>(0);
    if constexpr (!Tile::kScratch) {
#pragma unroll
      for (int b = 0; b < kOwn; ++b) ptx::hold(acc[b]);
    }
    if (job.end > job.begin) {
      close_group<kOwn>();
      release(last);
    }
  }

  template <int kOwn>
  __device__ __forceinline__ void run_own(const Job& job, int32_t k) {
    constexpr int kParts = Tile::kHalves ? 2 : 1;
    if (Tile::kStepGroups == 2 && p.half_steps)
      steps<2, kOwn, true>(job, k);
    else if (kPlain && !p.zeros)
      steps<kParts, kOwn, !kPlain>(job, k);
    else
      steps<kParts, kOwn, true>(job, k);
  }
  __device__ __forceinline__ void run(const Job& job, int32_t k) {
    if (!Tile::kPartial || this->owned(kBlocks - 1))
      run_own<kBlocks>(job, k);
    else
      run_own<Tile::kPartial ? kBlocks - 1 : kBlocks>(job, k);
  }
};

}  // namespace fastinfer::cuda::wide
