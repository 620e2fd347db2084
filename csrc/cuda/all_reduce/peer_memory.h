// Memory of one rank of an all-reduce that the other ranks write to: what csrc/ops and the kernels
// know of it. Made and connected by peer_memory.cu, which Python calls through ctypes
// (python/fastinfer/distributed/all_reduce.py).
//
// A rank's buffer, zeroed but for its slots:
//
//   PeerHeader                                        kPeerHeaderBytes
//   2 halves, used in turn by the calls of the group, each of
//     one region per rank      what that rank pushed     slot_bytes, a pack of 16 bytes per unit
//     one region more          sums (two-shot)           slot_bytes
//
// An empty slot holds kEmptyWord in every word; who reads a pack empties it again.
#pragma once

#include <cstdint>

namespace fastinfer::cuda {

constexpr int kMaxRanks = 8;
constexpr int64_t kPeerHeaderBytes = 4096;

struct PeerHeader {
  uint32_t half;     // that the next call uses
  uint32_t dead;     // 1: a rank did not answer in time; nobody waits any more
  uint32_t arrived;  // blocks of the running call that have read `half`
};

struct PeerGroup {
  int device, rank, world;
  bool connected;
  int64_t slot_bytes;
  uint64_t limit_ns;       // of one wait
  char* ranks[kMaxRanks];  // every rank's buffer as this process sees it
  bool mapped[kMaxRanks];  // through cudaIpcOpenMemHandle
  int* failed;             // pinned, written by the GPU, or by the host to end what waits
};

// nullptr: no group of that number is open.
PeerGroup* peer_group(int64_t id);

}  // namespace fastinfer::cuda
