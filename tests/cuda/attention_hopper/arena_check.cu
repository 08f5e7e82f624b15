#include "cuda/attention_hopper/arena_check.h"
#include "cuda/attention_mma/comparison.h"

namespace annulus::testing {
namespace {

constexpr int64_t kGap = 5;  // rows between chunks

// Counts that the flag of a part passes through: over the end of 32 bits for some.
uint32_t Awaited(int part) { return part % 2 == 0 ? 0 : 7 + static_cast<uint32_t>(part); }

}  // namespace

ArenaProblem::ArenaProblem(const Prepared& prepared, const ArenaPlan& plan)
    : prepared_(prepared),
      c_(prepared.c),
      plan_(plan),
      k_width_(c_.batch * c_.kv_heads * c_.dim),
      v_width_(c_.batch * c_.kv_heads * c_.v_dim),
      rows_(c_.k_rows + (2 * c_.chunks + 1) * kGap),
      keys_(rows_ * k_width_),
      values_(rows_ * v_width_),
      q_(Convert<bf16>(prepared.p.q)),
      k_(rows_ * k_width_),
      v_(rows_ * v_width_),
      lo_(prepared.lo),
      hi_(prepared.hi),
      flags_(c_.chunks),
      out_(c_.q_rows, c_.batch, c_.heads * c_.v_dim, false),
      result_(c_.q_rows, c_.batch, c_.heads * c_.v_dim, false),
      lse_(std::vector<float>(Size(c_.q_rows * c_.batch * c_.heads), NAN)) {
  MakeChunks();
  workspace_ =
      std::make_unique<DeviceArray<char>>(kernels::HopperAttentionForwardArenaWorkspaceBytes(Arena()));
}

void ArenaProblem::MakeChunks() {
  const int parts = c_.chunks, segments = plan_.split == ArenaSplit::kZigzag ? 2 * parts : parts;
  const int64_t segment_rows = (c_.k_rows + segments - 1) / std::max(segments, 1);
  std::fill_n(keys_.data, rows_ * k_width_, FromDouble<bf16>(NAN));
  std::fill_n(values_.data, rows_ * v_width_, FromDouble<bf16>(NAN));
  int64_t row = kGap;
  for (int s = 0; s < segments; ++s) {
    kernels::HopperArenaChunk chunk{.first_row = row};
    if (plan_.split == ArenaSplit::kStriped) {
      chunk.rows = (c_.k_rows - s + parts - 1) / parts;
      chunk.key_offset = s;
      chunk.key_stride = parts;
    } else {
      chunk.key_offset = std::min(c_.k_rows, s * segment_rows);
      chunk.rows = std::min(segment_rows, c_.k_rows - chunk.key_offset);
    }
    for (int64_t j = 0; j < chunk.rows; ++j) {
      const int64_t key = chunk.key_offset + chunk.key_stride * j;
      const auto copy = [&](const std::vector<double>& from, int64_t width, bf16* to) {
        for (int64_t i = 0; i < width; ++i) {
          to[(row + j) * width + i] = FromDouble<bf16>(from[Size(key * width + i)]);
        }
      };
      copy(prepared_.p.k, k_width_, keys_.data);
      copy(prepared_.p.v, v_width_, values_.data);
    }
    row += chunk.rows + kGap;
    const int part = s < parts ? s : segments - 1 - s;
    if (part == plan_.never || std::count(plan_.order.begin(), plan_.order.end(), part) > 0) {
      chunk.arrived = flags_.data + part;
      chunk.awaited = Awaited(part);
    }
    chunks_.push_back(chunk);
    part_.push_back(part);
  }
}

// The arena is NaN, but for what is there from the start; flags are one short; outputs are NaN.
std::vector<ArenaArrival> ArenaProblem::Poison() {
  std::vector<uint32_t> flags;
  for (int part = 0; part < c_.chunks; ++part) flags.push_back(Awaited(part) - 1);
  CUDA(cudaMemcpy(flags_.data, flags.data(), flags.size() * 4, cudaMemcpyHostToDevice));
  CUDA(cudaMemset(k_.data, 0xFF, Size(rows_ * k_width_) * sizeof(bf16)));
  CUDA(cudaMemset(v_.data, 0xFF, Size(rows_ * v_width_) * sizeof(bf16)));
  std::vector<ArenaArrival> parts;
  for (int part = 0; part < c_.chunks; ++part) parts.push_back({{}, flags_.data + part, Awaited(part)});
  for (size_t i = 0; i < chunks_.size(); ++i) {
    const auto add = [&](bf16* to, const bf16* from, int64_t width) {
      const int64_t at = chunks_[i].first_row * width;
      if (chunks_[i].rows == 0) return;
      const ArenaCopy copy{to + at, from + at, Size(chunks_[i].rows * width) * sizeof(bf16)};
      if (chunks_[i].arrived != nullptr) {
        parts[Size(part_[i])].copies.push_back(copy);
      } else {
        CUDA(cudaMemcpy(copy.to, copy.from, copy.bytes, cudaMemcpyHostToDevice));
      }
    };
    add(k_.data, keys_.data, k_width_);
    add(v_.data, values_.data, v_width_);
  }
  const size_t size = Size(c_.q_rows * c_.batch * c_.heads * c_.v_dim);
  out_.Upload(std::vector<float>(size, NAN));
  result_.Upload(std::vector<bf16>(size, FromDouble<bf16>(NAN)));
  CUDA(cudaMemset(lse_.data(), 0xFF, Size(c_.q_rows * c_.batch * c_.heads) * 4));
  CUDA(cudaMemset(workspace_->data, 0x5A, Size(kernels::HopperAttentionForwardArenaWorkspaceBytes(Arena()))));
  CUDA(cudaDeviceSynchronize());
  std::vector<ArenaArrival> arrivals;
  for (const int part : plan_.order) arrivals.push_back(parts[Size(part)]);
  return arrivals;
}

kernels::HopperAttentionArena ArenaProblem::Arena() const {
  const int64_t q = c_.heads * c_.dim, k = c_.kv_heads * c_.dim, v = c_.kv_heads * c_.v_dim;
  kernels::HopperAttentionBlock block = BlockOfCase<bf16>(prepared_, lo_.data, hi_.data);
  block.q = {q_.data, c_.batch * q, q};
  block.k = {k_.data, c_.batch * k, k};
  block.v = {v_.data, c_.batch * v, v};
  block.k_rows = rows_;
  return {.block = block, .chunks = chunks_, .patience_ms = plan_.patience_ms, .report = report_.data};
}

cudaError_t ArenaProblem::Launch(const ArenaTransport& transport) {
  const std::vector<ArenaArrival> arrivals = Poison();
  kernels::HopperAttentionPartial partial{out_.Heads<float>(), lse_.data(), {}};
  if (plan_.rounded) partial.result = result_.Heads<bf16>();
  transport.start(arrivals);
  cudaError_t error = kernels::HopperAttentionForwardArena(Arena(), partial, workspace_->data, nullptr);
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  transport.finish();
  return error;
}

// Of each element that of the realization with the largest error.
std::vector<double> ArenaProblem::WorstNaiveOut() const {
  const std::vector<double>& exact = prepared_.exact.out;
  std::vector<double> worst = exact;
  const auto note = [&](const std::vector<double>& naive) {
    for (size_t i = 0; i < naive.size(); ++i) {
      const double x = plan_.rounded ? RoundTo<bf16>(naive[i]) : naive[i];
      if (std::abs(x - exact[i]) > std::abs(worst[i] - exact[i])) worst[i] = x;
    }
  };
  note(prepared_.naive.out);
  for (const std::vector<double>& naive : prepared_.naive_outs) note(naive);
  return worst;
}

bool ArenaProblem::Check(const ArenaTransport& transport) {
  CUDA(Launch(transport));
  Comparison comparison;
  bool intact = true;
  const std::vector<double> got =
      plan_.rounded ? Doubles(result_.Download(&intact)) : Doubles(out_.Download(&intact));
  comparison.Compare("O", got, prepared_.exact.out, WorstNaiveOut());
  comparison.Compare("LSE", Doubles(lse_.Download(&intact)), prepared_.exact.lse, prepared_.naive.lse);
  comparison.Require(intact, "guards");
  std::string order;
  for (const int part : plan_.order) order.append(" ").append(std::to_string(part));
  std::printf("%s arena  %3ld/%-3ld %-24s order%s:%s\n", comparison.ok ? "ok  " : "FAIL", long(c_.dim),
              long(c_.v_dim), c_.name, order.c_str(), comparison.text.c_str());
  return comparison.ok;
}

bool ArenaProblem::CheckGivesUp(const ArenaTransport& transport) {
  const cudaError_t error = Launch(transport);
  std::printf("part %d never arrives: %s; report: chunk %d, flag %u, awaited %u, after %u ms\n", plan_.never,
              cudaGetErrorString(error), report_.data->part, report_.data->value, report_.data->awaited,
              report_.data->waited_ms);
  const auto named = static_cast<size_t>(report_.data->part);
  return error != cudaSuccess && named < part_.size() && part_[named] == plan_.never &&
         report_.data->awaited == Awaited(plan_.never) && report_.data->value == Awaited(plan_.never) - 1 &&
         report_.data->waited_ms >= plan_.patience_ms;
}

}  // namespace annulus::testing
