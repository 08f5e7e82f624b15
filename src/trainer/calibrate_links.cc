#include "calibrate_links.h"

#include <algorithm>

#include "annulus/base/median.h"
#include "annulus/comm/exchange_bench.h"
#include "annulus/device/stream_timer.h"
#include "annulus/ops/elementwise.h"
#include "annulus/ops/linear.h"
#include "annulus/train/report.h"

namespace annulus {
namespace {

using Compute = std::function<absl::Status()>;

constexpr int64_t kKiB = int64_t{1} << 10, kMiB = int64_t{1} << 20;
constexpr int kRepeats = 5;

// What the rates of one group's messages and collectives are measured with.
struct LinkBench {
  Context& ctx;
  Communicator group;
  Compute attention, product;  // what may run beside messages, and beside collectives

  bool cpu() const { return ctx.device.kind == DeviceKind::kCpu; }
};

// Of one transport.
absl::StatusOr<LinkRate> MeasureLink(LinkBench& bench, ExchangeTransport& transport) {
  constexpr double kLongSeconds = 2e-3;  // a message that takes as long is at its full rate
  Context& ctx = bench.ctx;
  LinkRate link{.transport = transport.kind(), .one_way = {}, .both_ways = {}};
  int64_t bytes = 4 * kKiB;
  for (; bytes <= (bench.cpu() ? 4 : 256) * kMiB; bytes *= 4) {
    ANNULUS_ASSIGN_OR_RETURN(const ExchangeRate rate,
                             MeasureExchange(ctx, bench.group, transport, bytes, kRepeats));
    const double one_way = rate.one_way_gb_per_second * 1e9, both_ways = rate.both_ways_gb_per_second * 1e9;
    link.one_way.push_back({.size = static_cast<double>(bytes), .per_second = Rounded(one_way)});
    // Half of the bytes went each way.
    link.both_ways.push_back({.size = static_cast<double>(bytes / 2), .per_second = Rounded(both_ways)});
    if (static_cast<double>(bytes) > kLongSeconds * std::min(one_way, both_ways)) break;
  }
  ANNULUS_ASSIGN_OR_RETURN(const double seconds,
                           MeasureMessageSeconds(ctx, bench.group, transport, kRepeats));
  link.message_seconds = Rounded(seconds);
  const int64_t beside = std::min(bytes, bench.cpu() ? kMiB : 16 * kMiB);
  ANNULUS_ASSIGN_OR_RETURN(link.computing_slowdown,
                           MeasureSlowdown(ctx, bench.group, transport, beside, bench.attention, kRepeats));
  link.computing_slowdown = Rounded(link.computing_slowdown);
  return link;
}

absl::StatusOr<std::vector<LinkRate>> MeasureTransports(LinkBench& bench,
                                                        const std::vector<TransportKind>& kinds) {
  std::vector<LinkRate> links;
  for (const TransportKind kind : kinds) {
    ANNULUS_ASSIGN_OR_RETURN(const std::unique_ptr<ExchangeTransport> transport,
                             MakeTransport(kind, bench.group, bench.ctx));
    ANNULUS_ASSIGN_OR_RETURN(LinkRate link, MeasureLink(bench, *transport));
    links.push_back(std::move(link));
  }
  return links;
}

// Operands of a reduce-scatter and an all-gather; memory of the context's scratch arena.
struct Parts {
  TensorRef whole, own;
  double sent = 0;  // bytes, by a rank in one of them
};
absl::StatusOr<Parts> MakeParts(Context& ctx, const Communicator& group, int64_t bytes) {
  const int64_t ranks = group.size(), part = bytes / SizeOf(DType::kF32) / ranks;
  Parts parts{.whole = ctx.scratch.Allocate(DType::kF32, {part * ranks}),
              .own = ctx.scratch.Allocate(DType::kF32, {part})};
  parts.sent = static_cast<double>(parts.own.bytes() * (ranks - 1));
  ANNULUS_RETURN_IF_ERROR(Zero(ctx, parts.whole));
  ANNULUS_RETURN_IF_ERROR(Zero(ctx, parts.own));
  return parts;
}

// Seconds of one of both. In a step CPU ranks come from computing, some later than others, and what they send
// is no longer in the caches next to them: there half of what both take more than the products before them
// take alone.
absl::StatusOr<double> CollectiveSeconds(LinkBench& bench, const Parts& parts, double product_seconds) {
  const auto seconds = [&](const Compute& before) -> absl::StatusOr<double> {
    const auto both = [&]() -> absl::Status {
      ANNULUS_RETURN_IF_ERROR(before());
      ANNULUS_RETURN_IF_ERROR(bench.group.ReduceScatter(parts.whole, parts.own));
      ANNULUS_RETURN_IF_ERROR(before());
      return bench.group.AllGather(parts.own, parts.whole);
    };
    ANNULUS_ASSIGN_OR_RETURN(const RatePoint rate, MeasureRate(bench.ctx, bench.group, 1, both));
    return 0.5 / rate.per_second;
  };
  ANNULUS_ASSIGN_OR_RETURN(const double alone, seconds([] { return absl::OkStatus(); }));
  if (!bench.cpu()) return alone;
  ANNULUS_ASSIGN_OR_RETURN(const double behind, seconds(bench.product));
  return std::max(alone, behind - product_seconds);
}

// Of reduce-scatter and all-gather, which gradients and parameters pass through.
absl::StatusOr<std::vector<RatePoint>> MeasureCollectives(LinkBench& bench, double product_seconds) {
  constexpr double kLongSeconds = 0.1;  // larger ones are as fast
  const int64_t most = bench.cpu() ? 16 * kMiB : 512 * kMiB;
  std::vector<RatePoint> points;
  for (int64_t bytes = 16 * kKiB; bytes <= most; bytes *= 8) {
    ArenaScope scope(bench.ctx.scratch);
    ANNULUS_ASSIGN_OR_RETURN(const Parts parts, MakeParts(bench.ctx, bench.group, bytes));
    ANNULUS_ASSIGN_OR_RETURN(const double seconds, CollectiveSeconds(bench, parts, product_seconds));
    points.push_back({.size = parts.sent, .per_second = Rounded(parts.sent / seconds)});
    if (seconds > kLongSeconds) break;
  }
  return points;
}

// All-gathers one behind the other, as long as they are polled: on GPUs all of them are enqueued at once.
class Gathers {
 public:
  Gathers(LinkBench& bench, const Parts& parts, int64_t count) : bench_(bench), parts_(parts), left_(count) {}

  void Advance() {
    while (left_ > 0 && status_.ok()) {
      if (bench_.cpu() && !running_.empty()) {
        const absl::StatusOr<bool> ended = running_.back().Test();
        status_.Update(ended.status());
        if (!status_.ok() || !*ended) return;
        running_.clear();
      }
      absl::StatusOr<Request> next = bench_.group.IAllGather(parts_.own, parts_.whole);
      status_.Update(next.status());
      if (!status_.ok()) return;
      running_.push_back(*std::move(next));
      --left_;
    }
    if (bench_.cpu() && !running_.empty()) status_.Update(running_.back().Test().status());
  }
  absl::Status Finish() {
    while (left_ > 0 && status_.ok()) Advance();
    for (Request& request : running_) status_.Update(request.Wait());
    return status_;
  }

 private:
  LinkBench& bench_;
  const Parts& parts_;
  int64_t left_;
  std::vector<Request> running_;
  absl::Status status_;
};

// How many times as long products take while collectives are under way.
absl::StatusOr<double> MeasureCollectiveSlowdown(LinkBench& bench, double product_seconds) {
  constexpr int kProducts = 16;
  ArenaScope scope(bench.ctx.scratch);
  ANNULUS_ASSIGN_OR_RETURN(const Parts parts,
                           MakeParts(bench.ctx, bench.group, bench.cpu() ? kMiB : 64 * kMiB));
  ANNULUS_ASSIGN_OR_RETURN(const RatePoint gathers, MeasureRate(bench.ctx, bench.group, 1, [&] {
                             return bench.group.AllGather(parts.own, parts.whole);
                           }));
  // For as long as the products take, were they half as fast.
  const double enough = std::clamp(2 * kProducts * product_seconds * gathers.per_second, 1.0, 200.0);
  std::vector<double> seconds;
  StreamTimer timer(bench.ctx);
  for (int i = 0; i < kRepeats; ++i) {
    Gathers beside(bench, parts, static_cast<int64_t>(enough));
    ANNULUS_RETURN_IF_ERROR(bench.group.Barrier());
    beside.Advance();
    bench.ctx.progress = [&] { beside.Advance(); };
    timer.Begin();
    absl::Status status;
    for (int k = 0; k < kProducts && status.ok(); ++k) status = bench.product();
    seconds.push_back(timer.Seconds() / kProducts);
    bench.ctx.progress = nullptr;
    status.Update(beside.Finish());
    ANNULUS_RETURN_IF_ERROR(bench.group.AgreeOk(status));
  }
  ANNULUS_ASSIGN_OR_RETURN(const double slowest,
                           bench.group.AllReduceValue(Median(std::move(seconds)), ReduceOp::kMax));
  return Rounded(std::max(1.0, slowest / product_seconds));
}

struct GroupRates {
  std::vector<LinkRate> links;
  std::vector<RatePoint> collectives;
  double collective_slowdown = 1;
};
absl::StatusOr<GroupRates> MeasureGroup(LinkBench& bench, const std::vector<TransportKind>& kinds) {
  GroupRates rates;
  ANNULUS_ASSIGN_OR_RETURN(rates.links, MeasureTransports(bench, kinds));
  ANNULUS_ASSIGN_OR_RETURN(const RatePoint products, MeasureRate(bench.ctx, bench.group, 1, bench.product));
  ANNULUS_ASSIGN_OR_RETURN(rates.collectives, MeasureCollectives(bench, 1 / products.per_second));
  ANNULUS_ASSIGN_OR_RETURN(rates.collective_slowdown,
                           MeasureCollectiveSlowdown(bench, 1 / products.per_second));
  return rates;
}

// The best of a group, then others that all ranks together can use.
absl::StatusOr<std::vector<TransportKind>> KindsFor(const Communicator& group, const Machine& machine) {
  ANNULUS_ASSIGN_OR_RETURN(const TransportKind best, ChooseTransport(group, *machine.ctx));
  std::vector<TransportKind> kinds = {best};
  for (const TransportKind kind : machine.exchange.available) {
    if (kind != best && kind != TransportKind::kHost) kinds.push_back(kind);
  }
  return kinds;
}

// Of what all ranks of a host send to other hosts at once, the rate of their sum.
absl::StatusOr<double> HostRate(Context& ctx, const HostGroups& groups, TransportKind kind, int64_t bytes) {
  ANNULUS_ASSIGN_OR_RETURN(const std::unique_ptr<ExchangeTransport> transport,
                           MakeTransport(kind, groups.between, ctx));
  ANNULUS_ASSIGN_OR_RETURN(const ExchangeRate rate,
                           MeasureExchange(ctx, groups.between, *transport, bytes, kRepeats));
  Communicator inside = groups.inside;
  return inside.AllReduceValue(rate.one_way_gb_per_second * 1e9, ReduceOp::kSum);
}

// Rates between hosts are those of one rank of each, while the others wait.
absl::Status MeasureNetwork(Machine& machine, const HostGroups& groups, LinkBench bench,
                            NetworkProfile* network) {
  Communicator world = machine.mesh.cp;
  const int ranks_per_host = groups.inside.size();
  const auto measure = [&]() -> absl::Status {
    if (groups.inside.rank() > 0) return absl::OkStatus();
    bench.group = groups.between;
    ANNULUS_ASSIGN_OR_RETURN(const std::vector<TransportKind> kinds, KindsFor(groups.between, machine));
    ANNULUS_ASSIGN_OR_RETURN(const GroupRates rates, MeasureGroup(bench, kinds));
    *network = {.ranks_per_host = ranks_per_host,
                .links = rates.links,
                .collectives = rates.collectives,
                .collective_slowdown = rates.collective_slowdown};
    return absl::OkStatus();
  };
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(measure()));
  if (ranks_per_host == 1) return absl::OkStatus();
  ANNULUS_ASSIGN_OR_RETURN(const TransportKind kind, ChooseTransport(groups.between, *machine.ctx));
  const double largest = network->links.empty() ? 0 : network->links.front().one_way.back().size;
  ANNULUS_ASSIGN_OR_RETURN(const double bytes, world.AllReduceValue(largest, ReduceOp::kMax));
  const absl::StatusOr<double> all = HostRate(*machine.ctx, groups, kind, static_cast<int64_t>(bytes));
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(all.status()));
  if (network->links.empty()) return absl::OkStatus();
  network->host_bytes_per_second = Rounded(std::max(*all, network->links.front().one_way.back().per_second));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<HostGroups> GroupByHosts(Communicator group, const std::string& host) {
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<std::string> names, group.AllGatherStrings(host));
  const auto here = std::count(names.begin(), names.end(), names[0]);
  std::vector<std::string> seen;
  for (size_t r = 0; r < names.size(); ++r) {
    const bool begins = r % static_cast<size_t>(here) == 0;
    const bool known = std::find(seen.begin(), seen.end(), names[r]) != seen.end();
    if (begins ? known : names[r] != names[r - 1]) {
      return Invalid("rank ", r, " on ", names[r], ": expected ", CountText(here, "consecutive rank"),
                     " on each host, as ", names[0], " has");
    }
    if (begins) seen.push_back(names[r]);
  }
  if (names.size() % static_cast<size_t>(here) != 0)
    return Invalid("host ", names.back(), ": expected ", CountText(here, "rank"), " on each host, as ",
                   names[0], " has");
  if (seen.size() == 1) return HostGroups{.hosts = 1, .inside = std::move(group), .between = {}};
  const int place = group.rank() / static_cast<int>(here);
  HostGroups groups{.hosts = static_cast<int>(seen.size()), .inside = {}, .between = {}};
  ANNULUS_ASSIGN_OR_RETURN(groups.inside, group.Split(place, group.rank()));
  ANNULUS_ASSIGN_OR_RETURN(groups.between, group.Split(group.rank() % static_cast<int>(here), place));
  return groups;
}

absl::Status MeasureLinks(Machine& machine, const HostGroups& groups, const CalibrationHeads& heads,
                          MachineProfile* profile) {
  Context& ctx = *machine.ctx;
  Communicator world = machine.mesh.cp;
  ArenaScope scope(ctx.scratch);
  const bool cpu = ctx.device.kind == DeviceKind::kCpu;
  CalibrationBlock block(ctx, heads, cpu ? 256 : 8192);
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(block.Make()));
  block.Mask(MaskShape::kFull);
  const DType dtype = cpu ? DType::kF32 : DType::kBF16;
  const int64_t tokens = cpu ? 256 : 8192, width = cpu ? 192 : 4096;
  const auto x = RandomTensor(ctx, ctx.scratch, dtype, {tokens, width}, 1);
  const auto w = RandomTensor(ctx, ctx.scratch, dtype, {width, width}, 2);
  for (const auto* made : {&x, &w}) ANNULUS_RETURN_IF_ERROR(world.AgreeOk(made->status()));
  const TensorRef y = ctx.scratch.Allocate(dtype, x->shape());
  const LinkBench bench{.ctx = ctx,
                        .group = groups.inside,
                        .attention = [&] { return block.RunWhole(Pass::kForward); },
                        .product = [&] { return LinearForward(ctx, *x, *w, Write::kOverwrite, y); }};
  profile->ranks = groups.inside.size();
  const auto measure_inside = [&]() -> absl::Status {
    if (groups.inside.size() == 1) return absl::OkStatus();
    LinkBench own = bench;
    ANNULUS_ASSIGN_OR_RETURN(const std::vector<TransportKind> kinds, KindsFor(groups.inside, machine));
    ANNULUS_ASSIGN_OR_RETURN(const GroupRates rates, MeasureGroup(own, kinds));
    profile->links = rates.links;
    profile->collectives = rates.collectives;
    profile->collective_slowdown = rates.collective_slowdown;
    return absl::OkStatus();
  };
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(measure_inside()));
  if (groups.hosts == 1) return absl::OkStatus();
  return MeasureNetwork(machine, groups, bench, &profile->network);
}

}  // namespace annulus
