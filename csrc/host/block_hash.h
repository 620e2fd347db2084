// Content hash of a chain of KV blocks.
//
//   h_i = SHA-256(h_{i-1} || tokens of block i as little-endian int32),   h_{-1} = SHA-256(salt)
//
// The hash of a block therefore names the block's tokens and everything before them. SHA-256 (FIPS
// 180-4) because a collision would hand one request another one's context: with it nobody has to
// keep and compare token ids, and nobody can craft a collision. Two to three 64-byte rounds for a
// block of 16 tokens, well under a microsecond, once per block and request.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace fastinfer::host {

using Hash = std::array<uint8_t, 32>;

struct HashOfHash {
  size_t operator()(const Hash& hash) const {
    size_t word;  // the bytes of a SHA-256 are uniform: any eight of them are a hash
    std::memcpy(&word, hash.data(), sizeof(word));
    return word;
  }
};

Hash sha256(const uint8_t* data, size_t size);

Hash root_hash(const std::string& salt);

// Hash of one block of `count` tokens behind `parent`.
Hash block_hash(const Hash& parent, const int32_t* tokens, size_t count);

}  // namespace fastinfer::host
