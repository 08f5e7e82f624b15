#include "cuda/attention_hopper/op_cases.h"

#include <cmath>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "annulus/base/check.h"
#include "annulus/device/transfer.h"
#include "annulus/ops/elementwise.h"

namespace annulus::testing {
namespace {

// Evenly in its logarithm, and now and then beside a multiple of what tiles have.
int64_t RandomRows(std::mt19937& rng) {
  constexpr int64_t kMost = 2048;
  if (rng() % 6 == 0)
    return std::clamp(64 * static_cast<int64_t>(rng() % 24) + static_cast<int64_t>(rng() % 3) - 1, int64_t{1},
                      kMost);
  return static_cast<int64_t>(std::exp2(std::uniform_real_distribution<double>(0, 11)(rng)));
}

struct Rows {
  int64_t lo, hi;
};

// In key rows, not yet within [0, k_rows].
std::vector<Rows> RandomBounds(const OpCase& c, std::mt19937& rng) {
  std::vector<Rows> bounds(Size(c.q_rows * c.batch));
  for (int64_t item = 0; item < c.batch; ++item) {
    std::vector<int64_t> start(Size(c.k_rows), 0);
    for (int64_t j = 1; j < c.k_rows; ++j)
      start[Size(j)] = rng() % Size(c.extent) == 0 ? j : start[Size(j - 1)];
    for (int64_t i = 0; i < c.q_rows; ++i) {
      Rows& rows = bounds[Size(i * c.batch + item)] = {0, c.k_rows};
      const int64_t end = c.k_rows - c.q_rows + i;  // the key at this query's position
      switch (c.mask) {
        case OpMask::kFull:
          break;
        case OpMask::kCausal:
        case OpMask::kCausalEnd:
          rows.hi = end + 1;
          break;
        case OpMask::kWindow:
          rows = {end + 1 - c.extent, end + 1};
          break;
        case OpMask::kDocuments:
          rows = {end < 0 ? 0 : start[Size(end)], end + 1};
          break;
        case OpMask::kRandom:
          rows.lo = static_cast<int64_t>(rng() % Size(c.k_rows + 20)) - 10;
          rows.hi = rows.lo + static_cast<int64_t>(rng() % 4 == 0 ? 0 : rng() % Size(c.extent + 1));
          break;
        case OpMask::kEmpty:
          rows.hi = 0;
          break;
      }
    }
  }
  return bounds;
}

void Ok(const absl::Status& status) { ANNULUS_CHECK(status.ok()) << status; }

}  // namespace

std::string OpCase::text() const {
  return absl::StrCat(dim, "/", v_dim, " ", q_rows, " x ", k_rows, ", batch ", batch, ", heads ", heads, "/",
                      kv_heads, ", ", kOpMaskNames[static_cast<size_t>(mask)], " ", extent, ", keys at ",
                      positions.offset, " + ", positions.stride, " j, ", chunks, " chunks, seed ", seed);
}

OpCase RandomOpCase(std::mt19937& rng) {
  constexpr std::pair<int64_t, int64_t> kDims[] = {{64, 64}, {128, 128}, {192, 128}};
  constexpr int64_t kMostPairs = int64_t{1} << 23;  // of all heads
  const auto draw = [&](int64_t below) { return static_cast<int64_t>(rng() % Size(below)); };
  OpCase c{.batch = 1 + draw(3), .seed = static_cast<uint32_t>(rng())};
  std::tie(c.dim, c.v_dim) = kDims[draw(3)];
  c.mask = draw(25) == 0 ? OpMask::kEmpty : static_cast<OpMask>(draw(6));
  c.q_rows = RandomRows(rng);
  c.k_rows = c.mask == OpMask::kCausal ? c.q_rows : RandomRows(rng);
  c.extent = RandomRows(rng);
  if (c.mask == OpMask::kDocuments && draw(4) == 0) c.extent = 1;  // of one token
  c.kv_heads = 1 + draw(4);
  const int64_t group = int64_t{1} << draw(4);
  while (c.kv_heads > 1 && c.q_rows * c.k_rows * c.kv_heads * group > kMostPairs) --c.kv_heads;
  c.heads = c.kv_heads * group;
  if (c.q_rows * c.k_rows * c.heads * c.batch > kMostPairs) c.batch = 1;
  if (c.shape() == MaskShape::kGeneral && draw(2) == 0) c.positions = {draw(5000), 1 + draw(4)};
  if (c.mask != OpMask::kCausal) c.chunks = std::min(1 + draw(3), c.k_rows);
  return c;
}

OpOperands::OpOperands(Context& ctx, const OpCase& c, const Allocate& allocate) : c_(c) {
  const int64_t kv_columns = c.kv_heads * (c.dim + c.v_dim);
  q_ = allocate(DType::kBF16, {c.q_rows, c.batch, c.heads * c.dim});
  kv_ = allocate(DType::kBF16, {c.k_rows, c.batch, kv_columns});
  dout_ = allocate(DType::kBF16, {c.q_rows, c.batch, c.heads * c.v_dim});
  // Scores that are neither flat nor of one key.
  uint32_t seed = 4 * c.seed;
  for (const auto& [x, deviation] : {std::pair(q_, 1.5), {kv_, 1.0}, {dout_, 1.0}})
    FillNormal(static_cast<bf16*>(x.raw()), x.elements(), deviation, seed++, ctx.stream());

  std::mt19937 rng(c.seed);
  std::vector<int64_t> lo, hi, row_lo, row_hi;
  for (const Rows& rows : RandomBounds(c, rng)) {
    // Positions between two keys bound the same keys.
    const int64_t offset = c.positions.offset, stride = c.positions.stride,
                  before = static_cast<int64_t>(rng() % Size(stride)),
                  behind = static_cast<int64_t>(rng() % Size(stride));
    lo.push_back(offset + stride * rows.lo - before);
    hi.push_back(offset + stride * (rows.hi - 1) + 1 + behind);
    if (rows.lo >= rows.hi) hi.back() = lo.back();
    row_lo.push_back(std::clamp<int64_t>(rows.lo, 0, c.k_rows));
    row_hi.push_back(std::clamp<int64_t>(rows.hi, 0, c.k_rows));
  }
  const auto upload = [&](const std::vector<int64_t>& host) {
    const TensorRef x = allocate(DType::kI64, {static_cast<int64_t>(host.size())});
    Upload(ctx, host.data(), x.bytes(), x);
    return x;
  };
  lo_ = upload(lo), hi_ = upload(hi);
  const TensorRef rows_lo = upload(row_lo), rows_hi = upload(row_hi);

  const AttentionBlock block = Block(0, c.k_rows, c.shape());
  const auto heads = [](const ConstHeadsRef& x) {
    return CudaHeads<const bf16>{static_cast<const bf16*>(x.data), x.row_stride, x.batch_stride};
  };
  problem_ = {.q = heads(block.q),
              .k = heads(block.k),
              .v = heads(block.v),
              .dout = heads(dout()),
              .q_rows = c.q_rows,
              .k_rows = c.k_rows,
              .batch = c.batch,
              .heads = c.heads,
              .kv_heads = c.kv_heads,
              .dim = c.dim,
              .v_dim = c.v_dim,
              .lo = rows_lo.data<int64_t>(),
              .hi = rows_hi.data<int64_t>(),
              .scale = block.scale};
}

AttentionBlock OpOperands::Block(int64_t begin, int64_t end, MaskShape shape) const {
  return {.q = HeadsOf(q_, 0, c_.heads, c_.dim),
          .k = HeadsOf(kv_, 0, c_.kv_heads, c_.dim).Rows(begin, end),
          .v = HeadsOf(kv_, c_.kv_heads * c_.dim, c_.kv_heads, c_.v_dim).Rows(begin, end),
          .bounds = {lo_, hi_},
          .mask_shape = shape,
          .key_positions = {c_.positions.offset + c_.positions.stride * begin, c_.positions.stride},
          .scale = 1 / std::sqrt(static_cast<double>(c_.dim))};
}

OpResults::OpResults(const OpCase& c, DType dtype, const Allocate& allocate) : c_(c) {
  const auto tensor = [&](DType type, int64_t rows, int64_t columns) {
    return allocate(type, {rows, c.batch, columns});
  };
  tensors_[kOut] = tensor(dtype, c.q_rows, c.heads * c.v_dim);
  tensors_[kLse] = tensor(DType::kF32, c.q_rows, c.heads);
  tensors_[kDq] = tensor(dtype, c.q_rows, c.heads * c.dim);
  tensors_[kDk] = tensor(dtype, c.k_rows, c.kv_heads * c.dim);
  tensors_[kDv] = tensor(dtype, c.k_rows, c.kv_heads * c.v_dim);
  rounded_out_ = tensor(DType::kBF16, c.q_rows, c.heads * c.v_dim);
  delta_ = tensor(DType::kF32, c.q_rows, c.heads);
}

HeadsRef OpResults::Heads(Result result) const {
  const bool keys = result == kDk || result == kDv;
  return HeadsOf(tensors_[result], 0, keys ? c_.kv_heads : c_.heads,
                 result == kOut || result == kDv ? c_.v_dim : c_.dim);
}

// NaN.
void OpResults::Poison(Context& ctx) {
  for (const TensorRef& x : tensors_) CUDA(cudaMemsetAsync(x.raw(), 0xFF, Size(x.bytes()), ctx.stream()));
}

AttentionGradients OpResults::Gradients(const OpOperands& in, const HeadsRef& out) const {
  return {.out = out,
          .dout = in.dout(),
          .lse = tensors_[kLse],
          .delta = delta_,
          .dq = Heads(kDq),
          .dk = Heads(kDk),
          .dv = Heads(kDv),
          .kv_write = Write::kOverwrite};
}

void OpResults::RunWhole(Context& ctx, const OpOperands& in) {
  Poison(ctx);
  const AttentionBlock block = in.Block(0, c_.k_rows, c_.shape());
  Ok(AttentionForwardWhole(ctx, block, Heads(kOut), tensors_[kLse]));
  Ok(AttentionDelta(ctx, Heads(kOut), in.dout(), delta_));
  Ok(AttentionBackwardWhole(ctx, block, Gradients(in, Heads(kOut))));
}

void OpResults::RunCarried(Context& ctx, const OpOperands& in) {
  Poison(ctx);
  const AttentionPartial partial{Heads(kOut), tensors_[kLse]};
  const auto for_each_chunk = [&](const auto& fn) {
    for (int64_t i = 0; i < c_.chunks; ++i) {
      const int64_t begin = i * c_.k_rows / c_.chunks, end = (i + 1) * c_.k_rows / c_.chunks;
      fn(begin, end, in.Block(begin, end, c_.shape()));
    }
  };
  Ok(ResetPartial(ctx, partial));
  for_each_chunk(
      [&](int64_t, int64_t, const AttentionBlock& block) { Ok(AttentionForward(ctx, block, partial)); });
  Ok(Cast(ctx, tensors_[kOut], rounded_out_));
  const HeadsRef out = HeadsOf(rounded_out_, 0, c_.heads, c_.v_dim);
  Ok(AttentionDelta(ctx, out, in.dout(), delta_));
  Ok(Zero(ctx, tensors_[kDq]));
  for_each_chunk([&](int64_t begin, int64_t end, const AttentionBlock& block) {
    AttentionGradients gradients = Gradients(in, out);
    gradients.dk = gradients.dk.Rows(begin, end), gradients.dv = gradients.dv.Rows(begin, end);
    Ok(AttentionBackward(ctx, block, gradients));
  });
}

}  // namespace annulus::testing
