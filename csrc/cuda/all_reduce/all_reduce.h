// Launchers of the all-reduce over peer memory (all_reduce.cuh). Return a cudaError_t.
#pragma once

#include "../../cpu/dtype.h"
#include "peer_memory.h"

namespace fastinfer::cuda {

struct AllReduceParams {
  const PeerGroup* group;  // of two ranks or more, connected
  void* x;                 // rows of `dim` elements, `stride` apart; contiguous data is one row
  int64_t rows, dim, stride;
  DType dtype;
  bool two_shot;
};

// Behind the sum: residual += x, x = rms_norm(residual) * weight. All of x's dtype.
struct AddNormParams {
  void* residual;
  int64_t stride;
  const void* weight;
  float eps;
};

// Tokens from candidates of every rank (peer_argmax.cu).
struct PeerArgmaxParams {
  const PeerGroup* group;
  const void* logits;  // rows of `columns`, `stride` apart
  DType dtype;
  int64_t rows, columns, stride;
  int64_t begin;       // what column 0 is overall
  const int64_t* ids;  // a column per row
  int64_t* out;
};

int peer_argmax(const PeerArgmaxParams& p, void* stream);

// Most rows of a call.
int64_t peer_argmax_rows(const PeerGroup& group);

// Bytes of a slot region that a call needs.
int64_t all_reduce_slot_bytes(int64_t rows, int64_t dim, DType dtype);

// Can rows be summed and normalised in one launch? Otherwise all_reduce, then the norm operator.
bool all_reduce_norm_fits(const AllReduceParams& p, const AddNormParams& n);

int all_reduce(const AllReduceParams& p, void* stream);
int all_reduce_add_rms_norm(const AllReduceParams& p, const AddNormParams& n, void* stream);

}  // namespace fastinfer::cuda
