// See python_lists.h.
#include "python_lists.h"

#include <limits>

namespace fastinfer::host {

namespace py = pybind11;

Hash to_hash(const char* call, py::handle value) {
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (!PyBytes_Check(value.ptr()) || PyBytes_AsStringAndSize(value.ptr(), &data, &size) != 0 ||
      size != 32) {
    PyErr_Clear();
    throw py::value_error(std::string(call) + ": a hash must be bytes of length 32, got " +
                          std::string(py::repr(value)));
  }
  Hash hash;
  std::memcpy(hash.data(), data, hash.size());
  return hash;
}

py::bytes from_hash(const Hash& hash) {
  return py::bytes(reinterpret_cast<const char*>(hash.data()), hash.size());
}

int64_t token_at(const char* call, const py::list& tokens, int64_t i) {
  const int64_t token = PyLong_AsLongLong(PyList_GET_ITEM(tokens.ptr(), i));
  const bool failed = token == -1 && PyErr_Occurred();
  if (failed) PyErr_Clear();
  if (failed || token < 0 || token > std::numeric_limits<int32_t>::max()) {
    throw py::value_error(std::string(call) + ": token ids must be integers in [0, 2^31), got " +
                          std::string(py::repr(tokens[i])));
  }
  return token;
}

void extend_block_hashes(const py::list& tokens, int64_t block_size, py::list hashes,
                         const py::bytes& salt) {
  const char* call = "extend_block_hashes";
  if (block_size < 1) {
    throw py::value_error("extend_block_hashes: block_size must be at least 1, got " +
                          std::to_string(block_size));
  }
  const auto full = static_cast<int64_t>(tokens.size()) / block_size;
  auto block = static_cast<int64_t>(hashes.size());
  if (block >= full) return;
  Hash hash = block > 0 ? to_hash(call, hashes[block - 1]) : root_hash(salt);
  std::vector<int32_t> ids(block_size);
  std::vector<Hash> added;  // appended at the end, so that a bad token leaves the list alone
  for (; block < full; ++block) {
    for (int64_t i = 0; i < block_size; ++i) {
      ids[i] = static_cast<int32_t>(token_at(call, tokens, block * block_size + i));
    }
    hash = block_hash(hash, ids.data(), ids.size());
    added.push_back(hash);
  }
  for (const Hash& each : added) hashes.append(from_hash(each));
}

}  // namespace fastinfer::host
