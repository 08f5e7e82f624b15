#include "annulus/comm/process_mesh.h"

namespace annulus {

MeshCoordinates CoordinatesOf(const MeshShape& shape, int world_rank) {
  ANNULUS_CHECK(0 <= world_rank && world_rank < shape.world()) << "world rank " << world_rank;
  return {.dp = world_rank / (shape.cp * shape.tp),
          .cp = world_rank / shape.tp % shape.cp,
          .tp = world_rank % shape.tp};
}

int WorldRankOf(const MeshShape& shape, const MeshCoordinates& at) {
  return (at.dp * shape.cp + at.cp) * shape.tp + at.tp;
}

absl::StatusOr<ProcessMesh> ProcessMesh::Create(const MeshShape& shape, Communicator world) {
  if (shape.dp < 1 || shape.cp < 1 || shape.tp < 1 ||
      static_cast<int64_t>(shape.dp) * shape.cp * shape.tp != world.size()) {
    return Invalid("mesh dp=", shape.dp, " cp=", shape.cp, " tp=", shape.tp,
                   ": expected positive sizes whose product is the number of ranks, ", world.size());
  }
  ProcessMesh mesh{.shape = shape,
                   .at = CoordinatesOf(shape, world.rank()),
                   .world = world,
                   .dp = {},
                   .cp = {},
                   .tp = {},
                   .dp_cp = {},
                   .traffic = {}};
  const MeshCoordinates& at = mesh.at;
  ANNULUS_ASSIGN_OR_RETURN(mesh.dp, world.Split(at.cp * shape.tp + at.tp, at.dp));
  ANNULUS_ASSIGN_OR_RETURN(mesh.cp, world.Split(at.dp * shape.tp + at.tp, at.cp));
  ANNULUS_ASSIGN_OR_RETURN(mesh.tp, world.Split(at.dp * shape.cp + at.cp, at.tp));
  ANNULUS_ASSIGN_OR_RETURN(mesh.dp_cp, world.Split(at.tp, at.dp * shape.cp + at.cp));
  return mesh;
}

absl::Status ProcessMesh::UseGpu(GpuLink link, Context& ctx) {
  ANNULUS_ASSIGN_OR_RETURN(dp, WithGpu(dp, link, ctx, "collectives dp"));
  ANNULUS_ASSIGN_OR_RETURN(cp, WithGpu(cp, link, ctx, "collectives cp"));
  ANNULUS_ASSIGN_OR_RETURN(tp, WithGpu(tp, link, ctx, "collectives tp"));
  ANNULUS_ASSIGN_OR_RETURN(dp_cp, WithGpu(dp_cp, link, ctx, "collectives dp_cp"));
  return absl::OkStatus();
}

absl::Status ProcessMesh::CountTraffic(const std::string& host) {
  ANNULUS_ASSIGN_OR_RETURN(std::vector<std::string> hosts, world.AllGatherStrings(host));
  traffic = std::make_shared<TrafficCounter>(std::move(hosts), world.rank());
  for (Communicator* group : {&dp, &cp, &tp, &dp_cp}) {
    ANNULUS_ASSIGN_OR_RETURN(*group, WithTraffic(*group, traffic));
  }
  return absl::OkStatus();
}

}  // namespace annulus
