#pragma once

// One implementation of block attention on one case: forward over chunks of keys in any order, backward from
// the exact statistics.

#include <functional>
#include <numeric>

#include "cuda/attention_mma/cases.h"
#include "cuda/attention_mma/comparison.h"

namespace annulus::testing {

template <typename T>
struct Implementation {
  using Block = kernels::CudaAttentionBlock<T>;
  using Gradients = kernels::CudaAttentionGradients<T>;
  struct Backward {
    const char* name;
    int runs;  // of which all give the same bits
    cudaError_t (*launch)(const Block& block, const Gradients& gradients);
  };

  const char* name;
  // Null: only backwards.
  cudaError_t (*forward)(const Block& block, const kernels::CudaAttentionPartial<T>& partial,
                         cudaStream_t stream);
  std::vector<Backward> backwards;
};

template <typename T>
class BlockCheck {
 public:
  BlockCheck(const Implementation<T>& implementation, Prepared& prepared)
      : implementation_(implementation),
        prepared_(prepared),
        c_(prepared.c),
        q_(c_.q_rows, c_.batch, c_.heads * c_.dim, c_.far),
        k_(c_.k_rows, c_.batch, c_.kv_heads * c_.dim, c_.far),
        v_(c_.k_rows, c_.batch, c_.kv_heads * c_.v_dim, c_.far),
        dout_(c_.q_rows, c_.batch, c_.heads * c_.v_dim, c_.far),
        lo_(prepared.lo),
        hi_(prepared.hi),
        order_(Size(c_.chunks)) {
    const Problem& p = prepared.p;
    q_.Upload(Convert<T>(p.q));
    UploadKeys();
    dout_.Upload(Convert<T>(p.dout));
    std::iota(order_.begin(), order_.end(), 0);
    std::shuffle(order_.begin(), order_.end(), prepared.rng);
  }

  bool Run() {
    if (implementation_.forward != nullptr) Forward();
    for (const auto& backward : implementation_.backwards) Backward(backward);
    comparison_.Require(intact_, "guards");
    std::printf("%s %s %3ld/%-3ld %-24s%s\n", comparison_.ok ? "ok  " : "FAIL", implementation_.name,
                long(c_.dim), long(c_.v_dim), c_.name, comparison_.text.c_str());
    return comparison_.ok;
  }

 private:
  // Keys that no query sees are NaN on the device.
  void UploadKeys() {
    const Problem& p = prepared_.p;
    int64_t begin = c_.k_rows, end = 0;
    for (size_t i = 0; i < p.lo.size(); ++i) {
      if (p.lo[i] >= p.hi[i]) continue;
      begin = std::min(begin, p.lo[i]);
      end = std::max(end, p.hi[i]);
    }
    std::vector<double> k = p.k, v = p.v;
    for (int64_t j = 0; j < c_.k_rows; ++j) {
      if (begin <= j && j < end) continue;
      const int64_t row = c_.batch * c_.kv_heads;
      std::fill_n(k.begin() + j * row * c_.dim, row * c_.dim, NAN);
      std::fill_n(v.begin() + j * row * c_.v_dim, row * c_.v_dim, NAN);
    }
    k_.Upload(Convert<T>(k));
    v_.Upload(Convert<T>(v));
  }

  kernels::CudaAttentionBlock<T> BlockOf(int chunk) const {
    const int64_t rows = (c_.k_rows + c_.chunks - 1) / c_.chunks;
    const int64_t first = c_.striped ? chunk : std::min(c_.k_rows, chunk * rows),
                  step = c_.striped ? c_.chunks : 1;
    kernels::CudaAttentionBlock<T> block = BlockOfCase<T>(prepared_, lo_.data, hi_.data);
    block.q = q_.template Heads<const T>();
    block.k = k_.template Heads<const T>(first, step);
    block.v = v_.template Heads<const T>(first, step);
    block.k_rows =
        c_.striped ? (c_.k_rows - chunk + c_.chunks - 1) / c_.chunks : std::min(rows, c_.k_rows - first);
    block.key_offset = first;
    block.key_stride = step;
    return block;
  }

  // The carry before: nothing yet for rows that will see keys, with outputs poisoned; for two in three rows
  // that see none, values that must survive.
  void MakeCarry(std::vector<float>* out, std::vector<float>* lse) {
    const Solution& exact = prepared_.exact;
    out->resize(exact.out.size());
    lse->resize(exact.lse.size());
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < lse->size(); ++i) {
      const bool carry = std::isinf(exact.lse[i]) && i % 3 != 0;
      (*lse)[i] = carry ? normal(prepared_.rng) : -INFINITY;
      for (size_t d = 0; d < Size(c_.v_dim); ++d) {
        (*out)[i * Size(c_.v_dim) + d] = carry ? normal(prepared_.rng) : NAN;
      }
    }
  }

  void Forward() {
    std::vector<float> out0, lse0;
    MakeCarry(&out0, &lse0);
    StridedHeads<float> out(c_.q_rows, c_.batch, c_.heads * c_.v_dim, c_.far);
    StridedHeads<T> result(c_.q_rows, c_.batch, c_.heads * c_.v_dim, c_.far);
    out.Upload(out0);
    result.Upload(std::vector<T>(out0.size(), FromDouble<T>(NAN)));
    const GuardedArray<float> lse(lse0);
    for (int i = 0; i < c_.chunks; ++i) {
      kernels::CudaAttentionPartial<T> partial{out.template Heads<float>(), lse.data(), {}};
      if (i == c_.chunks - 1) partial.result = result.template Heads<T>();
      CUDA(implementation_.forward(BlockOf(order_[Size(i)]), partial, nullptr));
    }
    CUDA(cudaDeviceSynchronize());
    const std::vector<float> out1 = out.Download(&intact_), lse1 = lse.Download(&intact_);
    CheckForward(out0, lse0, out1, lse1, result.Download(&intact_));

    // A block behind every row's range.
    kernels::CudaAttentionBlock<T> masked = BlockOf(0);
    masked.key_offset += 1 << 20;
    CUDA(implementation_.forward(masked, {out.template Heads<float>(), lse.data(), {}}, nullptr));
    CUDA(cudaDeviceSynchronize());
    comparison_.Require(SameBits(out.Download(&intact_), out1) && SameBits(lse.Download(&intact_), lse1),
                        "bits after a masked block");
  }

  static bool SameBits(const std::vector<float>& x, const std::vector<float>& y) {
    return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
  }

  void CheckForward(const std::vector<float>& out0, const std::vector<float>& lse0, std::vector<float> out1,
                    std::vector<float> lse1, const std::vector<T>& result) {
    const Solution &exact = prepared_.exact, &naive = prepared_.naive;
    bool kept = true, rounded = true;
    for (size_t i = 0; i < lse1.size(); ++i) {
      const size_t at = i * Size(c_.v_dim);
      const bool empty = std::isinf(exact.lse[i]);
      if (empty) {
        kept = kept && std::memcmp(&lse0[i], &lse1[i], 4) == 0 &&
               std::memcmp(&out0[at], &out1[at], Size(c_.v_dim) * 4) == 0;
      }
      for (size_t d = at; d < at + Size(c_.v_dim); ++d) {
        const bool nothing = empty && lse0[i] == -INFINITY;
        // Normalised twice, f32 and T see the same value.
        rounded = rounded && ToDouble(result[d]) == (nothing ? 0 : RoundTo<T>(out1[d]));
        if (empty) out1[d] = 0;
      }
      if (empty) lse1[i] = -INFINITY;
    }
    comparison_.Require(kept, "bits of empty rows");
    comparison_.Require(rounded, "rounded result");
    comparison_.Compare("O", Doubles(out1), exact.out, naive.out);
    comparison_.Compare("LSE", Doubles(lse1), exact.lse, naive.lse);
  }

  void Backward(const typename Implementation<T>::Backward& backward) {
    comparison_.text += std::string("\n    ") + backward.name + ":";
    const Solution &exact = prepared_.exact, &naive = prepared_.naive;
    const std::vector<double>* wants[] = {&exact.dq, &exact.dk, &exact.dv};
    const std::vector<double>* naives[] = {&naive.dq, &naive.dk, &naive.dv};
    const char* names[] = {"dQ", "dK", "dV"};
    std::vector<float> first[3];
    for (int run = 0; run < backward.runs; ++run) {
      std::vector<float> got[3];
      RunBackward(backward, got);
      for (int g = 0; g < 3; ++g) {
        if (run > 0) {
          comparison_.Require(SameBits(got[g], first[g]), "same bits again");
          continue;
        }
        first[g] = got[g];
        std::vector<double> added = Doubles(got[g]);
        for (size_t i = 0; i < added.size(); ++i) added[i] -= Before(i);
        comparison_.Compare(names[g], added, *wants[g], *naives[g]);
      }
    }
  }

  // What gradients hold before: they are added to, not set.
  static float Before(size_t i) { return static_cast<float>(i % 7) - 3; }

  void RunBackward(const typename Implementation<T>::Backward& backward, std::vector<float> (&got)[3]) {
    const Solution& exact = prepared_.exact;
    std::vector<float> exact_delta = Convert<float>(exact.delta);
    for (size_t i = 0; i < exact_delta.size(); ++i) {
      if (std::isinf(exact.lse[i])) exact_delta[i] = NAN;
    }
    const GuardedArray<float> lse(Convert<float>(exact.lse)), delta(exact_delta);
    StridedHeads<float> dq(c_.q_rows, c_.batch, c_.heads * c_.dim, c_.far),
        dk(c_.k_rows, c_.batch, c_.kv_heads * c_.dim, c_.far),
        dv(c_.k_rows, c_.batch, c_.kv_heads * c_.v_dim, c_.far);
    StridedHeads<float>* gradients[] = {&dq, &dk, &dv};
    const size_t sizes[] = {exact.dq.size(), exact.dk.size(), exact.dv.size()};
    for (int g = 0; g < 3; ++g) {
      std::vector<float> before(sizes[g]);
      for (size_t i = 0; i < before.size(); ++i) before[i] = Before(i);
      gradients[g]->Upload(before);
    }
    for (const int chunk : order_) {
      const kernels::CudaAttentionBlock<T> block = BlockOf(chunk);
      CUDA(backward.launch(block, {dout_.template Heads<const T>(), lse.data(), delta.data(),
                                   dq.Heads<float>(), dk.Heads<float>(block.key_offset, block.key_stride),
                                   dv.Heads<float>(block.key_offset, block.key_stride)}));
      CUDA(cudaDeviceSynchronize());
    }
    for (int g = 0; g < 3; ++g) got[g] = gradients[g]->Download(&intact_);
  }

  const Implementation<T>& implementation_;
  Prepared& prepared_;
  const Case& c_;
  StridedHeads<T> q_, k_, v_, dout_;
  DeviceArray<int64_t> lo_, hi_;
  std::vector<int> order_;  // of the chunks
  bool intact_ = true;      // no guard written yet
  Comparison comparison_;
};

}  // namespace annulus::testing
