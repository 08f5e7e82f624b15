#pragma once

// Runs an op on GPU 0 and on the CPU from the same values, and compares by the rule of the house:
//   max |got - f64| <= 2 max |naive - f64| + atol
//
//   ExpectOnGpu<BFloat16>([&](auto& run) -> Outputs {
//     const TensorRef x = run.In({n}, values), y = run.Out({n});      // NaN before, guards around
//     ANNULUS_CHECK_OK(SomeOp(run.ctx, x, y));
//     return {run.Rounded(y)};
//   });
//
// f64 is the op on the CPU in double. Naive is, in f32, the op on the CPU in float; in bf16 what is rounded
// to bf16 comes from f64 by one rounding, and what is summed in f32 from the CPU in float.

#include <memory>

#include "annulus/device/transfer.h"
#include "ops/harness.h"

namespace annulus::testing {

inline constexpr Device kGpu = {DeviceKind::kCuda, 0};

inline double ToDouble(float x) { return x; }
inline double ToDouble(double x) { return x; }
inline double ToDouble(BFloat16 x) { return ToFloat(x); }
template <typename T>
T FromDouble(double x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return ToBFloat16(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}
// The values that T holds exactly.
template <typename T>
std::vector<double> Rounded(std::vector<double> values) {
  for (double& x : values) x = ToDouble(FromDouble<T>(x));
  return values;
}
template <typename T>
std::vector<double> Normal(int64_t n, absl::string_view stream, double scale = 1) {
  return Rounded<T>(NormalValues<double>(n, stream, scale));
}

// Elements on a device between guards of NaN, which are compared whenever the elements are read. `shift`
// elements past an address that is aligned to 256 bytes.
class GuardedTensor {
 public:
  GuardedTensor(Context& ctx, DType dtype, const Shape& shape, int64_t shift)
      : ctx_(ctx),
        begin_(kGuardBytes + shift * SizeOf(dtype)),
        image_(static_cast<size_t>(begin_ + shape.elements() * SizeOf(dtype) + kGuardBytes), kPoison),
        memory_(ctx.device, static_cast<int64_t>(image_.size())),
        ref_(static_cast<char*>(memory_.data()) + begin_, dtype, ctx.device, shape) {
    Send();
  }
  const TensorRef& ref() const { return ref_; }
  // T is the tensor's dtype.
  template <typename T>
  void Write(const std::vector<T>& values) {
    Check(DTypeOf<T>());
    ANNULUS_CHECK(static_cast<int64_t>(values.size()) == ref_.elements()) << ToString(ref_.shape());
    std::memcpy(image_.data() + begin_, values.data(), static_cast<size_t>(ref_.bytes()));
    Send();
  }
  template <typename T>
  std::vector<T> Read() {
    Check(DTypeOf<T>());
    std::vector<T> values(static_cast<size_t>(ref_.elements()));
    std::vector<char> now(image_.size());
    Download(ctx_, All(), now.data());
    const auto begin = static_cast<size_t>(begin_), end = begin + static_cast<size_t>(ref_.bytes());
    EXPECT_TRUE(std::equal(now.begin(), now.begin() + begin_, image_.begin())) << "written before the tensor";
    EXPECT_EQ(std::memcmp(now.data() + end, image_.data() + end, now.size() - end), 0)
        << "written past the tensor";
    std::memcpy(values.data(), now.data() + begin, end - begin);
    return values;
  }

 private:
  static constexpr int64_t kGuardBytes = 512;
  static constexpr char kPoison = static_cast<char>(0xff);  // NaN in every floating dtype
  void Check(DType dtype) const { ANNULUS_CHECK(ref_.dtype() == dtype) << Name(ref_.dtype()); }
  TensorRef All() { return {memory_.data(), DType::kU8, ctx_.device, {static_cast<int64_t>(image_.size())}}; }
  void Send() { Upload(ctx_, image_.data(), static_cast<int64_t>(image_.size()), All()); }

  Context& ctx_;
  int64_t begin_;
  std::vector<char> image_;
  Buffer memory_;
  TensorRef ref_;
};

// What an op gave: in the compute dtype, or in the accumulator dtype. `norm` bounds what is summed into an
// element; left out, it is the largest element.
struct Output {
  std::vector<double> values;
  enum class In { kCompute, kAccumulator } in = In::kCompute;
  double norm = 0;
};
using Outputs = std::vector<Output>;

// The tensors of one run of an op whose compute dtype is T.
template <typename T>
class OpRun {
 public:
  using Compute = T;
  using Accum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  explicit OpRun(Device device, int64_t shift = 0) : ctx(device), shift_(shift) {}

  template <typename U>
  TensorRef Of(const Shape& shape, const std::vector<U>& values) {
    tensors_.push_back(std::make_unique<GuardedTensor>(ctx, DTypeOf<U>(), shape, shift_));
    tensors_.back()->Write(values);
    return tensors_.back()->ref();
  }
  TensorRef In(const Shape& shape, const std::vector<double>& values) {
    return Of<T>(shape, Converted<T>(values));
  }
  TensorRef InAccum(const Shape& shape, const std::vector<double>& values) {
    return Of<Accum>(shape, Converted<Accum>(values));
  }
  TensorRef Scalar(double value) { return Of<double>({1}, {value}); }
  TensorRef Out(const Shape& shape) {
    tensors_.push_back(std::make_unique<GuardedTensor>(ctx, DTypeOf<T>(), shape, shift_));
    return tensors_.back()->ref();
  }

  template <typename U>
  std::vector<U> Read(const TensorRef& ref) {
    for (const auto& tensor : tensors_) {
      if (tensor->ref().raw() == ref.raw()) return tensor->template Read<U>();
    }
    ANNULUS_CHECK(false) << "a tensor of another run";
    return {};
  }
  Output Rounded(const TensorRef& ref, double norm = 0) {
    return {Doubles(Read<T>(ref)), Output::In::kCompute, norm};
  }
  Output Summed(const TensorRef& ref, double norm = 0) {
    return {Doubles(Read<Accum>(ref)), Output::In::kAccumulator, norm};
  }
  Output SummedInDouble(const TensorRef& ref, double norm = 0) {
    return {Read<double>(ref), Output::In::kAccumulator, norm};
  }

  Context ctx;

 private:
  template <typename U>
  static std::vector<U> Converted(const std::vector<double>& values) {
    std::vector<U> converted;
    for (const double x : values) converted.push_back(FromDouble<U>(x));
    return converted;
  }
  template <typename U>
  static std::vector<double> Doubles(const std::vector<U>& values) {
    std::vector<double> doubles;
    for (const U x : values) doubles.push_back(ToDouble(x));
    return doubles;
  }

  int64_t shift_;
  std::vector<std::unique_ptr<GuardedTensor>> tensors_;
};

// The rule. Sums are in f32 whatever the dtype, so atol is four f32 epsilons of `norm`: a naive result may by
// luck be exact.
inline void ExpectWithinRule(const std::vector<double>& got, const std::vector<double>& naive,
                             const std::vector<double>& wide, double norm) {
  ASSERT_EQ(got.size(), wide.size());
  ASSERT_EQ(naive.size(), wide.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(std::isnan(got[i]), std::isnan(wide[i])) << "at " << i << ": " << got[i] << ", " << wide[i];
    if (std::isinf(naive[i]) || std::isinf(got[i])) {
      ASSERT_EQ(got[i], naive[i]) << "at " << i;
    }
  }
  const double atol =
      4 * static_cast<double>(std::numeric_limits<float>::epsilon()) * std::max(norm, MaxAbs(wide));
  EXPECT_LE(MaxDifference(got, wide), 2 * MaxDifference(naive, wide) + atol);
}

// What the head of this file calls naive.
template <typename T, typename Fn>
Outputs NaiveOf(Fn&& fn) {
  OpRun<float> in_float(Device{});
  Outputs naive = fn(in_float);
  if constexpr (std::is_same_v<T, BFloat16>) {
    OpRun<double> in_double(Device{});
    const Outputs wide = fn(in_double);
    for (size_t i = 0; i < wide.size(); ++i) {
      if (wide[i].in == Output::In::kCompute) naive[i].values = Rounded<T>(wide[i].values);
    }
  }
  return naive;
}

// At aligned addresses and one element off.
template <typename T, typename Fn>
void ExpectOnGpu(Fn&& fn, const Outputs& naive) {
  OpRun<double> in_double(Device{});
  const Outputs wide = fn(in_double);
  for (const int64_t shift : {0, 1}) {
    OpRun<T> gpu(kGpu, shift);
    const Outputs got = fn(gpu);
    for (size_t i = 0; i < wide.size(); ++i) {
      SCOPED_TRACE(absl::StrCat("output ", i, " in ", Name(DTypeOf<T>()), ", ", shift, " off alignment"));
      ExpectWithinRule(got[i].values, naive[i].values, wide[i].values, wide[i].norm);
    }
  }
}
template <typename T, typename Fn>
void ExpectOnGpu(Fn&& fn) {
  ExpectOnGpu<T>(fn, NaiveOf<T>(fn));
}

// The outputs of two runs on the GPU are the same, bit by bit.
template <typename T, typename Fn>
void ExpectSameBitsTwice(Fn&& fn) {
  OpRun<T> first(kGpu), second(kGpu);
  const Outputs a = fn(first), b = fn(second);
  for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(SameBits(a[i].values, b[i].values)) << "output " << i;
}

}  // namespace annulus::testing
