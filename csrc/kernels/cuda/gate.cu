#include "kernels/cuda/gate.h"

#include "kernels/cuda/cuda_block.h"
#include "kernels/cuda/cuda_launch.h"
#include "kernels/cuda/gate_body.h"

namespace moe_efa::kernels::cuda {

namespace {

__global__ void __launch_bounds__(kGateThreads, 1) gate_kernel(const __grid_constant__ GateArgs args) {
  __shared__ Tickets shared;
  CudaBlock block;
  gate_body(block, args, shared);
}

}  // namespace

const void* gate_kernel_entry() { return reinterpret_cast<const void*>(gate_kernel); }

void launch_gate(const GateArgs& args, void* stream) { launch_grid(gate_kernel, 1, kGateThreads, stream, args); }

}  // namespace moe_efa::kernels::cuda
