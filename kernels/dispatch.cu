// The kernels of dispatch.cuh and receive.cuh.
#include "receive.cuh"

using namespace moe_comm;

// Two blocks on an SM, as the launcher has it: else registers spill on sm_100a.
extern "C" __global__ void __launch_bounds__(512, 2)
    moe_comm_dispatch_send(const __grid_constant__ dispatch::Arguments arguments) {
  dispatch::Cta cta;
  dispatch::send(cta, arguments);
}

extern "C" __global__ void __launch_bounds__(512)
    moe_comm_dispatch_forward(const __grid_constant__ receive::Forward arguments) {
  dispatch::Cta cta;
  receive::forward(cta, arguments);
}

extern "C" __global__ void __launch_bounds__(512)
    moe_comm_dispatch_unpack(const __grid_constant__ receive::Unpack arguments) {
  dispatch::Cta cta;
  receive::unpack(cta, arguments);
}
