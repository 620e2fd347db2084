// Tokens and hashes that live in Python lists.
#pragma once

#include <pybind11/pybind11.h>

#include "block_hash.h"

namespace fastinfer::host {

// `call` names the function in the error: ValueError when the value is not what it should be.
Hash to_hash(const char* call, pybind11::handle value);
pybind11::bytes from_hash(const Hash& hash);
int64_t token_at(const char* call, const pybind11::list& tokens, int64_t i);

// Appends the hashes of the full blocks that `hashes` does not name yet.
void extend_block_hashes(const pybind11::list& tokens, int64_t block_size, pybind11::list hashes,
                         const pybind11::bytes& salt);

}  // namespace fastinfer::host
