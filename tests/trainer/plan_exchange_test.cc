// The exchange of a run before it runs: candidates, the one shown, examples of documents, tables, pictures.

#include "annulus/train/plan_exchange.h"

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "trainer/trainer_testing.h"

namespace annulus::testing {
namespace {

RunSpec FourRanks(std::vector<std::string> overrides = {}) {
  overrides.insert(overrides.begin(), {"parallel.cp=4", "data.seq_len=50", "model.attention.heads=4",
                                       "model.attention.head_dim=2"});
  return SmallRun(overrides);
}

absl::StatusOr<std::vector<PlannedPass>> PlanOf(const RunSpec& spec, const std::string& shown = "") {
  const ExchangeOptions options = ExchangeOptionsOf(spec, TransportsOnOneHost(spec), AssumedCpuCore());
  return PlanExchange(spec, ExampleBatchOf(spec).sequences, options, shown);
}

TEST(PlanExchange, PricesEveryPlanOfEveryKindOfLayerAndPass) {
  const RunSpec spec = FourRanks({"model.pattern=A - A{w=7}"});
  const auto passes = PlanOf(spec);
  ASSERT_TRUE(passes.ok()) << passes.status();
  ASSERT_EQ(passes->size(), 4u);
  for (size_t i = 0; i < passes->size(); ++i) {
    const PlannedPass& pass = (*passes)[i];
    EXPECT_EQ(pass.kind.attention.window, i < 2 ? 0 : 7);
    EXPECT_EQ(pass.pass, i % 2 == 0 ? Pass::kForward : Pass::kBackward);
    EXPECT_EQ(pass.plan.pass, pass.pass);
    const auto whole = std::count_if(pass.candidates.begin(), pass.candidates.end(),
                                     [](const PlanCandidate& each) { return each.choice.parts == 1; });
    EXPECT_EQ(whole, static_cast<int64_t>(AllChoices(4, 4).size())) << "the others are in more parts";
    EXPECT_EQ(pass.shown, 0u);
    EXPECT_TRUE(Validate(pass.plan).ok()) << Validate(pass.plan);
    // The table's time is that of the plan shown.
    EXPECT_EQ(pass.simulation.makespan, pass.candidates[0].seconds);
    for (const PlanCandidate& candidate : pass.candidates) {
      EXPECT_GE(candidate.seconds, pass.candidates[0].seconds * (1 - 1e-3)) << candidate.name;
    }
  }
}

// Of latent attention both ways are weighed, and the candidates are those of the one that is taken.
TEST(PlanExchange, SaysWhatLatentAttentionExchanges) {
  const std::vector<std::string> model = {"model.pattern=A - T{g=2}", "model.latent.heads=4",
                                          "model.latent.kv_rank=8",   "model.latent.nope_dim=2",
                                          "model.latent.rope_dim=2",  "model.latent.v_dim=3"};
  for (const char* exchange : {"AUTO", "LATENT", "EXPANDED"}) {
    SCOPED_TRACE(exchange);
    std::vector<std::string> overrides = model;
    overrides.push_back(absl::StrCat("parallel.exchange.latent=", exchange));
    const auto passes = PlanOf(FourRanks(overrides));
    ASSERT_TRUE(passes.ok()) << passes.status();
    ASSERT_EQ(passes->size(), 4u);
    for (const PlannedPass& pass : *passes) {
      EXPECT_EQ(pass.latents.has_value(), pass.kind.attention.branch == BranchKind::kLatentAttention);
      if (!pass.latents.has_value()) continue;
      EXPECT_EQ(LayersText(pass.kind), "1 latent attention layer (2 branches, all keys)");
      const LatentDecision& decision = *pass.latents;
      EXPECT_EQ(pass.layer.latent.has_value(), decision.latents);
      EXPECT_EQ(pass.layer.kv_heads, decision.latents ? 1 : 4);
      EXPECT_EQ(pass.home_seconds > 0, !decision.latents);
      const double predicted = decision.latents ? *decision.latent_seconds : *decision.expanded_seconds;
      EXPECT_NEAR(pass.candidates[0].seconds + pass.home_seconds, predicted, 1e-6 * predicted);
      const bool fits =
          std::string(exchange) == "AUTO" || decision.latents == (std::string(exchange) == "LATENT");
      EXPECT_TRUE(fits);
      const std::string table = CandidateTable(pass);
      EXPECT_TRUE(absl::StartsWith(table, absl::StrCat("exchange: ", Name(decision), " ("))) << table;
      EXPECT_EQ(absl::StrContains(table, " ms of expanding latents\n"), !decision.latents) << table;
    }
  }
}

TEST(PlanExchange, ShowsTheCandidateAskedFor) {
  const auto passes = PlanOf(FourRanks(), "mesh of 2 x 2");
  ASSERT_TRUE(passes.ok()) << passes.status();
  for (const PlannedPass& pass : *passes) {
    EXPECT_EQ(pass.candidates[pass.shown].name, "mesh of 2 x 2");
    EXPECT_EQ(pass.simulation.makespan, pass.candidates[pass.shown].seconds);
    const std::string table = CandidateTable(pass);
    EXPECT_TRUE(absl::StrContains(table, "\n* mesh of 2 x 2 ")) << table;
    EXPECT_TRUE(absl::StrContains(table, "\nwhy: ")) << table;
  }
  const absl::Status status = PlanOf(FourRanks(), "mess").status();
  EXPECT_TRUE(absl::StartsWith(status.message(), "choice=mess: expected a forward plan, by its kind "))
      << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "; ulysses")) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "; token_ring; ")) << status;
}

TEST(PlanExchange, ShowsTheFastestOfAKind) {
  for (const char* kind : {"token_ring", "kv_ring", "mesh"}) {
    const auto passes = PlanOf(FourRanks(), kind);
    ASSERT_TRUE(passes.ok()) << passes.status();
    for (const PlannedPass& pass : *passes) {
      // Ulysses is a kv_ring of one rank whose heads are split, but called by its own name.
      const auto is_shown = [&](size_t i) {
        const PlanChoice& choice = pass.candidates[i].choice;
        return Name(choice.kind) == std::string(kind) && choice.head_split == 1;
      };
      EXPECT_TRUE(is_shown(pass.shown)) << pass.candidates[pass.shown].name;
      for (size_t i = 0; i < pass.shown; ++i) EXPECT_FALSE(is_shown(i));
    }
  }
}

// A ring between groups that share out the heads goes one way round, too.
TEST(PlanExchange, NamesTheDirectionOfEveryRing) {
  const auto passes = PlanOf(FourRanks({"parallel.exchange.plan=KV_RING", "parallel.exchange.head_split=2"}));
  ASSERT_TRUE(passes.ok()) << passes.status();
  for (const PlannedPass& pass : *passes)
    EXPECT_EQ(pass.plan.name, "kv_ring toward lower ranks, heads over 2 ranks");
}

TEST(PlanExchange, OneRankExchangesNothing) {
  const auto passes = PlanOf(FourRanks({"parallel.cp=1"}));
  ASSERT_TRUE(passes.ok()) << passes.status();
  for (const PlannedPass& pass : *passes) {
    EXPECT_EQ(pass.plan.name, kNoExchange);
    EXPECT_EQ(WhyShown(pass), "one rank has all keys");
    const std::string table = CandidateTable(pass);
    EXPECT_TRUE(absl::StartsWith(table, "  no exchange: one rank has all keys; predicted ")) << table;
    EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), 1);
  }
}

TEST(PlanExchange, SaysWhyNoPlanCanBe) {
  const absl::Status status = PlanOf(FourRanks({"parallel.exchange.buffer_gib=1e-8"})).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StartsWith(status.message(), "no forward plan can be:\n")) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "\nulysses: buffers of ")) << status;
}

TEST(PlanExchange, RefusedCandidatesAreInTheTable) {
  // Room for the buffers of a ring, not for those of all ranks.
  const auto passes = PlanOf(FourRanks());
  ASSERT_TRUE(passes.ok());
  int64_t least = (*passes)[0].candidates[0].buffer_bytes;
  for (const PlanCandidate& each : (*passes)[0].candidates) least = std::min(least, each.buffer_bytes);
  const double gib = static_cast<double>(least) / (int64_t{1} << 30);
  const RunSpec spec = FourRanks({absl::StrFormat("parallel.exchange.buffer_gib=%.17g", gib * 1.5)});
  const ExchangeOptions options = ExchangeOptionsOf(spec, {TransportKind::kHost}, AssumedCpuCore());
  const auto planned =
      PlanPass(AttentionCaseOf(spec, {}, ExampleBatchOf(spec).sequences, false), Pass::kForward, options);
  ASSERT_TRUE(planned.ok()) << planned.status();
  const std::string table = CandidateTable(*planned);
  EXPECT_TRUE(absl::StrContains(table, "refused: ")) << table;
  EXPECT_FALSE(planned->candidates.back().refused.ok());
  EXPECT_LE(planned->candidates[0].buffer_bytes, options.buffer_bytes);
}

// The total counts the buffers that the table shows, wherever they lie.
TEST(PlanMemory, CountsTheBuffersOfThePlansShown) {
  for (const bool own : {false, true}) {  // memory of the exchange
    std::map<std::string, MemoryPlan> memory;
    std::map<std::string, int64_t> buffers;
    for (const std::string kind : {"kv_ring", "all_gather", "ulysses", ""}) {
      RunSpec spec = FourRanks({"data.seq_len=2000", "parallel.dp=1"});
      const auto passes = PlanOf(spec, kind);
      ASSERT_TRUE(passes.ok()) << passes.status();
      for (const PlannedPass& pass : *passes) {
        buffers[kind] = std::max(buffers[kind], pass.candidates[pass.shown].buffer_bytes);
      }
      if (own) spec.parallel.exchange.transport = TransportChoice::kCopyEngine;
      memory[kind] = PlanMemory(spec, PlannedExchangesOf(*passes));
      EXPECT_EQ(memory[kind].exchange, own ? buffers[kind] : 0) << kind;
    }
    EXPECT_NE(buffers["ulysses"], buffers["kv_ring"]) << "else nothing would tell them apart";
  }
}

TEST(ExampleBatchOf, IsTheRunsFirstMicroBatchWhereDocumentsAreMasked) {
  const ExampleBatch whole = ExampleBatchOf(FourRanks());
  EXPECT_EQ(whole.sequences.lengths, (std::vector<int64_t>{50, 50}));
  EXPECT_TRUE(whole.sequences.document_starts.empty());
  EXPECT_EQ(whole.note, "");

  const RunSpec masked = FourRanks({"data.document_mask=true", "data.train[0].text.document_separator=\n"});
  const ExampleBatch batch = ExampleBatchOf(masked);
  ASSERT_EQ(batch.sequences.document_starts.size(), 2u) << batch.note;
  const std::unique_ptr<DataSet> data = OpenData(masked);
  for (int64_t i = 0; i < 2; ++i) {
    EXPECT_EQ(batch.sequences.document_starts[static_cast<size_t>(i)], data->Train(i)->document_starts);
  }
  EXPECT_TRUE(absl::StrContains(batch.note, "first micro-batch")) << batch.note;
  const auto passes = PlanOf(masked);
  ASSERT_TRUE(passes.ok()) << passes.status();
  EXPECT_LT((*passes)[0].candidates[0].seconds, (*PlanOf(FourRanks()))[0].candidates[0].seconds)
      << "masks remove work";

  const ExampleBatch absent =
      ExampleBatchOf(FourRanks({"data.document_mask=true", "data.train[0].text.path=/nowhere/x"}));
  EXPECT_EQ(absent.sequences.lengths, (std::vector<int64_t>{50, 50}));
  EXPECT_TRUE(absl::StartsWith(absent.note, "not planned")) << absent.note;
  EXPECT_TRUE(absl::StrContains(absent.note, "/nowhere/x")) << absent.note;
}

TEST(StackSvg, PutsPicturesBelowEachOther) {
  const std::string stacked = StackSvg({"<svg xmlns=\"u\" width=\"100\" height=\"30\">a</svg>\n",
                                        "<svg xmlns=\"u\" width=\"120\" height=\"50\">b</svg>\n"});
  EXPECT_EQ(stacked,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"120\" height=\"80\">\n"
            "<svg y=\"0\" xmlns=\"u\" width=\"100\" height=\"30\">a</svg>\n"
            "<svg y=\"30\" xmlns=\"u\" width=\"120\" height=\"50\">b</svg>\n"
            "</svg>\n");
}

}  // namespace
}  // namespace annulus::testing
