// The kernels of combine.cuh, one for each dtype of the rows.
#include "combine.cuh"

using namespace moe_comm;

#define MOE_COMM_KERNEL(name, Type)                                \
  extern "C" __global__ void __launch_bounds__(256, 2)             \
      name(const __grid_constant__ combine::Arguments arguments) { \
    combine::Cta cta;                                              \
    combine::send<Type>(cta, arguments);                           \
  }

MOE_COMM_KERNEL(moe_comm_combine_send_bf16, combine::BFloat16)
MOE_COMM_KERNEL(moe_comm_combine_send_f16, combine::Float16)
MOE_COMM_KERNEL(moe_comm_combine_send_f32, combine::Itself<float>)
MOE_COMM_KERNEL(moe_comm_combine_send_f64, combine::Itself<double>)
