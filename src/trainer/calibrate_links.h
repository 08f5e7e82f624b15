#pragma once

// Rates of messages and of collectives: inside a host, and where ranks are on several hosts between those.

#include "calibrate_kernels.h"

namespace annulus {

// The ranks of a group by their hosts, each of which has as many consecutive ones.
struct HostGroups {
  int hosts = 1;
  Communicator inside;   // those of this rank's host
  Communicator between;  // of each host the one in this rank's place on it; nobody where there is one host
};
// InvalidArgument for hosts with different numbers of ranks, and for ranks in turns over hosts. Collective.
absl::StatusOr<HostGroups> GroupByHosts(Communicator group, const std::string& host);

// Fills in links, collectives, and the network. `heads`: of computing that messages may slow down.
// Collective; only rank 0's profile is complete.
absl::Status MeasureLinks(Machine& machine, const HostGroups& groups, const CalibrationHeads& heads,
                          MachineProfile* profile);

}  // namespace annulus
