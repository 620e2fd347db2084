// Packed weights times many tokens on Hopper (sm_90a): Y^T = W X^T with TMA and wgmma.
//
// W is the A operand: its codes come to shared memory as they lie in the layout, a thread turns its
// codes into its own operand registers, nothing is shuffled. X is B: tiles [tokens][64 k], 128-byte
// swizzled by TMA, which also fills what lies past M and K with zeros. One CTA per SM: two producer
// threads (X; weights) and two or four consumer warpgroups, each kBlocks blocks of 64 weight rows x
// kTokens tokens. A unit of work is one wgmma of 16 columns; while one runs, the next is
// dequantised.
//
// Scales:
//   kHalf        scales have x's type: w = (q - z) s is one 16-bit multiplication of exact (q - z)
//   kScratch     any other type, few tokens: the products of exact (q - z) of one group add up in a
//                scratch accumulator, scaled in fp32 and added to the result at the group's end
//   neither      any other type, 256 tokens: (q - z) s in fp32, rounded to 16 bits
// The weights of the first and the last kind are those of dequantize_weight, bit for bit.
//
// Work: tiles in persistent order; tiles beyond whole rounds may be given to clusters whose CTAs
// take a part of K each and add their results through distributed shared memory, rank by rank.
#pragma once

#include "../ptx/cluster.cuh"
#include "../ptx/wgmma_rk.cuh"
#include "wide_sm90_dequant.cuh"
#include "wide_sm90_load.cuh"

namespace fastinfer::cuda::wide {

template <class T, class Tile>
struct Consumer {
  static constexpr int kBlocks = Tile::kBlocks, kAcc = Tile::kAccumulators;
  static constexpr int kWords = Tile::kBits / 4 * 4;  // of a lane, block and step
  using Code = Codes<T, Tile::kBits>;

  const WideParams& p;
  const WideShared<Tile>& shared;
  const int group, warp, lane;  // warpgroup; warp of it
  const int32_t rank, ranks;    // in the cluster

  float acc[kBlocks][kAcc];
  float scratch[Tile::kScratch ? kBlocks : 1][Tile::kScratch ? kAcc : 1];
  float scale[kBlocks][2];          // not kHalf
  uint32_t scale_pair[kBlocks][2];  // kHalf: twice the scale of a row
  uint32_t offset[kBlocks][2];
  uint32_t words[kBlocks][kWords];
  uint32_t a[2][4];
  Ring<Tile::kStages> ring;

  // The accumulators of the products.
  __device__ __forceinline__ float (&target(int b))[kAcc] {
    if constexpr (Tile::kScratch)
      return scratch[b];
    else
      return acc[b];
  }
  __device__ __forceinline__ void load_words() {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const uint32_t at = shared.w + ring.index * Tile::kWBytes +
                          (group * kBlocks + b) * Tile::kBlockBytes + warp * (128 * kWords) +
                          lane * (4 * kWords);
#pragma unroll
      for (int i = 0; i < kWords; i += 4)
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[b][i]), "=r"(words[b][i + 1]), "=r"(words[b][i + 2]),
                       "=r"(words[b][i + 3])
                     : "r"(at + 4 * i)
                     : "memory");
    }
  }
  // Scales and zeros of group `which` of the step.
  __device__ __forceinline__ void load_scales(int which) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) load_scales(b, which);
  }
  __device__ __forceinline__ void load_scales(int b, int which) {
    const uint32_t entry = (group * kBlocks + b) * 64 + lane / 4 * 8 + 2 * warp;
    const uint32_t at = shared.scales + (2 * ring.index + which) * Tile::kScaleGroup;
    if constexpr (Tile::kHalf) {
      uint32_t both;
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(both) : "r"(at + 2 * entry) : "memory");
      scale_pair[b][0] = __byte_perm(both, both, 0x1010);
      scale_pair[b][1] = __byte_perm(both, both, 0x3232);
    } else if (p.scale_dtype == DType::f32) {
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(scale[b][0]), "=f"(scale[b][1])
                   : "r"(at + 4 * entry)
                   : "memory");
    } else {
      uint32_t both;
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(both) : "r"(at + 2 * entry) : "memory");
      if (p.scale_dtype == DType::f16) {
        const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&both));
        scale[b][0] = f.x, scale[b][1] = f.y;
      } else {
        scale[b][0] = __uint_as_float(both << 16);
        scale[b][1] = __uint_as_float(both & 0xFFFF0000u);
      }
    }
    if (p.zeros) {
      uint32_t both;
      asm volatile("ld.shared.u16 %0, [%1];"
                   : "=r"(both)
                   : "r"(shared.zeros + (2 * ring.index + which) * Tile::kZeroGroup + entry)
                   : "memory");
      offset[b][0] = Code::offset(both & 0xFF);
      offset[b][1] = Code::offset(both >> 8 & 0xFF);
    }
  }
  // Operand registers of k step i of block b.
  __device__ __forceinline__ void dequantise(uint32_t (&to)[4], int b, int i) {
    const uint32_t* w = words[b] + i * (Tile::kBits / 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (Tile::kHalf) {
        to[j] = multiply2<T>(Code::pair(w, j, offset[b][j % 2]), scale_pair[b][j % 2]);
      } else if constexpr (Tile::kScratch) {
        to[j] = Code::pair(w, j, offset[b][j % 2]);
      } else {
        float low, high;
        Code::floats(w, j, offset[b][j % 2], low, high);
        to[j] = pack_half2<!Code::kHalf>(__fmul_rn(low, scale[b][j % 2]),
                                         __fmul_rn(high, scale[b][j % 2]));
      }
    }
  }
  // The finished group joins the result.
  __device__ __forceinline__ void close_group() {
    if constexpr (Tile::kScratch) {
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        ptx::hold(scratch[b]);
#pragma unroll
        for (int i = 0; i < kAcc; ++i)
          acc[b][i] = fmaf(scratch[b][i], scale[b][i % 4 / 2], acc[b][i]);
      }
    }
  }
  __device__ __forceinline__ void release(int index) {
    __syncwarp();  // every lane's reads of the stage
    if (lane == 0) ptx::mbarrier_arrive(&shared.empty[index]);
  }

  // acc = this CTA's part of the tile.
  __device__ __forceinline__ void multiply(const Job& job, int32_t k) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      offset[b][0] = offset[b][1] = Code::offset(1u << (Tile::kBits - 1));
#pragma unroll
      for (int i = 0; i < kAcc; ++i) acc[b][i] = 0.0f;
    }
    int last = 0;
    GroupWalk walk;
#pragma unroll 1
    for (int32_t step = job.begin; step < job.end; ++step) {
      const bool first = walk.starts(p, job, step), two = two_groups(p, step, k);
      ptx::mbarrier_wait(&shared.full[ring.index], ring.phase);
      load_words();
      const uint64_t x = ptx::slab_descriptor(shared.x + ring.index * Tile::kXBytes, 16);
      const uint32_t x_low = static_cast<uint32_t>(x), x_high = static_cast<uint32_t>(x >> 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          // Of the products under way all but the newest are waited for: the operand registers of
          // the one before it are free.
          const int unit = i * kBlocks + b;
          const bool starts = i == 0 ? first : i == 2 ? two : false;
          if (b == 0 && i % 2 == 0 && starts) {
            if (i > 0 || step > job.begin) close_group();
            load_scales(i / 2);
          }
          ptx::wgmma_wait<1>();
          ptx::hold(a[unit % 2]);
          if (unit == 1 && step > job.begin) release(last);
          dequantise(a[unit % 2], b, i);
          ptx::wgmma_fence();
          const int keep = Tile::kScratch ? !starts : 1;
          ptx::wgmma_rk<T, Tile::kTokens>(target(b), a[unit % 2],
                                          uint64_t{x_high} << 32 | (x_low + (i * 32 >> 4)), keep);
          ptx::wgmma_commit();
        }
      }
      last = ring.index;
      ring.next();
    }
    ptx::wgmma_wait<0>();
    ptx::hold(a[0]);
    ptx::hold(a[1]);
    if constexpr (!Tile::kScratch) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) ptx::hold(acc[b]);
    }
    if (job.end > job.begin) {
      release(last);
      close_group();
    }
  }

  // 16 tokens x this warp's 16 rows, rounded, to row 16 * slot of the staging area.
  __device__ __forceinline__ void stage(const float* v, int slot, const float (&bias)[2]) {
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      r[i] = pack_half2<!Code::kHalf>(v[2 * i] + bias[i % 2], v[2 * i + 1] + bias[i % 2]);
    const int token = 16 * slot + lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
    const uint32_t at = shared.out + group * 8192 + token * 128 + ((chunk ^ token % 8) << 4);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  }
  // The staged slots to Y; slot s holds 16 tokens from `token + 16 * stride * s` on.
  __device__ __forceinline__ void store(int slots, int32_t token, int32_t stride, int32_t block) {
    ptx::named_sync(1 + group, 128);
    const int thread = threadIdx.x % 128, chunk = thread % 8;
    const int32_t column = block * 64 + chunk * 8, columns = min(8, p.n - column);
    for (int row = thread / 8; row < 16 * slots; row += 16) {
      const int32_t t = token + row / 16 * 16 * stride + row % 16;
      uint4 v;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(shared.out + group * 8192 + row * 128 + ((chunk ^ row % 8) << 4))
                   : "memory");
      if (t >= p.m || columns <= 0) continue;
      uint16_t* const to = static_cast<uint16_t*>(p.out) + t * p.out_stride + column;
      if (columns == 8 && p.packed_out) {
        *reinterpret_cast<uint4*>(to) = v;
      } else {
        const uint32_t pair[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int c = 0; c < 8; ++c)
          if (c < columns) to[c] = static_cast<uint16_t>(pair[c / 2] >> c % 2 * 16);
      }
    }
    ptx::named_sync(1 + group, 128);
  }
  __device__ __forceinline__ void load_bias(int32_t block, float (&bias)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t row = block * 64 + 16 * warp + 8 * h + lane / 4;
      bias[h] = p.bias && row < p.n ? to_float(static_cast<const T*>(p.bias)[row]) : 0.0f;
    }
  }

  __device__ __forceinline__ void write(const Job& job) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int32_t block = job.block + group * kBlocks + b;
      if (block >= p.blocks) continue;
      float bias[2];
      load_bias(block, bias);
      constexpr int kSlots = Tile::kTokens < 64 ? Tile::kTokens / 16 : 4;
#pragma unroll
      for (int chunk = 0; chunk < Tile::kTokens / (16 * kSlots); ++chunk) {
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot)
          stage(acc[b] + (chunk * kSlots + slot) * 8, slot, bias);
        store(kSlots, job.token + 64 * chunk, 1, block);
      }
    }
  }

  // Split K: every CTA leaves its sums in shared memory; CTA r adds up, rank by rank, the 16-token
  // units r, r + ranks, ...
  __device__ __forceinline__ uint32_t partial(int b, int i) const {
    return shared.x + ((b * kAcc + i) * 128 * Tile::kGroups + (threadIdx.x - 128) * 4) * 4;
  }
  __device__ __forceinline__ void leave_partial() {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < kAcc; i += 4)
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(partial(b, i)),
                     "f"(acc[b][i]), "f"(acc[b][i + 1]), "f"(acc[b][i + 2]), "f"(acc[b][i + 3])
                     : "memory");
  }
  __device__ __forceinline__ void write_split(const Job& job) {
    constexpr int kUnits = Tile::kTokens / 16, kSlots = kUnits < 4 ? kUnits : 4;
#pragma unroll 1
    for (int b = 0; b < kBlocks; ++b) {
      const int32_t block = job.block + group * kBlocks + b;
      if (block >= p.blocks) continue;
      float bias[2];
      load_bias(block, bias);
      // With few units other ranks take those of the next block.
#pragma unroll 1
      for (int first = (rank + group * kBlocks + b) % ranks; first < kUnits;
           first += kSlots * ranks) {
        // Loads from another CTA take long: those of all slots are under way together.
        float v[kSlots][8] = {};
#pragma unroll 2
        for (int32_t from = 0; from < ranks; ++from) {
          float w[kSlots][8];
#pragma unroll
          for (int slot = 0; slot < kSlots; ++slot) {
            const int unit = min(first + slot * ranks, kUnits - 1);
            remote_load(w[slot], partial(b, unit * 8), from);
            remote_load(w[slot] + 4, partial(b, unit * 8 + 4), from);
          }
#pragma unroll
          for (int slot = 0; slot < kSlots; ++slot)
#pragma unroll
            for (int i = 0; i < 8; ++i) v[slot][i] += w[slot][i];
        }
        const int slots = min(kSlots, (kUnits - first + ranks - 1) / ranks);
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot)
          if (slot < slots) stage(v[slot], slot, bias);
        store(slots, job.token + 16 * first, ranks, block);
      }
    }
  }
  // Four neighbouring values at `local` in CTA `from`.
  static __device__ __forceinline__ void remote_load(float* to, uint32_t local, int32_t from) {
    uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(from));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                 : "r"(remote)
                 : "memory");
  }

  __device__ __forceinline__ void run(int32_t k) {
#pragma unroll 1
    for (int32_t tile = p.first_tile + blockIdx.x / ranks; tile < p.end_tile;
         tile += gridDim.x / ranks) {
      const Job job = job_of<Tile>(p, tile, rank, ranks);
      multiply(job, k);
      if (p.split) {  // the only tile of this cluster
        // Both warpgroups are done with the tiles before sums are written over them.
        ptx::named_sync(1 + Tile::kGroups, 128 * Tile::kGroups);
        leave_partial();
        cluster_sync_shared();
        write_split(job);
      } else {
        write(job);
      }
    }
    if (p.split) cluster_sync_shared();  // nobody leaves while its sums are read
  }
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    wide_kernel(const __grid_constant__ WideParams p, const __grid_constant__ CUtensorMap x_map,
                const __grid_constant__ CUtensorMap w_map, const int32_t k) {
  extern __shared__ char raw[];
  const WideShared<Tile> shared(raw);
  const int32_t ranks = p.split ? cluster_size() : 1, rank = p.split ? cluster_rank() : 0;
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&x_map);
    ptx::tma_prefetch(&w_map);
    for (int i = 0; i < Tile::kStages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 2);
      ptx::mbarrier_init(&shared.empty[i], 4 * Tile::kGroups);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  grid_launch_dependents();
  if (threadIdx.x < 128) {
    ptx::registers_give<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) {
      grid_wait();
      produce_x<Tile>(p, &x_map, shared, rank, ranks);
    } else if (threadIdx.x == 32) {
      produce_weights<Tile>(p, &w_map, k, shared, rank, ranks);
    }
    __syncwarp();
    if (p.split) {
      cluster_sync_shared();
      cluster_sync_shared();
    }
  } else {
    ptx::registers_take<Tile::kConsumerRegisters>();
    grid_wait();
    const int warp = threadIdx.x / 32;
    Consumer<T, Tile> consumer{
        p, shared, warp / 4 - 1, warp % 4, static_cast<int>(threadIdx.x % 32), rank, ranks};
    consumer.run(k);
  }
}

}  // namespace fastinfer::cuda::wide
