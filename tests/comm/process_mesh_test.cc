#include "annulus/comm/process_mesh.h"

#include <gtest/gtest.h>

#include "comm/communicator_checks.h"

namespace annulus {
namespace {

TEST(ProcessMesh, CoordinatesAreABijectionWithTpFastest) {
  for (const MeshShape shape :
       {MeshShape{1, 1, 1}, MeshShape{2, 3, 4}, MeshShape{4, 1, 2}, MeshShape{1, 5, 1}}) {
    for (int rank = 0; rank < shape.world(); ++rank) {
      const MeshCoordinates at = CoordinatesOf(shape, rank);
      EXPECT_TRUE(at.dp < shape.dp && at.cp < shape.cp && at.tp < shape.tp);
      EXPECT_EQ(WorldRankOf(shape, at), rank);
    }
  }
  const MeshShape shape{.dp = 2, .cp = 3, .tp = 4};
  EXPECT_EQ(CoordinatesOf(shape, 1), (MeshCoordinates{.dp = 0, .cp = 0, .tp = 1}));
  EXPECT_EQ(CoordinatesOf(shape, 4), (MeshCoordinates{.dp = 0, .cp = 1, .tp = 0}));
  EXPECT_EQ(CoordinatesOf(shape, 12), (MeshCoordinates{.dp = 1, .cp = 0, .tp = 0}));
}

// Every group holds exactly the ranks that share the other coordinates, in order of its own coordinate.
TEST(ProcessMesh, GroupsHoldTheirRanks) {
  for (const MeshShape shape :
       {MeshShape{2, 2, 1}, MeshShape{3, 2, 1}, MeshShape{2, 2, 2}, MeshShape{1, 4, 1}, MeshShape{1, 2, 3}}) {
    testing::OnLoopback(shape.world(), [&](Communicator world) {
      const absl::StatusOr<ProcessMesh> mesh = ProcessMesh::Create(shape, world);
      ASSERT_TRUE(mesh.ok()) << mesh.status();
      const MeshCoordinates at = mesh->at;
      const auto members = [&](Communicator group) {
        std::vector<int32_t> mine = {world.rank()}, all(static_cast<size_t>(group.size()));
        EXPECT_TRUE(group.AllGather(testing::RefOf(mine), testing::RefOf(all)).ok());
        return all;
      };
      std::vector<int32_t> dp, cp, tp, dp_cp;
      for (int d = 0; d < shape.dp; ++d) dp.push_back(WorldRankOf(shape, {d, at.cp, at.tp}));
      for (int c = 0; c < shape.cp; ++c) cp.push_back(WorldRankOf(shape, {at.dp, c, at.tp}));
      for (int t = 0; t < shape.tp; ++t) tp.push_back(WorldRankOf(shape, {at.dp, at.cp, t}));
      for (int d = 0; d < shape.dp; ++d) {
        for (int c = 0; c < shape.cp; ++c) dp_cp.push_back(WorldRankOf(shape, {d, c, at.tp}));
      }
      EXPECT_EQ(members(mesh->dp), dp);
      EXPECT_EQ(members(mesh->cp), cp);
      EXPECT_EQ(members(mesh->tp), tp);
      EXPECT_EQ(members(mesh->dp_cp), dp_cp);
      EXPECT_EQ(mesh->dp.rank(), at.dp);
      EXPECT_EQ(mesh->cp.rank(), at.cp);
      EXPECT_EQ(mesh->tp.rank(), at.tp);
    });
  }
}

TEST(ProcessMesh, RefusesAShapeThatDoesNotFit) {
  testing::OnLoopback(3, [](Communicator world) {
    for (const MeshShape shape :
         {MeshShape{2, 2, 1}, MeshShape{0, 3, 1}, MeshShape{-1, -3, 1}, MeshShape{1, 1, 1}}) {
      const absl::Status status = ProcessMesh::Create(shape, world).status();
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_NE(std::string(status.message()).find("the number of ranks, 3"), std::string::npos) << status;
    }
  });
}

}  // namespace
}  // namespace annulus
