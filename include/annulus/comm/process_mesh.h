#pragma once

// World rank <-> (dp, cp, tp) coordinates, and the groups along each axis. tp varies fastest, then cp,
// then dp: ranks that exchange most are neighbours and share a node under mpirun's default placement.

#include <memory>
#include <string>

#include "annulus/comm/gpu_communicator.h"
#include "annulus/comm/traffic.h"

namespace annulus {

struct MeshShape {
  int dp = 1, cp = 1, tp = 1;
  int world() const { return dp * cp * tp; }
};

struct MeshCoordinates {
  int dp = 0, cp = 0, tp = 0;
  friend bool operator==(const MeshCoordinates&, const MeshCoordinates&) = default;
};

MeshCoordinates CoordinatesOf(const MeshShape& shape, int world_rank);
int WorldRankOf(const MeshShape& shape, const MeshCoordinates& at);

struct ProcessMesh {
  MeshShape shape;
  MeshCoordinates at;
  Communicator world;
  Communicator dp;     // same cp, tp
  Communicator cp;     // same dp, tp: one sequence
  Communicator tp;     // same dp, cp: one model
  Communicator dp_cp;  // same tp: gradients are summed and optimizer state is sharded over it
  std::shared_ptr<TrafficCounter> traffic = {};  // of CountTraffic; else null

  // InvalidArgument if shape.world() is not world.size().
  static absl::StatusOr<ProcessMesh> Create(const MeshShape& shape, Communicator world);

  // Makes dp, cp, tp and dp_cp take tensors on ctx.device as well (gpu_communicator.h); world stays on hosts.
  // Collective, once. `ctx` must outlive the mesh.
  absl::Status UseGpu(GpuLink link, Context& ctx);

  // Makes dp, cp, tp and dp_cp count what they send. `host`: this rank's. Collective, once, after UseGpu.
  absl::Status CountTraffic(const std::string& host);
};

}  // namespace annulus
