// The kernels of dispatch.cuh.
#include "dispatch.cuh"

using namespace moe_comm;

extern "C" __global__ void __launch_bounds__(512)
    moe_comm_dispatch_send(const __grid_constant__ dispatch::Arguments arguments) {
  dispatch::Cta cta;
  dispatch::send(cta, arguments);
}
