// The operators dinov2_kernels::* that Python calls: checks, device, stream, and the plain C launchers behind them.
// The only file with torch headers, and of those only the stable ABI: built under one torch it loads in the others.

#include <dlfcn.h>

#include <climits>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

extern "C" {
int dk_attention_max_tokens(void);
int dk_attention_forward(const void* qkv, long qkv_stride, void* out, float* lse, int sequences, int tokens, int heads,
                         int dtype, float scale, int variant, void* stream);
int dk_attention_backward(const void* qkv, long qkv_stride, const void* out, const void* grad_out, const float* lse,
                          void* grad_qkv, int sequences, int tokens, int heads, int dtype, float scale, int variant,
                          void* stream);
const char* dk_error_string(int code);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWidth = 64;  // of a head

#ifdef DK_EMU  // the tests run these operators over emulated kernels, on tensors of the host
bool on_device(const Tensor& tensor) { return tensor.is_cpu(); }
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
#else
bool on_device(const Tensor& tensor) { return tensor.is_cuda(); }
using torch::stable::accelerator::DeviceGuard;
#endif

template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> expected) {
  if (tensor.dim() != static_cast<int64_t>(expected.size())) return false;
  int64_t place = 0;
  for (int64_t size : expected) {
    if (tensor.size(place++) != size) return false;
  }
  return true;
}

char* bytes(const Tensor& tensor) { return static_cast<char*>(tensor.data_ptr()); }

bool aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0; }

// A pack's common figures, from qkv.
struct Pack {
  int32_t device;
  ScalarType type;
  int64_t rows;
  int64_t heads;
  int64_t stride;  // elements from one row of qkv to the next

  int code() const { return type == ScalarType::Half ? 1 : 0; }
};

Pack check_qkv(const Tensor& qkv, const std::string& op) {
  require(on_device(qkv), op, ": found qkv outside a GPU; expected a CUDA tensor");
  const ScalarType type = qkv.scalar_type();
  require(type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": expected qkv in bfloat16 or float16");
  require(qkv.dim() == 4 && qkv.size(1) == 3 && qkv.size(3) == kWidth, op, ": found qkv of shape ", shape_of(qkv),
          "; expected [tokens, 3, heads, 64]");
  const int64_t rows = qkv.size(0), heads = qkv.size(2), row = 3 * heads * kWidth;
  require(rows == 0 || (qkv.stride(3) == 1 && (heads == 1 || qkv.stride(2) == kWidth) &&
                        qkv.stride(1) == heads * kWidth),
          op, ": expected each row of qkv [3, heads, 64] contiguous");
  const int64_t stride = rows > 1 ? qkv.stride(0) : row;
  require(stride >= row && stride % 8 == 0 && (rows == 0 || aligned(qkv)), op,
          ": expected rows of qkv at multiples of 16 bytes that do not overlap");
  return {qkv.get_device_index(), type, rows, heads, stride};
}

void check_part(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, ScalarType type,
                const Pack& pack, const std::string& op) {
  require(on_device(tensor) && tensor.get_device_index() == pack.device, op, ": expected ", name,
          " on the device of qkv");
  require(tensor.scalar_type() == type, op, ": found ", name, " in a type other than expected");
  require(has_shape(tensor, shape), op, ": found ", name, " of shape ", shape_of(tensor), ", which does not fit qkv");
  require(tensor.is_contiguous() && (pack.rows == 0 || aligned(tensor)), op, ": expected ", name,
          " contiguous and at a multiple of 16 bytes");
}

void check_groups(const std::vector<int64_t>& groups, const Pack& pack, const std::string& op) {
  require(groups.size() % 3 == 0, op, ": expected groups of samples, tokens and variant");
  int64_t total = 0;
  for (size_t i = 0; i < groups.size(); i += 3) {
    const int64_t samples = groups[i], tokens = groups[i + 1];
    require(samples >= 0 && samples <= INT_MAX / (pack.heads ? pack.heads : 1), op, ": found ", samples, " samples");
    require(tokens >= 1 && tokens <= dk_attention_max_tokens(), op, ": found samples of ", tokens,
            " tokens; expected 1 to ", dk_attention_max_tokens());
    total += samples * tokens;
  }
  require(total == pack.rows, op, ": found groups of ", total, " tokens and qkv of ", pack.rows);
}

// torch's current stream. Its getter lies in a library that a CPU build of torch does not have, hence not linked.
void* current_stream(int32_t device) {
#ifdef DK_EMU
  return nullptr;
#endif
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  require(getter != nullptr, "dinov2_kernels: this torch has no CUDA streams; install a CUDA build of torch");
  void* stream = nullptr;
  require(getter(device, &stream) == 0, "dinov2_kernels: torch has no current stream on device ", device);
  return stream;
}

void check_launch(int code, const std::string& op) { require(code == 0, op, ": ", dk_error_string(code)); }

void attention_forward(const Tensor& qkv, Tensor& out, Tensor& lse, std::vector<int64_t> groups, double scale) {
  const std::string op = "dinov2_kernels::attention_forward";
  const Pack pack = check_qkv(qkv, op);
  check_part(out, "out", {pack.rows, pack.heads * kWidth}, pack.type, pack, op);
  check_part(lse, "lse", {pack.rows, pack.heads}, ScalarType::Float, pack, op);
  check_groups(groups, pack, op);
  const DeviceGuard guard(pack.device);
  void* stream = current_stream(pack.device);
  int64_t row = 0;
  for (size_t i = 0; i < groups.size(); i += 3) {
    check_launch(dk_attention_forward(bytes(qkv) + row * pack.stride * 2, pack.stride,
                                      bytes(out) + row * pack.heads * kWidth * 2,
                                      static_cast<float*>(lse.data_ptr()) + row * pack.heads,
                                      static_cast<int>(groups[i]), static_cast<int>(groups[i + 1]),
                                      static_cast<int>(pack.heads), pack.code(), static_cast<float>(scale),
                                      static_cast<int>(groups[i + 2]), stream),
                 op);
    row += groups[i] * groups[i + 1];
  }
}

void attention_backward(const Tensor& qkv, const Tensor& out, const Tensor& grad_out, const Tensor& lse,
                        Tensor& grad_qkv, std::vector<int64_t> groups, double scale) {
  const std::string op = "dinov2_kernels::attention_backward";
  const Pack pack = check_qkv(qkv, op);
  const int64_t width = pack.heads * kWidth;
  check_part(out, "out", {pack.rows, width}, pack.type, pack, op);
  check_part(grad_out, "grad_out", {pack.rows, width}, pack.type, pack, op);
  check_part(lse, "lse", {pack.rows, pack.heads}, ScalarType::Float, pack, op);
  check_part(grad_qkv, "grad_qkv", {pack.rows, 3, pack.heads, kWidth}, pack.type, pack, op);
  check_groups(groups, pack, op);
  const DeviceGuard guard(pack.device);
  void* stream = current_stream(pack.device);
  int64_t row = 0;
  for (size_t i = 0; i < groups.size(); i += 3) {
    check_launch(dk_attention_backward(bytes(qkv) + row * pack.stride * 2, pack.stride, bytes(out) + row * width * 2,
                                       bytes(grad_out) + row * width * 2,
                                       static_cast<const float*>(lse.data_ptr()) + row * pack.heads,
                                       bytes(grad_qkv) + row * 3 * width * 2, static_cast<int>(groups[i]),
                                       static_cast<int>(groups[i + 1]), static_cast<int>(pack.heads), pack.code(),
                                       static_cast<float>(scale), static_cast<int>(groups[i + 2]), stream),
                 op);
    row += groups[i] * groups[i + 1];
  }
}

}  // namespace

// groups: samples, tokens of a sample and variant of the kernel, in turn.
STABLE_TORCH_LIBRARY(dinov2_kernels, m) {
  m.def("attention_forward(Tensor qkv, Tensor(a!) out, Tensor(b!) lse, int[] groups, float scale) -> ()");
  m.def(
      "attention_backward(Tensor qkv, Tensor out, Tensor grad_out, Tensor lse, Tensor(a!) grad_qkv, int[] groups, "
      "float scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dinov2_kernels, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

// On a CPU the checks end each call in one clear line, where the dispatcher alone would print a page.
STABLE_TORCH_LIBRARY_IMPL(dinov2_kernels, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
