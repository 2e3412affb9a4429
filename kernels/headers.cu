// The kernels of headers.cuh and relay.cuh.
#include "relay.cuh"

using namespace moe_comm;

#define MOE_COMM_KERNEL(name, Arguments, function)                 \
  extern "C" __global__ void __launch_bounds__(128)                \
      name(const __grid_constant__ headers::Arguments arguments) { \
    dispatch::Cta cta;                                             \
    headers::function(cta, arguments);                             \
  }

MOE_COMM_KERNEL(moe_comm_begin, Begin, begin)
MOE_COMM_KERNEL(moe_comm_leave_out, LeaveOut, leave_out)
MOE_COMM_KERNEL(moe_comm_write_headers, Write, write)
MOE_COMM_KERNEL(moe_comm_check_headers, Check, check)
MOE_COMM_KERNEL(moe_comm_collect, Collect, collect)

extern "C" __global__ void __launch_bounds__(128)
    moe_comm_pass_on(const __grid_constant__ relay::Arguments arguments) {
  dispatch::Cta cta;
  relay::pass_on(cta, arguments);
}
