#include "annulus/parallel/attention_geometry.h"

#include <algorithm>
#include <set>

#include "absl/strings/str_join.h"
#include "annulus/device/transfer.h"
#include "arriving_keys.h"
#include "slot_fields.h"

namespace annulus {
namespace {

// What the plan finds in a rank's home slot of a result, and needs to find there.
AttentionGeometry::HomeResult HomeResultOf(const ExchangePlan& plan, const RankPlan& rank, size_t home) {
  const SlotSpec& spec = rank.slots[home];
  const auto slot = static_cast<int>(home);
  AttentionGeometry::HomeResult result{.width = spec.width, .empty_before = true};
  std::map<int, std::vector<BlockRows>> overwritten;  // by group of the heads
  for (const Step& step : rank.steps) {
    const Attend& attend = step.attend;
    if (step.kind == StepKind::kReduce && step.into == slot) return result;
    if (step.kind == StepKind::kCopy && step.into == slot) {
      overwritten[rank.slots[static_cast<size_t>(step.slot)].group].push_back(step.rows);
    }
    if (step.kind != StepKind::kAttend || (attend.q_result != slot && attend.kv_result != slot)) continue;
    const bool q = attend.q_result == slot;
    if ((q ? attend.q_write : attend.kv_write) == ResultWrite::kAccumulate) return result;
    const std::vector<BlockRows>& rows = q ? attend.q_rows : attend.kv_rows;
    std::vector<BlockRows>& all = overwritten[spec.group];
    all.insert(all.end(), rows.begin(), rows.end());
  }
  const auto whole = [&](int group) {
    return RowsInSlot(plan, spec, overwritten[group]) == std::vector<RowRange>{{0, SlotRows(plan, spec)}};
  };
  bool all_groups = spec.group == kAllHeads;
  for (size_t g = 0; g < plan.groups.size() && all_groups; ++g) {
    all_groups = plan.groups[g].q_heads() == 0 || whole(static_cast<int>(g));
  }
  result.empty_before = !all_groups && !whole(spec.group);
  return result;
}

// Names of the kernels that serve the calls, each once.
std::string KernelNames(const AttentionCase& layer, Pass pass,
                        const std::vector<std::vector<AttendCall>>& calls) {
  std::set<absl::string_view> names;
  for (const std::vector<AttendCall>& of_step : calls) {
    for (const AttendCall& call : of_step)
      names.insert(Name(ChooseAttentionKernel(KernelCaseOf(layer, pass, call.shape))));
  }
  return absl::StrJoin(names, ", ");
}

// The fastest. What is given and not chosen is taken even if its time is not known.
absl::Status ChooseByTime(const AttentionCase& layer, Pass pass, const PlanOptions& options,
                          const MachineProfile& machine, AttentionGeometry::Choice* choice) {
  const std::vector<PlanCandidate> ranked = RankPlans(layer, pass, options, machine);
  const PlanCandidate& first = ranked.front();
  if (!first.refused.ok()) {
    // The only plan is used even where its time cannot be predicted; if it cannot be at all, building says
    // so.
    const bool given = ranked.size() == 1;
    if (given && !absl::IsResourceExhausted(first.refused)) return absl::OkStatus();
    return Prefixed(first.refused,
                    given ? "" : absl::StrCat("none of ", ranked.size(), " exchange plans can be: "));
  }
  *choice = {.plan = first.choice, .transport = first.transport, .predicted = first, .why = WhyItWon(ranked)};
  return absl::OkStatus();
}

AttentionGeometry::Key KeyOf(const AttentionCase& layer, Pass pass) {
  return {layer.window,     layer.heads,
          layer.kv_heads,   layer.head_dim,
          layer.v_head_dim, layer.latent ? layer.latent->columns : 0,
          layer.dtype,      pass};
}

}  // namespace

ContextAttentionShape Expanded(ContextAttentionShape shape) {
  shape.kv_heads = shape.heads;
  shape.latent.reset();
  return shape;
}

PlanOptions PlanOptionsOf(const ExchangeOptions& options, Pass pass) {
  const bool forward = pass == Pass::kForward;
  return {.plans = forward ? options.forward : options.backward,
          .transports = options.transport.has_value() ? std::vector<TransportKind>{*options.transport}
                                                      : options.available,
          .throttle = options.throttle,
          .buffer_bytes = options.buffer_bytes,
          .parts = forward ? options.forward_parts : options.backward_parts};
}

AttentionGeometry::AttentionGeometry(SequenceLayout layout, Communicator cp, ExchangeOptions options,
                                     std::shared_ptr<ExchangeTransports> transports)
    : layout_(layout),
      cp_(std::move(cp)),
      options_(std::move(options)),
      transports_(transports != nullptr ? std::move(transports)
                                        : std::make_shared<ExchangeTransports>(cp_, options_.throttle)) {
  ANNULUS_CHECK(!options_.available.empty() || options_.transport.has_value()) << "no transport";
  ANNULUS_CHECK(transports_->throttle().bytes_per_second == options_.throttle.bytes_per_second)
      << "transports at another rate";
}

void AttentionGeometry::SetBatch(SequenceBatch sequences) {
  const bool same_size = sequences_.batch == sequences.batch && sequences_.lengths == sequences.lengths &&
                         sequences_.visibility == sequences.visibility &&
                         sequences_.document_starts.empty() == sequences.document_starts.empty();
  if (!same_size) choices_.clear(), decisions_.clear();
  if (!same_size || !sequences.document_starts.empty()) {
    for (auto& [key, schedule] : schedules_) spare_bounds_.push_back(std::move(schedule.bounds));
    schedules_.clear();
  }
  sequences_ = std::move(sequences);
  ages_known_ = false;
}

absl::StatusOr<AttentionGeometry::Choice> AttentionGeometry::Choose(const AttentionCase& layer, Pass pass) {
  const PlanOptions options = PlanOptionsOf(options_, pass);
  Choice choice{.transport = options.transports.front()};
  if (cp_.size() == 1) return choice;
  if (!options.plans.empty()) choice.plan = options.plans.front();
  // The group hears of every way to fail, so that no rank waits for another.
  absl::Status status;
  if (!options_.machine.attention.empty())
    status = ChooseByTime(layer, pass, options, options_.machine, &choice);
  ANNULUS_ASSIGN_OR_RETURN(const double largest,
                           cp_.AllReduceValue(static_cast<double>(choice.transport), ReduceOp::kMax));
  if (status.ok() && largest != static_cast<double>(choice.transport)) {
    status = Invalid("exchange by ", Name(choice.transport), ": expected that of the other ranks");
  }
  ANNULUS_RETURN_IF_ERROR(cp_.AgreeOk(status));
  return choice;
}

absl::StatusOr<ExchangePlan> AttentionGeometry::BuildFor(const AttentionCase& layer,
                                                         const SequenceBatch& sequences, Pass pass,
                                                         const PlanChoice& choice) const {
  return BuildPlan(
      MakeExchangeProblem(layout_, sequences, layer.window, layer.heads, layer.kv_heads, ChunkParts(choice)),
      pass, choice);
}

absl::Status AttentionGeometry::Build(Pass pass, Schedule* schedule) {
  absl::StatusOr<ExchangePlan> plan = BuildFor(schedule->layer, sequences_, pass, schedule->choice.plan);
  absl::Status status = plan.status();
#if ANNULUS_VALIDATE_PLANS
  if (status.ok()) status = Validate(*plan);
#endif
  ANNULUS_RETURN_IF_ERROR(cp_.AgreeOk(status));
  schedule->plan = *std::move(plan);
  return AgreeOnPlan(schedule->plan, cp_);
}

absl::Status AttentionGeometry::Reserve(Context& ctx, const Schedule& schedule) {
  const AttentionCase& layer = schedule.layer;
  ANNULUS_ASSIGN_OR_RETURN(ExchangeTransport * transport, Transport(ctx, schedule.choice.transport));
  const auto reserve = [&](const ExchangePlan& plan) {
    return transport->Reserve(plan, {.home = {}, .fields = [&](const SlotSpec& slot) {
                                       return FieldsOf(layer, plan.pass, GroupOf(layer, plan, slot), slot);
                                     }});
  };
  ANNULUS_RETURN_IF_ERROR(reserve(schedule.plan));
  if (sequences_.document_starts.empty()) return absl::OkStatus();
  const std::vector<int64_t> whole(static_cast<size_t>(sequences_.batch), layout_.length());
  ANNULUS_ASSIGN_OR_RETURN(const ExchangePlan most, BuildFor(layer,
                                                             {.batch = sequences_.batch,
                                                              .lengths = whole,
                                                              .document_starts = {},
                                                              .visibility = sequences_.visibility},
                                                             schedule.plan.pass, schedule.choice.plan));
  return reserve(most);
}

absl::Status AttentionGeometry::Prepare(Context& ctx, const std::vector<AttentionCase>& layers) {
  if (cp_.size() == 1) return absl::OkStatus();
  for (const AttentionCase& layer : layers) {
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      bool expanded = false;
      if (layer.latent.has_value()) {
        ANNULUS_ASSIGN_OR_RETURN(const LatentDecision* decision, DecisionOf(layer, pass));
        expanded = !decision->latents;
      }
      ANNULUS_ASSIGN_OR_RETURN(const Schedule* schedule,
                               ScheduleOf(ctx, expanded ? Expanded(layer) : layer, pass));
      ANNULUS_RETURN_IF_ERROR(Reserve(ctx, *schedule));
    }
  }
  return absl::OkStatus();
}

void AttentionGeometry::MakeCalls(Context& ctx, Schedule* schedule) {
  const ExchangePlan& plan = schedule->plan;
  const RankPlan& rank = plan.ranks[static_cast<size_t>(cp_.rank())];
  for (const Step& step : rank.steps) {
    schedule->calls.push_back(step.kind == StepKind::kAttend
                                  ? CallsOf(layout_, sequences_, plan, cp_.rank(), step.attend)
                                  : std::vector<AttendCall>());
  }
  const AttentionKernelCase general = KernelCaseOf(schedule->layer, plan.pass, MaskShape::kGeneral);
  if (TakesArrivals(general, schedule->layer, plan, schedule->choice.transport, options_.throttle)) {
    for (size_t s = 0; s < rank.steps.size(); ++s) {
      const Step& step = rank.steps[s];
      if (step.kind != StepKind::kAttend || step.attend.arrival != KeyArrival::kDuring) continue;
      const auto added = schedule->arriving.emplace(s, ArrivingCallOf(layout_, plan, cp_.rank(), step));
      schedule->calls[s] = {added.first->second.call};
    }
  }
  schedule->kernels = KernelNames(schedule->layer, plan.pass, schedule->calls);
  if (!schedule->arriving.empty()) schedule->kernels += " on keys as they come";
  if (!spare_bounds_.empty()) {
    schedule->bounds = std::move(spare_bounds_.back());
    spare_bounds_.pop_back();
  }
  schedule->bounds.Fill(ctx, sequences_.batch, schedule->calls, [&](const SlotBlock& rows) {
    return BoundsOf(layout_, sequences_, schedule->layer.window, plan, rows);
  });
  for (size_t s = 0; s < rank.slots.size(); ++s) {
    if (!rank.slots[s].home || !IsResult(rank.slots[s].payload)) continue;
    schedule->results[static_cast<size_t>(rank.slots[s].payload)] = HomeResultOf(plan, rank, s);
  }
  // Decided for the group, whose ranks meet in the exchange.
  schedule->alone = std::all_of(plan.ranks.begin(), plan.ranks.end(),
                                [](const RankPlan& each) { return each.steps.size() == 1; });
  schedule->whole = schedule->alone && schedule->calls[0].size() == 1 &&
                    schedule->calls[0][0].q_rows == RowRange{0, layout_.local_rows()};
}

AttentionCase AttentionGeometry::CaseOf(const Context& ctx, const ContextAttentionShape& shape,
                                        DType dtype) const {
  return {.layout = layout_,
          .sequences = sequences_,
          .heads = shape.heads,
          .kv_heads = shape.kv_heads,
          .head_dim = shape.head_dim,
          .v_head_dim = shape.v_head_dim,
          .window = shape.window,
          .device = ctx.device.kind,
          .dtype = dtype,
          .determinism = ctx.determinism,
          .hopper = ctx.hopper,
          .kernel = ctx.attention,
          .latent = shape.latent};
}

absl::StatusOr<const AttentionGeometry::Choice*> AttentionGeometry::ChoiceFor(const AttentionCase& layer,
                                                                              Pass pass) {
  const Key key = KeyOf(layer, pass);
  if (choices_.count(key) == 0) {
    ANNULUS_ASSIGN_OR_RETURN(Choice choice, Choose(layer, pass));
    choices_.emplace(key, std::move(choice));
  }
  return &choices_.at(key);
}

absl::StatusOr<const LatentDecision*> AttentionGeometry::DecisionFor(Context& ctx,
                                                                     const ContextAttentionShape& shape,
                                                                     DType dtype, Pass pass) {
  return DecisionOf(CaseOf(ctx, shape, dtype), pass);
}

absl::StatusOr<const LatentDecision*> AttentionGeometry::DecisionOf(const AttentionCase& layer, Pass pass) {
  const Key key = KeyOf(layer, pass);
  if (const auto known = decisions_.find(key); known != decisions_.end()) return &known->second;
  LatentDecision decision;
  if (cp_.size() == 1) {
    decision = {.latents = false, .why = "one rank has all keys"};
  } else if (options_.latents == LatentExchange::kAuto && !options_.machine.attention.empty()) {
    const auto chosen = [&](const AttentionCase& way) -> ChosenPlan {
      ANNULUS_ASSIGN_OR_RETURN(const Choice* choice, ChoiceFor(way, pass));
      return choice->predicted;
    };
    const LatentAlternatives ways{.latents = chosen(layer), .expanded = chosen(Expanded(layer))};
    if (!ways.latents.ok() && !ways.expanded.ok()) return ways.latents.status();
    decision = DecideLatents(layer, pass, ways, options_.machine);
  } else {
    decision.latents = options_.latents != LatentExchange::kExpanded;
    if (options_.latents != LatentExchange::kAuto) decision.why = "as parallel.exchange.latent says";
  }
  return &decisions_.emplace(key, std::move(decision)).first->second;
}

const AttentionGeometry::Schedule* AttentionGeometry::FindSchedule(const AttentionCase& layer,
                                                                   Pass pass) const {
  const auto found = schedules_.find(KeyOf(layer, pass));
  return found == schedules_.end() ? nullptr : &found->second;
}

const LatentDecision* AttentionGeometry::FindDecision(const AttentionCase& layer, Pass pass) const {
  const auto found = decisions_.find(KeyOf(layer, pass));
  return found == decisions_.end() ? nullptr : &found->second;
}

absl::StatusOr<const AttentionGeometry::Schedule*> AttentionGeometry::ScheduleFor(
    Context& ctx, const ContextAttentionShape& shape, DType dtype, Pass pass) {
  return ScheduleOf(ctx, CaseOf(ctx, shape, dtype), pass);
}

absl::StatusOr<const AttentionGeometry::Schedule*> AttentionGeometry::ScheduleOf(Context& ctx,
                                                                                 AttentionCase layer,
                                                                                 Pass pass) {
  const Key key = KeyOf(layer, pass);
  if (const auto found = schedules_.find(key); found != schedules_.end()) return &found->second;
  ANNULUS_ASSIGN_OR_RETURN(const Choice* choice, ChoiceFor(layer, pass));
  layer.sequences.lengths.clear();
  layer.sequences.document_starts.clear();
  Schedule schedule{.layer = std::move(layer), .choice = *choice};
  ANNULUS_RETURN_IF_ERROR(Build(pass, &schedule));
  MakeCalls(ctx, &schedule);
  return &schedules_.emplace(key, std::move(schedule)).first->second;
}

ConstTensorRef AttentionGeometry::Positions(Context& ctx) {
  if (!positions_.ref().defined()) {
    const std::vector<int64_t> positions = layout_.LocalPositions(cp_.rank());
    positions_ = Tensor(ctx.device, DType::kI64, {static_cast<int64_t>(positions.size())});
    Upload(ctx, positions.data(), positions_.ref().bytes(), positions_.ref());
  }
  return positions_.ref();
}

ConstTensorRef AttentionGeometry::Ages(Context& ctx) {
  const Shape shape{layout_.local_rows(), sequences_.batch};
  if (!ages_.ref().defined() || !(ages_.ref().shape() == shape)) {
    ages_ = Tensor(ctx.device, DType::kI32, shape);
    ages_known_ = false;
  }
  if (!ages_known_) {
    std::vector<int32_t> ages;
    for (const int64_t position : layout_.LocalPositions(cp_.rank())) {
      for (int64_t item = 0; item < sequences_.batch; ++item) {
        ages.push_back(static_cast<int32_t>(position - DocumentStart(sequences_, item, position)));
      }
    }
    Upload(ctx, ages.data(), ages_.ref().bytes(), ages_.ref());
    ages_known_ = true;
  }
  return ages_.ref();
}

absl::StatusOr<std::vector<ExchangeTransport*>> AttentionGeometry::Transports(Context& ctx) {
  std::vector<TransportKind> kinds = options_.available;
  if (options_.transport.has_value()) kinds = {*options_.transport};
  std::vector<ExchangeTransport*> transports;
  for (const TransportKind kind : kinds) {
    ANNULUS_ASSIGN_OR_RETURN(ExchangeTransport * transport, Transport(ctx, kind));
    transports.push_back(transport);
  }
  return transports;
}

}  // namespace annulus
