#include "simulate_step_cluster.h"

#include <algorithm>
#include <bit>
#include <map>

#include "annulus/base/check.h"

namespace annulus {
namespace {

int Log2Up(int count) { return std::bit_width(static_cast<unsigned>(count - 1)); }

}  // namespace

double BestRate(const std::vector<LinkRate>& links, const std::vector<RatePoint>& collectives) {
  double best = collectives.empty() ? 0 : collectives.back().per_second;
  for (const LinkRate& link : links) {
    for (const std::vector<RatePoint>* points : {&link.one_way, &link.both_ways}) {
      if (!points->empty()) best = std::max(best, points->back().per_second);
    }
  }
  return best;
}

Cluster::Cluster(int ranks, int simulated, const MachineProfile& machine, Pattern pattern, EventGraph* graph)
    : machine_(machine),
      pattern_(pattern),
      graph_(graph),
      simulated_(simulated),
      ranks_per_host_(machine.network.ranks_per_host > 0 ? machine.network.ranks_per_host : ranks),
      measured_peers_(std::max(1, machine.ranks - 1)) {
  const double inside = BestRate(machine.links, machine.collectives);
  const double between = BestRate(machine.network.links, machine.network.collectives);
  const auto ports = [&](double rate) { return Ports{graph_->AddLink(rate), graph_->AddLink(rate)}; };
  for (int r = 0; r < simulated; ++r) {
    inside_.push_back(ports(inside));
    between_.push_back(ports(between));
  }
  for (int host = 0; host <= HostOf(simulated - 1); ++host) {
    host_links_.push_back(ports(machine.network.host_bytes_per_second));
  }
}

int Cluster::HostOf(int rank) const { return rank / ranks_per_host_; }

RankGroup Cluster::Group(const std::vector<int>& ranks) const {
  std::map<int, int> members;
  for (const int r : ranks) ++members[HostOf(r)];
  const auto size = static_cast<int>(ranks.size());
  RankGroup group{.size = size, .hosts = static_cast<int>(members.size())};
  for (const int r : ranks) {
    if (r >= simulated_) continue;
    group.ranks.push_back(r);
    group.on_host.push_back(members[HostOf(r)]);
  }
  group.ways = pattern_ == Pattern::kRing ? size : int64_t{size} * (size - 1);
  if (group.hosts == 1) return group;
  for (const auto& [host, here] : members) {
    group.ways_between += pattern_ == Pattern::kRing ? 1 : int64_t{here} * (size - here);
  }
  return group;
}

// Collectives are NCCL's on GPUs, MPI's on CPUs.
const LinkRate* Cluster::LinkOf(Where where) const {
  const std::vector<LinkRate>& links = where == Where::kInside ? machine_.links : machine_.network.links;
  const TransportKind wanted = pattern_ == Pattern::kRing ? TransportKind::kNccl : TransportKind::kHost;
  const auto found = std::find_if(links.begin(), links.end(),
                                  [&](const LinkRate& link) { return link.transport == wanted; });
  if (found != links.end()) return &*found;
  return links.empty() ? nullptr : &links.front();
}

const std::vector<RatePoint>& Cluster::CollectivesOf(Where where) const {
  return where == Where::kInside ? machine_.collectives : machine_.network.collectives;
}

double Cluster::StartSeconds(Where where) const {
  const LinkRate* link = LinkOf(where);
  return link == nullptr ? 0 : link->message_seconds;
}

double Cluster::StepSeconds(Where where) const {
  return where == Where::kInside ? machine_.collective_step_seconds
                                 : machine_.network.collective_step_seconds;
}

// Of messages one behind the other, at least: the profile's smallest, where it has small ones.
double Cluster::MessageGap(Where where) const {
  const LinkRate* link = LinkOf(where);
  if (link == nullptr || link->one_way.empty()) return 0;
  const RatePoint& least = link->one_way.front();
  return std::min(link->message_seconds, least.size / least.per_second);
}

// Besides the bytes' time at RateOf.
double Cluster::LatencyOf(Where where, const RankGroup& group, int peers) const {
  const bool measured = !CollectivesOf(where).empty();
  const int known = !measured ? 0 : where == Where::kInside ? measured_peers_ : 1;
  const double start = measured ? 0 : StartSeconds(where);
  if (pattern_ == Pattern::kDirect)
    return start + (measured ? std::max(0, peers - known) * MessageGap(where) : 0);
  const double steps = (group.size - group.hosts) * StepSeconds(Where::kInside) +
                       (group.hosts - 1) * StepSeconds(Where::kBetween);
  return start + std::max(0.0, steps - known * StepSeconds(where));
}

// Of what a rank sends to `peers` others; in rings it goes on in one stream. 0: as the links allow.
double Cluster::RateOf(Where where, double bytes, int peers) const {
  if (const std::vector<RatePoint>& rates = CollectivesOf(where); !rates.empty()) {
    const RatePoint& least = rates.front();  // what is smaller takes as long
    return RateAt(rates, bytes) * std::min(1.0, bytes / least.size);
  }
  const LinkRate* link = LinkOf(where);
  if (link == nullptr || link->one_way.empty()) return 0;
  if (pattern_ == Pattern::kRing) return RateAt(link->one_way, bytes);
  const double message = bytes / peers;
  return message / std::max(MessageGap(where), message / RateAt(link->one_way, message));
}

std::vector<int> Cluster::LinksOf(Where where, int rank, bool out, bool in) const {
  const Ports& own = (where == Where::kInside ? inside_ : between_)[static_cast<size_t>(rank)];
  std::vector<int> links;
  if (out) links.push_back(own.out);
  if (in) links.push_back(own.in);
  if (where == Where::kInside || machine_.network.host_bytes_per_second == 0) return links;
  const Ports& host = host_links_[static_cast<size_t>(HostOf(rank))];
  if (out) links.push_back(host.out);
  if (in) links.push_back(host.in);
  return links;
}

SentBytes Cluster::SentIn(const RankGroup& group, int64_t bytes) const {
  if (group.ways_between == 0) return {.inside = bytes};
  const int64_t between =
      bytes / group.ways * group.ways_between + bytes % group.ways * group.ways_between / group.ways;
  return {.inside = bytes - between, .between = between};
}

TaskId Cluster::Collective(const RankGroup& group, int64_t bytes, TaskId begin) {
  if (group.size == 1 || bytes == 0) return begin;
  const double each = static_cast<double>(bytes) / group.size;
  std::vector<TaskId> flows;
  for (size_t i = 0; i < group.ranks.size(); ++i) {
    const int here = group.on_host[i], elsewhere = group.size - here;
    double share = 0;  // that leaves the host
    if (group.hosts > 1) {
      share = pattern_ == Pattern::kRing ? 1.0 / here : static_cast<double>(elsewhere) / (group.size - 1);
    }
    for (const Where where : {Where::kInside, Where::kBetween}) {
      const double part = each * (where == Where::kInside ? 1 - share : share);
      if (part == 0) continue;
      const bool inside = where == Where::kInside;
      const int peers = std::max(1, inside ? here - 1 : elsewhere);
      flows.push_back(graph_->Transfer(
          {.bytes = part,
           .latency_seconds = LatencyOf(where, group, peers),
           .bytes_per_second = RateOf(where, part, peers),
           .links = LinksOf(where, group.ranks[i], true, true),
           .slowed_rank = group.ranks[i],
           .slowdown = inside ? machine_.collective_slowdown : machine_.network.collective_slowdown},
          {begin}));
    }
  }
  return graph_->Join(flows);
}

TaskId Cluster::SmallSum(const RankGroup& group, TaskId begin) {
  if (group.size == 1) return begin;
  const int here = *std::max_element(group.on_host.begin(), group.on_host.end());
  const bool ring = pattern_ == Pattern::kRing;
  double start = 0, each_way = 0;
  if (here > 1) {
    start = StartSeconds(Where::kInside);
    each_way += ring ? (here - 1) * StepSeconds(Where::kInside) : (here - 2) * MessageGap(Where::kInside);
  }
  if (group.hosts > 1) {
    start = std::max(start, StartSeconds(Where::kBetween));
    each_way += ring ? Log2Up(group.hosts) * StepSeconds(Where::kBetween)
                     : (group.size - here - 1) * MessageGap(Where::kBetween);
  }
  if (!ring) each_way += start;
  return graph_->Transfer({.latency_seconds = (ring ? start : 0) + 2 * each_way}, {begin});
}

void Cluster::AddFlow(Where where, int rank, int64_t out, int64_t in, TaskId begin,
                      std::vector<TaskId>* flows) {
  const auto add = [&](int64_t bytes, bool is_out, bool is_in) {
    if (bytes == 0) return;
    flows->push_back(graph_->Transfer(
        {.bytes = static_cast<double>(bytes), .links = LinksOf(where, rank, is_out, is_in)}, {begin}));
  };
  if (out == in) return add(out, true, true);
  add(out, true, false);
  add(in, false, true);
}

void Cluster::Messages(int rank, const RankTraffic& traffic, TaskId begin, std::vector<TaskId>* flows) {
  AddFlow(Where::kInside, rank, traffic.out.inside, traffic.in.inside, begin, flows);
  AddFlow(Where::kBetween, rank, traffic.out.between, traffic.in.between, begin, flows);
}

}  // namespace annulus
