// The operator surface of fastinfer, all of it, on one page.
//
// Every operator is an out-variant: it writes into tensors that the caller provides (`Tensor(a!)`)
// and returns nothing. Allocation, defaults and documentation live in
// python/fastinfer/ops/<stem>.py. An argument of the form `Tensor(x!)?` may be absent. `workspace`
// is scratch for CUDA kernels that need counters: zeroed once by its owner, left zeroed by every
// launch; CPU kernels ignore it. The operators that run between the GEMMs of every layer have no
// keyword-only arguments: torch takes a microsecond to match the first keyword of a call.
// Implementations: csrc/ops/<stem>.cpp, one function per operator, registered for CPU and CUDA
// alike.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastinfer, m) {
  // ---- flash_attention
  // ------------------------------------------------------------------------------------------ q
  // [B,Sq,Hq,D]; k, v [B,Sk,Hkv,D]; out like q; lse fp32 [B,Hq,Sq]
  m.def(
      "flash_attn_fwd(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!)? lse, *, "
      "float softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, Tensor? plan, "
      "bool batch_invariant, Tensor(c!)? workspace) -> ()");
  // q [T,Hq,D]; k, v [Tk,Hkv,D] or, with block_table [B,max_blocks], caches [num_blocks,P,Hkv,D];
  // lse fp32 [Hq,T]
  m.def(
      "flash_attn_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!)? lse, *, "
      "Tensor cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
      "Tensor? seqused_k, Tensor? block_table, "
      "float softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, Tensor? plan, "
      "bool batch_invariant, Tensor(c!)? workspace) -> ()");

  // ---- paged_attention
  // ------------------------------------------------------------------------------------------ q
  // [B,Sq,Hq,D]; caches [B,S,Hkv,D] or paged [num_blocks,P,Hkv,D]; k, v new tokens [B,Snew,Hkv,D];
  // lse fp32 [B,Hq,Sq]
  m.def(
      "flash_attn_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
      "Tensor(c!) out, Tensor(d!)? lse, *, Tensor? rotary_cos, Tensor? rotary_sin, "
      "Tensor? cache_seqlens, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table, "
      "float softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, "
      "bool rotary_interleaved, Tensor? alibi_slopes, SymInt num_splits, Tensor? sinks, "
      "Tensor(e!)? k_scale, Tensor(f!)? v_scale, Tensor? plan, bool batch_invariant, "
      "Tensor(g!)? workspace) -> ()");
  // plan int32 [8 + B + 1], see csrc/ops/paged_attention.cpp
  m.def(
      "plan_decode(Tensor cache_seqlens, int num_heads_q, int num_heads_kv, int head_dim, *, "
      "SymInt q_len, SymInt append, SymInt window_left, SymInt window_right, SymInt num_slots, "
      "bool batch_invariant, Tensor(a!) plan) -> ()");
  // outputs [T,Hq,D] with lse [Hq,T], or [B,S,Hq,D] with lse [B,Hq,S]
  m.def(
      "merge_attn_states(Tensor prefix_output, Tensor prefix_lse, Tensor suffix_output, "
      "Tensor suffix_lse, *, Tensor(a!) out, Tensor(b!)? out_lse) -> ()");

  // ---- kv_cache
  // -------------------------------------------------------------------------------------------------
  m.def("repeat_kv(Tensor x, SymInt n_rep, int dim, Tensor(a!) out) -> ()");
  // key, value [T,Hkv,D]; caches [num_blocks,P,Hkv,D]; slot_mapping [T], -1 = skip
  m.def(
      "reshape_and_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor slot_mapping, Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> ()");
  // key_out, value_out [num_tokens,Hkv,D]; cu_seqlens [B+1]; seq_starts [B] = first cached position
  // to read
  m.def(
      "gather_cache(Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor cu_seqlens, "
      "Tensor? seq_starts, Tensor? k_scale, Tensor? v_scale, Tensor(a!) key_out, "
      "Tensor(b!) value_out) -> ()");
  // block_mapping [n,2] of (source, destination) block ids, on the caches' device
  m.def("copy_blocks(Tensor(a!)[] caches, Tensor block_mapping) -> ()");
  // block_mapping on CPU; src and dst may live on different devices
  m.def("swap_blocks(Tensor[] src, Tensor(a!)[] dst, Tensor block_mapping) -> ()");

  // ---- linear
  // ---------------------------------------------------------------------------------------------------
  // x [M,K]; weight [N,K]; bias [N]; out [M,N]
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, *, bool batch_invariant, Tensor(a!) out) -> "
      "()");
  // qweight, scales, zeros in the packed layout of the device (csrc/ops/linear_layout.h); perm
  // int32 [K]
  m.def(
      "int4_linear(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, *, "
      "int group_size, Tensor? perm, bool batch_invariant, Tensor(a!) out, Tensor(b!)? workspace) "
      "-> ()");
  m.def(
      "int8_linear(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, *, "
      "int group_size, Tensor? perm, bool batch_invariant, Tensor(a!) out, Tensor(b!)? workspace) "
      "-> ()");
  // x_q int8 [M,K]; x_scale fp32 [M]; x_zeros int32 [M]; weight int8 [N,K]; weight_scale fp32 [N];
  // weight_sum int32 [N]
  m.def(
      "w8a8_linear(Tensor x_q, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, "
      "*, "
      "Tensor? x_zeros, Tensor? weight_sum, bool batch_invariant, Tensor(a!) out, "
      "Tensor(b!)? workspace) -> ()");
  // weight [N,K] -> codes uint8 [N,K], scales [N,G], zeros uint8 [N,G] when asymmetric
  m.def(
      "quantize_weight(Tensor weight, *, int bits, int group_size, Tensor(a!) codes, "
      "Tensor(b!) scales, Tensor(c!)? zeros) -> ()");
  m.def(
      "pack_weight(Tensor codes, Tensor scales, Tensor? zeros, *, int bits, int group_size, "
      "Tensor(a!) qweight, Tensor(b!) packed_scales, Tensor(c!)? packed_zeros) -> ()");
  // out [N,K], columns in the original order when perm is given
  m.def(
      "dequantize_weight(Tensor qweight, Tensor scales, Tensor? zeros, *, int bits, int "
      "group_size, "
      "Tensor? perm, Tensor(a!) out) -> ()");
  // x [M,K] -> q int8 [M,K], scale fp32 [M], zeros int32 [M]; static_scale fp32 [1]
  m.def(
      "quantize_per_token(Tensor x, Tensor? static_scale, Tensor(a!) q, Tensor(b!) scale, "
      "Tensor(c!)? zeros) -> ()");

  // ---- norm
  // -----------------------------------------------------------------------------------------------------
  // x [...,D] with any outer strides; weight [D]
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()");
  m.def("fused_add_rms_norm(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps) -> ()");
  m.def(
      "rms_norm_quant(Tensor x, Tensor weight, float eps, Tensor(a!)? residual, Tensor(b!) q, "
      "Tensor(c!) scale, Tensor(d!)? zeros) -> ()");

  // ---- rotary
  // ---------------------------------------------------------------------------------------------------
  // q [T,Hq,D] or [B,S,Hq,D]; k likewise; cos, sin [max_pos,rotary_dim/2]; positions [T] or [B,S]
  // (absent: 0..S-1)
  m.def(
      "apply_rotary(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? positions, "
      "bool interleaved, Tensor(a!) q_out, Tensor(b!)? k_out) -> ()");
  m.def(
      "apply_rotary_inplace(Tensor(a!) q, Tensor(b!)? k, Tensor cos, Tensor sin, Tensor? "
      "positions, "
      "bool interleaved) -> ()");
  m.def(
      "apply_rotary_and_cache(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor cos, Tensor sin, "
      "Tensor positions, Tensor(c!) key_cache, Tensor(d!) value_cache, Tensor slot_mapping, "
      "bool interleaved, Tensor(e!)? k_scale, Tensor(f!)? v_scale) -> ()");

  // ---- activation
  // -----------------------------------------------------------------------------------------------
  // x [...,2I] = [gate, up] -> out [...,I]
  m.def("silu_and_mul(Tensor x, Tensor(a!) out) -> ()");
  m.def("gelu_and_mul(Tensor x, bool tanh_approximation, Tensor(a!) out) -> ()");
  m.def("silu_and_mul_quant(Tensor x, Tensor(a!) q, Tensor(b!) scale, Tensor(c!)? zeros) -> ()");

  // ---- sampling
  // -------------------------------------------------------------------------------------------------
  // logits [B,V]; per-row parameters [B]; prompt_mask bool [B,V]; output_counts int32 [B,V];
  // top_ids [B,n]
  m.def(
      "sample(Tensor logits, *, Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, "
      "Tensor? seeds, Tensor? steps, Tensor? repetition_penalty, Tensor? presence_penalty, "
      "Tensor? frequency_penalty, Tensor? prompt_mask, Tensor? output_counts, Tensor(a!) "
      "token_ids, "
      "Tensor(b!)? logprobs, Tensor(c!)? top_ids, Tensor(d!)? top_logprobs, "
      "Tensor(e!)? workspace) -> ()");
  // target_logits [B,k+1,V]; draft_token_ids [B,k]; draft_probs fp32 [B,k,V]; token_ids int64
  // [B,k+1]
  m.def(
      "verify_draft(Tensor target_logits, Tensor draft_token_ids, Tensor? draft_probs, "
      "Tensor? num_draft_tokens, *, Tensor? temperature, Tensor? top_k, Tensor? top_p, "
      "Tensor? min_p, Tensor? seeds, Tensor? steps, Tensor(a!) token_ids, Tensor(b!) num_accepted, "
      "Tensor(c!)? workspace) -> ()");

  // ---- all_reduce
  // -----------------------------------------------------------------------------------------------
  // x, residual [...,D] with one row stride; weight [D]; group: a number of peer_memory.cu;
  // algorithm 0 by size, 1 one-shot, 2 two-shot; CUDA only
  m.def("peer_all_reduce(Tensor(a!) x, int group, int algorithm) -> ()");
  m.def(
      "peer_all_reduce_add_rms_norm(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps, "
      "int group, int algorithm) -> ()");
  // logits [B,N]; ids, out int64 [B]
  m.def("peer_argmax(Tensor logits, Tensor ids, int begin, int group, Tensor(a!) out) -> ()");

  // ---- what was built, what runs
  // ----------------------------------------------------------------------------------
  m.def("cpu_isa() -> str");
  m.def("build_info() -> str[]");
  // programmatic dependent launch of this thread's launches; returns the previous state
  m.def("set_programmatic_launch(bool on) -> bool");
  // out int32 [2] on a CUDA device: architecture of the code that ran for the portable and for the
  // sm_90a objects (0 = not run)
  m.def("cuda_probe(Tensor(a!) out) -> ()");
}
