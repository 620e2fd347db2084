// Launchers of the paged attention stem; they return a cudaError_t as int.
#pragma once

#include <cstdint>

#include "../../cpu/attention.h"
#include "params.h"

namespace fastinfer::cuda {

int launch_append(const AppendParams& p, void* stream);
int launch_plan(const int32_t* lengths, int64_t stride, int64_t batch, int64_t heads_kv,
                int64_t q_len, int64_t append, int64_t window_left, int64_t num_slots,
                bool invariant, int32_t* plan, void* stream);
int launch_merge_states(const cpu::MergeStatesParams& p, void* stream);

// Shared memory that a CTA of the decode kernel needs at least, for the instance of this head dim.
int decode_shared_bytes(bool eight_bit, int dim);
int large_shared_bytes();  // of the instance of 8 warps

// One per cache type, each in a file of its own. `ctas`: at most this many. soft: e4m3 decoded as
// sm_80 must.
int launch_decode_bf16(const DecodeParams& p, int ctas, void* stream);
int launch_decode_f16(const DecodeParams& p, int ctas, void* stream);
int launch_decode_e4m3(const DecodeParams& p, int ctas, bool soft, void* stream);
int launch_decode_i8(const DecodeParams& p, int ctas, void* stream);

// Plain steps over 8-bit caches whose keys come in boxes of TMA (sm_90a).
bool boxes_serve(const DecodeParams& p);
int launch_decode_boxes(const DecodeParams& p, int ctas, void* stream);

}  // namespace fastinfer::cuda
