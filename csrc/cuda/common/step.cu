// What the engine asks of the driver for a captured decode step, in one call without torch's
// dispatcher: between steps the caches have been used by others, and every layer of software costs
// its cache misses. Called through ctypes by python/fastinfer/engine/replay.py, which has the same
// struct.
//
//   host columns -> device, block tables -> rows of the device's tables (where they have changed),
//   the graph, tokens -> host, an event
#include <cuda_runtime.h>

#include <cstdint>

extern "C" {

struct FastinferStep {
  void* columns;  // on the device
  const void* host_columns;
  int64_t column_bytes;
  void* tables;  // on the device, rows `table_pitch` bytes apart
  int64_t table_pitch;
  const void* host_tables;  // rows of the width sent, one after the other
  const void* drawn;        // on the device: int64 tokens
  void* tokens;             // on the host
  void* done;               // cudaEvent_t
};

// `width` block ids of each of `count` requests are sent, none when 0. Host memory is page-locked.
// Returns a CUDA error code.
__attribute__((visibility("default"))) int fastinfer_step(const FastinferStep* step, void* graph,
                                                          void* stream, int64_t count,
                                                          int64_t width) {
  const auto s = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaMemcpyAsync(step->columns, step->host_columns, step->column_bytes,
                                      cudaMemcpyHostToDevice, s);
  const auto row = static_cast<size_t>(width) * sizeof(int32_t);
  if (error == cudaSuccess && row > 0)
    error = cudaMemcpy2DAsync(step->tables, step->table_pitch, step->host_tables, row, row, count,
                              cudaMemcpyHostToDevice, s);
  if (error == cudaSuccess) error = cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), s);
  if (error == cudaSuccess)
    error = cudaMemcpyAsync(step->tokens, step->drawn, count * sizeof(int64_t),
                            cudaMemcpyDeviceToHost, s);
  if (error == cudaSuccess) error = cudaEventRecord(static_cast<cudaEvent_t>(step->done), s);
  return error;
}

}  // extern "C"
