// Export and import undo each other, bit for bit; folders that are damaged or of another kind are refused
// with what is wrong.

#include "absl/strings/str_replace.h"
#include "annulus/train/config.h"
#include "hf/hf_testing.h"

namespace annulus::testing {
namespace {

class RoundTrip : public ::testing::TestWithParam<std::string> {
 protected:
  RoundTrip() : golden_(ReadGolden(GetParam())) { WriteGoldenFolder(golden_, directory_.path() + "/from"); }
  HfFolder Open(const std::string& name) const {
    absl::StatusOr<HfFolder> folder = HfFolder::Open(directory_.path() + "/" + name);
    ANNULUS_CHECK(folder.ok()) << folder.status();
    return *std::move(folder);
  }
  std::string Path(const std::string& name) const { return directory_.path() + "/" + name; }

  const TemporaryDirectory directory_;
  const Json golden_;
};

TEST_P(RoundTrip, IsExact) {
  const HfFolder from = Open("from");
  const ImportedParameters imported(from);
  const HfExport to{.directory = Path("to"), .dtype = DType::kF64, .max_length = from.max_length()};
  ASSERT_TRUE(ExportHuggingFace(from.spec(), imported.finder(), to).ok());
  const HfFolder again = Open("to");
  EXPECT_EQ(again.architecture(), from.architecture());
  EXPECT_EQ(again.spec(), from.spec());
  EXPECT_EQ(again.max_length(), from.max_length());
  EXPECT_EQ(Difference(ImportedParameters(again), imported), "");

  // The tensors are those of Transformers, by name, shape and contents.
  if (GetParam() == "deepseek_v3") return;  // its rotations are laid out in another way
  const auto want = SafetensorsFile::Open(Path("from/model.safetensors"));
  const auto got = SafetensorsFile::Open(Path("to/model.safetensors"));
  ASSERT_TRUE(want.ok() && got.ok());
  ASSERT_EQ(got->tensors().size(), want->tensors().size());
  for (size_t i = 0; i < want->tensors().size(); ++i) {
    const NamedTensor &a = got->tensors()[i], &b = want->tensors()[i];
    EXPECT_EQ(a.name, b.name);
    ASSERT_EQ(a.tensor.shape(), b.tensor.shape()) << a.name;
    EXPECT_EQ(std::memcmp(a.tensor.raw(), b.tensor.raw(), static_cast<size_t>(b.tensor.bytes())), 0)
        << a.name;
  }
}

TEST_P(RoundTrip, HoldsInSeveralFiles) {
  const HfFolder from = Open("from");
  const ImportedParameters imported(from);
  const HfExport to{.directory = Path("to"), .dtype = DType::kF64, .shard_bytes = 20000};
  ASSERT_TRUE(ExportHuggingFace(from.spec(), imported.finder(), to).ok());
  EXPECT_FALSE(Exists(Path("to/model.safetensors")));
  EXPECT_TRUE(Exists(Path("to/model.safetensors.index.json")));
  EXPECT_GT(Names(Path("to")).size(), 4u);
  EXPECT_EQ(Difference(ImportedParameters(Open("to")), imported), "");
}

TEST_P(RoundTrip, RoundsToBfloat16Once) {
  const HfFolder from = Open("from");
  const ImportedParameters imported(from);
  ASSERT_TRUE(
      ExportHuggingFace(from.spec(), imported.finder(), {.directory = Path("to"), .dtype = DType::kBF16})
          .ok());
  const HfFolder again = Open("to");
  for (const ParamInfo& info : imported.params().table().params) {
    const absl::StatusOr<Tensor> value = again.Read(info, DType::kF32);
    ASSERT_TRUE(value.ok()) << value.status();
    const bool wide =
        EndsWith(info.name, "a_log") || EndsWith(info.name, ".d") || EndsWith(info.name, "dt_bias");
    const double* want = imported.Of(info.name).data<double>();
    for (int64_t i = 0; i < info.logical.elements(); ++i) {
      const auto single = static_cast<float>(want[i]);
      ASSERT_EQ(value->ref().data<float>()[i], wide ? single : ToFloat(ToBFloat16(single))) << info.name;
    }
  }
}

// The text of an imported model's configuration stands for the same model.
TEST_P(RoundTrip, HoldsForTheConfiguration) {
  const HfFolder from = Open("from");
  const std::string text =
      absl::StrCat("name: \"a\" seed: 1\n", ModelText(from.spec()),
                   "data { train { text { path: \"t\" } } validation_fraction: 0.1 ",
                   "seq_len: 8 }\noptim { adamw { lr: 1e-3 } steps: 1 sequences_per_step: 1 }\n");
  const absl::StatusOr<ResolvedConfig> config = LoadConfig("a.textproto", text, {});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->spec.model, from.spec()) << text;
}

INSTANTIATE_TEST_SUITE_P(Classes, RoundTrip, ::testing::ValuesIn(GoldenCases()),
                         [](const auto& test) { return test.param; });

// Fields as earlier releases of Transformers wrote them.
TEST(HfConfigTest, OlderConfigurationsSayTheSame) {
  const TemporaryDirectory directory;
  const auto spec_of = [&](const Json& golden, const std::string& config) {
    WriteGoldenFolder(golden, directory.path());
    Overwrite(directory.path() + "/config.json", config);
    const absl::StatusOr<HfFolder> folder = HfFolder::Open(directory.path());
    ANNULUS_CHECK(folder.ok()) << folder.status();
    return folder->spec();
  };
  Json golden = ReadGolden("llama");
  const ModelSpec llama = spec_of(golden, golden["config"].dump());
  EXPECT_EQ(llama.rope_scaling.kind, RopeScalingKind::kLlama3);
  Json& config = golden["config"];
  config["rope_scaling"] = config["rope_parameters"];
  config["rope_theta"] = config["rope_parameters"]["rope_theta"];
  config["rope_scaling"]["type"] = "llama3";
  for (const char* field : {"rope_theta", "rope_type"}) config["rope_scaling"].erase(field);
  config.erase("rope_parameters");
  EXPECT_EQ(spec_of(golden, config.dump()), llama);

  golden = ReadGolden("nemotron_h");
  const ModelSpec nemotron = spec_of(golden, golden["config"].dump());
  golden["config"].erase("layers_block_type");
  golden["config"]["hybrid_override_pattern"] = "M-M*-";
  EXPECT_EQ(spec_of(golden, golden["config"].dump()), nemotron);

  golden = ReadGolden("mamba2");
  golden["config"]["time_step_limit"] = {0.25, 0.0};
  const std::string text = golden["config"].dump();
  const size_t at = text.find("[0.25,0.0]");
  ASSERT_NE(at, std::string::npos);
  const ModelSpec mamba = spec_of(golden, std::string(text).replace(at, 10, "[0.25, Infinity]"));
  EXPECT_EQ(mamba.mamba.dt_min, 0.25);
  EXPECT_EQ(mamba.mamba.dt_max, 0);
}

// ---- refusals

class Refusal : public ::testing::Test {
 protected:
  // What opening the Llama folder says once `change` has changed its config.json.
  std::string OfConfig(const std::function<void(Json&)>& change, const std::string& name = "llama") const {
    Json golden = ReadGolden(name);
    change(golden["config"]);
    WriteGoldenFolder(golden, directory_.path());
    return Message();
  }
  std::string Message() const {
    const absl::Status status = HfFolder::Open(directory_.path()).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return absl::StrReplaceAll(status.message(),
                               {{directory_.path() + "/", ""}, {directory_.path() + ": ", ""}});
  }
  const TemporaryDirectory directory_;
};

TEST_F(Refusal, NamesFieldValueAndExpectation) {
  EXPECT_EQ(OfConfig([](Json& c) { c["architectures"] = {"GPT2LMHeadModel"}; }),
            "config.json: architectures=[\"GPT2LMHeadModel\"]: expected one of LlamaForCausalLM, "
            "DeepseekV3ForCausalLM, Mamba2ForCausalLM, NemotronHForCausalLM, FalconH1ForCausalLM, "
            "AnnulusForCausalLM");
  EXPECT_EQ(OfConfig([](Json& c) { c.erase("hidden_size"); }), "config.json: hidden_size: missing");
  EXPECT_EQ(OfConfig([](Json& c) { c["hidden_size"] = -1; }),
            "config.json: hidden_size=-1: expected an integer from 1 to 1048576");
  EXPECT_EQ(OfConfig([](Json& c) { c["attention_bias"] = true; }),
            "config.json: attention_bias=true: expected false");
  EXPECT_EQ(OfConfig([](Json& c) { c["rope_parameters"]["rope_type"] = "longrope"; }),
            "config.json: rope_type=\"longrope\": expected default, llama3 or yarn");
  EXPECT_EQ(OfConfig([](Json& c) { c["mamba_norm_before_gate"] = true; }, "falcon_h1"),
            "config.json: mamba_norm_before_gate=true: expected false");
  EXPECT_EQ(OfConfig([](Json& c) { c["ssm_multipliers"][2] = 0.5; }, "falcon_h1"),
            "config.json: ssm_multipliers=[1.0,1.0,0.5,1.0,1.0]: expected [1.0,1.0,1.0,1.0,1.0]");
  EXPECT_EQ(OfConfig([](Json& c) { c["first_k_dense_replace"] = 1; }, "deepseek_v3"),
            "config.json: first_k_dense_replace=1: expected at least num_hidden_layers=2: experts are not "
            "supported");
  EXPECT_EQ(OfConfig([](Json& c) { c["layers_block_type"][1] = "moe"; }, "nemotron_h"),
            "config.json: layers_block_type=\"moe\": expected mamba, attention or mlp");
}

// Sizes and numbers have the ranges of the configuration, far below where products of them overflow.
TEST_F(Refusal, OfNumbersOutOfRange) {
  const std::string width = "an integer from 1 to 1048576", head = "an integer from 1 to 65536";
  const std::string huge = "4611686018427387904";  // 2^62
  const struct {
    const char *name, *field;
    std::string value, expected;
  } cases[] = {
      {"llama", "vocab_size", huge, "an integer from 1 to 2147483647"},
      {"llama", "hidden_size", huge, width},
      {"llama", "hidden_size", "18446744073709551615", width},
      {"llama", "hidden_size", "32.0", width},
      {"llama", "hidden_size", "\"32\"", width},
      {"llama", "hidden_size", "true", width},
      {"llama", "intermediate_size", huge, width},
      {"llama", "intermediate_size", "0", width},
      {"llama", "num_attention_heads", huge, head},
      {"llama", "num_attention_heads", "576460752303423488", head},
      {"llama", "num_key_value_heads", "65537", head},
      {"llama", "head_dim", huge, head},
      {"llama", "num_hidden_layers", huge, "an integer from 0 to 100000"},
      {"llama", "max_position_embeddings", "0", "an integer from 1 to 1073741824"},
      {"llama", "max_position_embeddings", huge, "an integer from 1 to 1073741824"},
      {"llama", "rms_norm_eps", "1e+300", "a number in (0, 1)"},
      {"llama", "initializer_range", "11", "a number in [0, 10]"},
      {"llama", "tie_word_embeddings", "1", "true or false"},
      {"deepseek_v3", "kv_lora_rank", huge, width},
      {"deepseek_v3", "q_lora_rank", huge, "an integer from 0 to 1048576"},
      {"deepseek_v3", "qk_nope_head_dim", huge, head},
      {"deepseek_v3", "qk_rope_head_dim", huge, head},
      {"deepseek_v3", "v_head_dim", huge, head},
      {"mamba2", "num_heads", huge, head},
      {"mamba2", "state_size", huge, head},
      {"mamba2", "n_groups", huge, head},
      {"mamba2", "conv_kernel", "9", "an integer from 1 to 8"},
      {"mamba2", "chunk_size", "65537", head},
      {"nemotron_h", "mamba_num_heads", huge, "an integer from 0 to 65536"},
      {"nemotron_h", "time_step_min", "-1.0", "a number in [0, 1e+09]"},
      {"annulus", "rotary_dim", huge, "an integer from 0 to 65536"},
      {"annulus", "latent_attention_heads", huge, "an integer from 0 to 65536"},
  };
  for (const auto& [name, field, value, expected] : cases) {
    EXPECT_EQ(OfConfig([&](Json& c) { c[field] = Json::parse(value); }, name),
              absl::StrCat("config.json: ", field, "=", value, ": expected ", expected))
        << name;
  }
  const auto largest = [](Json& c) {
    c["vocab_size"] = (int64_t{1} << 31) - 1, c["hidden_size"] = c["intermediate_size"] = 1 << 20;
    c["num_attention_heads"] = c["num_key_value_heads"] = c["head_dim"] = 1 << 16;
  };
  EXPECT_EQ(OfConfig(largest),
            "tensor \"model.embed_tokens.weight\" is f64 [97, 32]: expected bf16, f32 or f64 [2147483647, "
            "1048576], as config.json says");
  EXPECT_EQ(OfConfig([](Json& c) { c["rope_parameters"]["rope_theta"] = 0.5; }),
            "config.json: rope_theta=0.5: expected a number in [1, 1e+15]");
  EXPECT_EQ(OfConfig([](Json& c) { c["rope_parameters"]["factor"] = 1e7; }),
            "config.json: factor=10000000.0: expected a number in [1, 1e+06]");
  EXPECT_EQ(OfConfig([](Json& c) { c["time_step_limit"] = {0.0, -1.0}; }, "mamba2"),
            "config.json: time_step_limit=-1.0: expected a number in [0, 1e+09]");
  EXPECT_EQ(OfConfig([](Json& c) { c["quantization_config"] = {{"quant_method", "fp8"}}; }),
            "config.json: quantization_config={\"quant_method\":\"fp8\"}: expected none: weights are read as "
            "bf16, f32 or f64");
}

// In folders of our own class a branch says what it is in full, and nothing else.
TEST_F(Refusal, OfBranchesThatSayMoreOrLess) {
  const std::string theta = "a number in [1, 1e+15]";
  const struct {
    size_t layer, branch;
    const char *field, *value;
    std::string expected;
  } cases[] = {
      {4, 0, "rope_theta", "\"10000\"", theta},
      {4, 0, "rope_theta", "true", theta},
      {2, 0, "rope_theta", "0.5", theta},
      {4, 0, "window", "-1", "an integer from 0 to 1099511627776"},
      {4, 0, "window", "null", "an integer from 0 to 1099511627776"},
      {2, 0, "latent_groups", "0", "an integer from 1 to 1048576"},
      {4, 0, "kv", "\"@-2\"", "of attention no fields but kind, window or rope_theta"},
      {4, 0, "latent_groups", "1", "of attention no fields but kind, window or rope_theta"},
      {2, 0, "tie", "\"a\"", "of latent no fields but kind, window, rope_theta or latent_groups"},
      {0, 0, "combine", "\"mean-norm\"", "of mamba no fields but kind"},
      {1, 0, "rope_theta", "10000.0", "of mlp no fields but kind"},
  };
  for (const auto& [layer, branch, field, value, expected] : cases) {
    EXPECT_EQ(OfConfig([&](Json& c) { c["layers"][layer][branch][field] = Json::parse(value); }, "annulus"),
              absl::StrCat("config.json: layers: ", field, "=", value, ": expected ", expected));
  }
  EXPECT_EQ(OfConfig([](Json& c) { c["layers"][4][0].erase("rope_theta"); }, "annulus"),
            "config.json: layers={\"kind\":\"attention\",\"window\":0}: expected a rope_theta, null for no "
            "positions");
  EXPECT_EQ(OfConfig([](Json& c) { c["layers"][2][0].erase("latent_groups"); }, "annulus"),
            "config.json: layers: latent_groups=null: expected an integer from 1 to 1048576");
  for (const char* field : {"rope_scaling", "rope_parameters"}) {
    EXPECT_EQ(
        OfConfig([&](Json& c) { c[field] = {{"rope_type", "default"}}; }, "annulus"),
        absl::StrCat(
            "config.json: ", field,
            "={\"rope_type\":\"default\"}: expected none: bases stand in layers, scaling in long_rope"));
  }
}

// What a configuration says twice must agree.
TEST_F(Refusal, NamesFieldsThatContradictEachOther) {
  const struct {
    const char *name, *field, *value, *expected;
  } cases[] = {
      {"llama", "model_type", "\"mistral\"", "\"llama\", as architectures says"},
      {"llama", "num_key_value_heads", "3", "a divisor of num_attention_heads=4"},
      {"llama", "hidden_act", "\"gelu\"", "\"silu\""},
      {"llama", "mlp_bias", "true", "false"},
      {"llama", "rope_theta", "500.0", "10000.0, as rope_parameters says"},
      {"llama", "rope_scaling", "{\"rope_type\":\"default\"}", "the same as rope_parameters, or none"},
      {"llama", "partial_rotary_factor", "0.5", "1"},
      {"deepseek_v3", "num_key_value_heads", "2", "4, as num_attention_heads says"},
      {"deepseek_v3", "qk_head_dim", "15", "14, as qk_nope_head_dim + qk_rope_head_dim says"},
      {"deepseek_v3", "head_dim", "14", "6, as qk_rope_head_dim says"},
      {"deepseek_v3", "rope_interleave", "1", "true or false"},
      {"mamba2", "expand", "3", "2, as num_heads * head_dim / hidden_size says"},
      {"mamba2", "use_conv_bias", "false", "true"},
      {"nemotron_h", "num_hidden_layers", "4", "5, as the layers listed says"},
      {"nemotron_h", "hybrid_override_pattern", "\"M-M--\"", "\"M-M*-\", as layers_block_type says"},
      {"nemotron_h", "mamba_n_groups", "2", "3, as n_groups says"},
      {"nemotron_h", "mlp_hidden_act", "\"silu\"", "\"relu2\""},
      {"falcon_h1", "mamba_d_ssm", "64", "48, as mamba_n_heads * mamba_d_head says"},
      {"falcon_h1", "num_key_value_heads", "3", "a divisor of num_attention_heads=4"},
      {"annulus", "num_hidden_layers", "5", "6, as layers says"},
  };
  for (const auto& [name, field, value, expected] : cases) {
    EXPECT_EQ(OfConfig([&](Json& c) { c[field] = Json::parse(value); }, name),
              absl::StrCat("config.json: ", field, "=", value, ": expected ", expected))
        << name;
  }
  // A field that is not there stands for what the class takes then.
  EXPECT_EQ(OfConfig([](Json& c) { c.erase("mamba_d_ssm"); }, "falcon_h1"),
            "config.json: mamba_d_ssm=1024: expected 48, as mamba_n_heads * mamba_d_head says");
  EXPECT_EQ(OfConfig([](Json& c) { c["mamba_d_ssm"] = nullptr; }, "falcon_h1"),
            "config.json: mamba_expand=2: expected 1.5, as mamba_n_heads * mamba_d_head / hidden_size says");
  EXPECT_EQ(OfConfig([](Json& c) { c["rope_parameters"]["type"] = "yarn"; }),
            "config.json: type=\"yarn\": expected \"llama3\", as rope_type says");
}

TEST_F(Refusal, NamesTheTensor) {
  Json golden = ReadGolden("llama");
  golden["tensors"][2]["shape"] = {31};
  WriteGoldenFolder(golden, directory_.path());
  const std::string name = golden["tensors"][2]["name"];
  EXPECT_EQ(Message(), absl::StrCat("tensor \"", name,
                                    "\" is f64 [31]: expected bf16, f32 or f64 [32], as config.json says"));

  golden = ReadGolden("llama");
  golden["tensors"][2]["name"] = "model.layers.0.other";
  WriteGoldenFolder(golden, directory_.path());
  const absl::Status missing = HfFolder::Open(directory_.path()).status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound) << missing;
  EXPECT_NE(missing.message().find(absl::StrCat("tensor \"", name, "\"")), std::string::npos) << missing;

  // Sizes of the configuration that its tensors do not have.
  golden = ReadGolden("llama");
  golden["config"]["head_dim"] = 14;
  WriteGoldenFolder(golden, directory_.path());
  EXPECT_EQ(Message(),
            "tensor \"model.layers.0.self_attn.q_proj.weight\" is f64 [48, 32]: expected bf16, f32 or f64 "
            "[56, 32], as config.json says");

  golden = ReadGolden("llama_tied");
  golden["tensors"].push_back({{"name", "lm_head.weight"}, {"shape", {97, 32}}});
  WriteGoldenFolder(golden, directory_.path());
  EXPECT_EQ(Message(),
            "tensor \"lm_head.weight\" differs from \"model.embed_tokens.weight\": expected the same, as "
            "tie_word_embeddings=true says");
  golden["tensors"].erase(golden["tensors"].size() - 1);
  golden["config"]["tie_word_embeddings"] = false;
  WriteGoldenFolder(golden, directory_.path());
  EXPECT_EQ(HfFolder::Open(directory_.path()).status().message(),
            absl::StrCat(directory_.path(),
                         ": tensor \"lm_head.weight\" is in no file of weights: expected "
                         "it, as tie_word_embeddings=false says"));

  golden = ReadGolden("llama");
  golden["tensors"].push_back({{"name", "model.layers.0.self_attn.q_proj.bias"}, {"shape", {48}}});
  WriteGoldenFolder(golden, directory_.path());
  EXPECT_EQ(Message(), "tensor \"model.layers.0.self_attn.q_proj.bias\" has no place in a LlamaForCausalLM");
}

// Infinity or NaN in a file, or as narrow as it is read.
TEST_F(Refusal, OfNumbersThatAreNotFinite) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const double bad : {kInfinity, -kInfinity, std::nan(""), 1e300}) {
    const Json golden = ReadGolden("llama");
    WriteGoldenFolder(golden, directory_.path());
    const std::string path = directory_.path() + "/model.safetensors";
    std::string bytes = Contents(path);
    bytes.replace(bytes.size() - sizeof(bad), sizeof(bad), reinterpret_cast<const char*>(&bad), sizeof(bad));
    Overwrite(path, bytes);
    const absl::StatusOr<HfFolder> folder = HfFolder::Open(directory_.path());
    ASSERT_TRUE(folder.ok()) << folder.status();
    const std::string last = SafetensorsFile::Open(path)->tensors().back().name;
    std::string refused;
    for (const ParamInfo& info : BuildParamTable(folder->spec()).params) {
      const absl::Status status = folder->Read(info, DType::kF32).status();
      if (!status.ok()) absl::StrAppend(&refused, status.message());
    }
    EXPECT_EQ(refused, absl::StrCat(directory_.path(), ": tensor \"", last,
                                    "\" holds numbers that are not finite as f32: expected finite ones"));
  }
}

TEST_F(Refusal, OfAModelThatNoClassCanHold) {
  const auto spec_of = [](const std::string& pattern) {
    ModelSpec spec{.d_model = 16, .vocab_size = 20, .heads = 2, .kv_heads = 1, .head_dim = 8, .d_ff = 24};
    spec.latent = {.heads = 2, .kv_rank = 8, .nope_dim = 4, .rope_dim = 2, .v_dim = 4};
    spec.mamba = {.heads = 4, .head_dim = 8, .state = 4};
    spec.lightning = {.heads = 2, .key_dim = 8, .value_dim = 8};
    Pattern parsed = ParsePattern(pattern, {}).value();
    spec.layers = std::move(parsed.layers), spec.meta_tokens = parsed.meta_tokens;
    return spec;
  };
  const auto architecture = [&](const std::string& pattern) { return HfArchitecture(spec_of(pattern)); };
  EXPECT_EQ(architecture("(A -)^2").value(), "LlamaForCausalLM");
  EXPECT_EQ(architecture("(T -)^2").value(), "DeepseekV3ForCausalLM");
  EXPECT_EQ(architecture("M^3").value(), "Mamba2ForCausalLM");
  EXPECT_EQ(architecture("(M+A -)^2").value(), "FalconH1ForCausalLM");
  EXPECT_EQ(architecture("(M -)^3 T -").value(), "AnnulusForCausalLM");
  EXPECT_EQ(architecture("(T{g=2} -)^2").value(), "AnnulusForCausalLM");
  EXPECT_EQ(architecture("(A{w=8} -)^2").value(), "AnnulusForCausalLM");
  ModelSpec nemotron = spec_of("M - M A{rope=none} -");
  EXPECT_EQ(HfArchitecture(nemotron).value(), "AnnulusForCausalLM");
  nemotron.activation = Activation::kReluSquared;
  nemotron.tied_head = false;
  EXPECT_EQ(HfArchitecture(nemotron).value(), "NemotronHForCausalLM");

  const std::string general =
      "no class of Transformers can hold this model; the most general one falls short by\n";
  EXPECT_EQ(architecture("A - L -").status().message(),
            general + "AnnulusForCausalLM: layer 2 is L: it has A or T or M or - there");
  EXPECT_EQ(architecture("meta=3 A -").status().message(),
            general + "AnnulusForCausalLM: it has no meta tokens");
  EXPECT_EQ(architecture("(A{tie=a} -)^2").status().message(),
            general + "AnnulusForCausalLM: layer 0 is A with tie=a: it ties no layers");
}

// Patterns are written as they are read.
TEST(PatternTextTest, ReadsBackAsTheSamePattern) {
  for (const std::string pattern :
       {"(A -)^4", "A", "M - M - M A - M -", "((M -)^3 T{g=2} -)^2", "(M+A{w=128,combine=mean-norm} -)^3",
        "meta=4 (A{rope=none} -)^2", "(A{w=8} -)^3 A{rope=none} -", "A - A{kv=@-2} - A{rope=500} -",
        "(M+A{tie=a} -)^3", "(T{g=4,w=7} -)^2 T{rope=99.5}", "L - B - G -"}) {
    const PatternDefaults defaults{.window = 0, .rope_theta = 10000.0, .latent_rope_theta = 10000.0};
    const Pattern want = ParsePattern(pattern, defaults).value();
    ModelSpec spec;
    spec.layers = want.layers, spec.meta_tokens = want.meta_tokens;
    std::optional<double> theta[2];
    const BranchKind kinds[] = {BranchKind::kAttention, BranchKind::kLatentAttention};
    for (int k = 0; k < 2; ++k) {  // defaults are those of the first layer of the kind
      for (auto layer = spec.layers.rbegin(); layer != spec.layers.rend(); ++layer) {
        for (const BranchSpec& branch : layer->branches) {
          if (branch.kind == kinds[k]) theta[k] = branch.rope_theta;
        }
      }
    }
    const absl::StatusOr<Pattern> got =
        ParsePattern(PatternText(spec), {.window = 0, .rope_theta = theta[0], .latent_rope_theta = theta[1]});
    ASSERT_TRUE(got.ok()) << PatternText(spec) << ": " << got.status();
    EXPECT_EQ(got->layers, want.layers) << pattern << " as " << PatternText(spec);
    EXPECT_EQ(got->meta_tokens, want.meta_tokens);
  }
}

TEST(PatternTextTest, RepetitionsAreGroups) {
  const auto text_of = [](const std::string& pattern) {
    ModelSpec spec;
    Pattern parsed = ParsePattern(pattern, {}).value();
    spec.layers = std::move(parsed.layers), spec.meta_tokens = parsed.meta_tokens;
    return PatternText(spec);
  };
  for (const std::string pattern :
       {"A", "(A -)^4", "M^48", "((M -)^3 T{g=2} -)^8", "A - (M -)^8", "(A -)^4 A", "A -^3 M^2 T -",
        "meta=8 (M+A{combine=mean-norm} -)^2 (M+A{w=8,combine=mean-norm} -)^5 L",
        "((M -)^2 (G^3 -)^4)^5 (A{w=64} -)^2"}) {
    EXPECT_EQ(text_of(pattern), pattern);
  }
  EXPECT_EQ(text_of("A - A - A - A -"), "(A -)^4");
  EXPECT_EQ(text_of("M - M - M A - M -"), "(M -)^2 M A - M -");
  const std::string nemotron = "(M -)^2 M A - (M -)^3 M A - (M -)^3 M A - (M -)^4 M A - (M -)^4 M A -";
  EXPECT_EQ(ParsePattern(text_of(nemotron), {})->layers, ParsePattern(nemotron, {})->layers);
  EXPECT_LE(text_of(nemotron).size(), nemotron.size());
  EXPECT_EQ(text_of("(M -)^5000"), "(M -)^5000");
}

}  // namespace
}  // namespace annulus::testing
