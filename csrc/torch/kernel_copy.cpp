// Copies that the driver does not give to the GPU.
#include "torch/kernel_copy.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/bitwise_or.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAGuard.h>

#include <cstdint>

namespace egm {

void copy_by_kernel(void* dst, const void* src, size_t count, DeviceIndex device,
                    cudaStream_t stream) {
  const auto index = static_cast<c10::DeviceIndex>(device);
  const c10::cuda::CUDAStreamGuard on_stream(c10::cuda::getStreamFromExternal(stream, index));
  // Neither autograd nor a mode in Python is to see it: to them it is part of the user's copy.
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard below_python(c10::python_ks);
  const auto addresses = reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src);
  const bool by_words = (addresses | count) % sizeof(int64_t) == 0;
  const auto options =
      at::TensorOptions(at::Device(at::kCUDA, index)).dtype(by_words ? at::kLong : at::kByte);
  const auto elements = static_cast<int64_t>(by_words ? count / sizeof(int64_t) : count);
  const auto tensor = [&](void* address) {
    return at::for_blob(address, {elements})
        .options(options)
        .target_device(options.device())
        .make_tensor();
  };
  at::Tensor to = tensor(dst);
  at::bitwise_or_out(to, tensor(const_cast<void*>(src)), at::Scalar(0));
}

}  // namespace egm
