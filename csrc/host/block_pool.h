// Block pool of the paged KV cache: which blocks are free, who shares them, what they hold.
//
// A block is in use while its reference count is above zero. Free blocks form a doubly linked list
// over block ids, with id `num_blocks` as the sentinel, so that a cached block is taken out of the
// middle in O(1). `allocate` takes from the head. A released block that carries a content hash goes
// to the tail and keeps the hash, so cached content dies in least-recently-used order; one without
// a hash is worth nothing to anybody and goes to the head. Callers release a request's blocks last
// one first, so that the tail of a prefix is evicted before its head.
//
// Every call checks its arguments before it changes anything: after an exception the pool is as it
// was. No locking: one engine owns one pool. python/fastinfer/_host_py.py is the same thing in
// Python.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "block_hash.h"

namespace fastinfer::host {

struct OutOfBlocks : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class BlockPool {
 public:
  explicit BlockPool(int64_t num_blocks);

  int64_t num_blocks() const { return num_blocks_; }
  int64_t num_free() const { return num_free_; }
  int64_t num_used() const { return num_blocks_ - num_free_; }
  int64_t num_cached() const { return static_cast<int64_t>(block_of_.size()); }

  // Takes n free blocks with one reference each and forgets what they held; all or nothing.
  std::vector<int64_t> allocate(int64_t n);
  // Adds a reference to each block; a free block must hold cached content.
  void acquire(const std::vector<int64_t>& blocks);
  // Drops a reference from each block, in order.
  void release(const std::vector<int64_t>& blocks);

  // Says what a block in use holds. False when another block already stands for that content.
  bool register_hash(int64_t block, const Hash& hash);
  // Blocks that hold the longest cached prefix of the chain; takes no reference.
  std::vector<int64_t> match(const std::vector<Hash>& hashes, int64_t max_blocks) const;
  // Forgets all cached content; references stay.
  void clear_cache();

  int64_t ref_count(int64_t block) const;
  const Hash* hash_of(int64_t block) const;
  int64_t count_free(const std::vector<int64_t>& blocks) const;
  void check_invariants() const;

 private:
  void check_id(const char* call, int64_t block) const;
  void unlink(int64_t block);
  void link_before(int64_t next, int64_t block);
  void forget(int64_t block);

  int64_t num_blocks_;
  int64_t num_free_ = 0;
  std::vector<int64_t> ref_;
  std::vector<int64_t> prev_;  // num_blocks + 1 entries, the last one is the sentinel
  std::vector<int64_t> next_;
  std::vector<Hash> hash_;
  std::vector<char> has_hash_;
  std::unordered_map<Hash, int64_t, HashOfHash> block_of_;
};

}  // namespace fastinfer::host
