// The CUDA kernels for a caller of C: one rank's world, of which the caller gives the memory. bench/gpu/cuda_kernels.py
// is the other half; the structs below stand there too, and shim_sizes() lets it check that.
#pragma once

#include <cstdint>

extern "C" {

struct ShimShape {
  std::uint32_t num_nodes, node_size, experts_per_rank, top_k, hidden_size, num_tokens;
  std::uint32_t chunk_rows, num_nics;
  std::uint32_t wire_dtype;     // proto::DType, of dispatch
  std::uint32_t out_dtype;      // of pull: bf16, or FP8 to hand rows through
  std::uint32_t combine_dtype;  // of combine; y and out are bf16
  std::uint32_t expert_alignment;
};

// What follows from the routing.
struct ShimFacts {
  std::uint64_t device_bytes, host_bytes;  // that shim_place() wants
  std::uint64_t rows;                      // sent, to all nodes: distinct (token, node)
  std::uint64_t remote_rows;               // of these, to other nodes
  std::uint64_t entries;                   // selections sent
  std::uint64_t chunks;
  std::uint64_t chunk_bytes;   // of all chunks, headers and metadata included
  std::uint64_t remote_bytes;  // of those to other nodes: what goes over the wire
  std::uint64_t tokens;        // that selected something
  std::uint64_t output_rows;   // of pull, padding included; 0 where there are several nodes
};

// Device pointers, except that x_host is the same rows for the check.
struct ShimTensors {
  const void* x;                 // [num_tokens, hidden_size] bf16
  const std::int64_t* topk_idx;  // [num_tokens, top_k]
  const float* topk_weights;     // likewise
  void* rows;                    // [output_rows, hidden_size] in out_dtype
  float* row_weights;            // [output_rows]
  float* row_scales;             // [output_rows, ceil(hidden_size / 128)]
  const void* y;                 // [output_rows, hidden_size] bf16
  void* out;                     // [num_tokens, hidden_size] bf16
};

enum ShimOp : std::uint32_t { kShimPlan, kShimPack, kShimPull, kShimCombine };

#define MOE_EFA_SHIM __attribute__((visibility("default")))

// All but shim_error(), shim_create() and shim_destroy() return 0, or 1 with a text in shim_error().
MOE_EFA_SHIM const char* shim_error();
MOE_EFA_SHIM int shim_sizes(std::uint64_t* shape, std::uint64_t* facts, std::uint64_t* tensors);
// null on an error. topk_idx and topk_weights are in host memory here.
MOE_EFA_SHIM void* shim_create(const ShimShape* shape, const std::int64_t* topk_idx, const float* topk_weights,
                               ShimFacts* facts);
MOE_EFA_SHIM void shim_destroy(void* world);
MOE_EFA_SHIM int shim_place(void* world, void* device, void* host, const ShimTensors* tensors);
// Makes everything as it is before a launch: flags of what is to be written are as if nothing had been.
MOE_EFA_SHIM int shim_prepare(void* world, std::uint32_t op, void* stream);
// blocks: of pack, of pull, of combine's forward; more: of combine's reduce.
MOE_EFA_SHIM int shim_launch(void* world, std::uint32_t op, std::uint32_t blocks, std::uint32_t more, void* stream);
// Waits for the stream; 1 where a kernel reported a fault.
MOE_EFA_SHIM int shim_finish(void* world, void* stream);
// Compares with the CPU kernels, bit by bit, after a launch of plan or pack.
MOE_EFA_SHIM int shim_check(void* world, std::uint32_t op, const void* x_host);
// host: 384 bytes of mapped host memory. Microseconds from the GPU to the CPU and back, mean of the rounds.
MOE_EFA_SHIM int shim_flag_latency(void* host, std::uint64_t rounds, void* stream, double* round_trip_us);
// A pause of the stream.
MOE_EFA_SHIM int shim_pause(std::uint64_t nanoseconds, void* stream);

}  // extern "C"
