#include "namespaces.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_ether.h>
#include <linux/if_tun.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "absl/strings/numbers.h"
#include "annulus/base/file.h"
#include "switch.h"

namespace annulus::hosts {
namespace {

constexpr int kOfHost = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWPID;
constexpr char kNamesFile[] = "/dev/shm/names";

std::string AddressOf(int host) { return absl::StrCat("10.79.0.", host + 1); }

absl::Status Failed(absl::string_view what) {
  return absl::UnavailableError(absl::StrCat(what, ": ", strerror(errno)));
}

absl::Status Mount(const char* source, const char* target, const char* type, unsigned long flags) {
  if (mount(source, target, type, flags, nullptr) == 0) return absl::OkStatus();
  return Failed(absl::StrCat("mount of ", source, " on ", target));
}

// What is seen of processes and of shared memory is the host's own.
absl::Status SetUpHere(int host) {
  const std::string name = HostName(host);
  if (sethostname(name.c_str(), name.size()) != 0) return Failed("sethostname");
  ANNULUS_RETURN_IF_ERROR(Mount("proc", "/proc", "proc", 0));
  return Mount("tmpfs", "/dev/shm", "tmpfs", 0);
}

// Of one interface of the network namespace that the socket was made in.
class Interface {
 public:
  Interface(int socket, const char* name) : socket_(socket) {
    strncpy(request_.ifr_name, name, sizeof(request_.ifr_name) - 1);
  }
  absl::Status SetUp() {
    request_.ifr_flags = IFF_UP | IFF_RUNNING;
    return Control(SIOCSIFFLAGS, "SIOCSIFFLAGS");
  }
  absl::Status SetMtu(int bytes) {
    request_.ifr_mtu = bytes;
    return Control(SIOCSIFMTU, "SIOCSIFMTU");
  }
  // A locally administered one whose last byte is the host: by that the switch knows it.
  absl::Status SetMac(int host) {
    const unsigned char mac[ETH_ALEN] = {2, 0, 0, 0, 0, static_cast<unsigned char>(host)};
    request_.ifr_hwaddr.sa_family = 1;  // ARPHRD_ETHER
    memcpy(request_.ifr_hwaddr.sa_data, mac, sizeof(mac));
    return Control(SIOCSIFHWADDR, "SIOCSIFHWADDR");
  }
  absl::Status SetAddress(const std::string& address) {
    ANNULUS_RETURN_IF_ERROR(SetInternet(SIOCSIFADDR, "SIOCSIFADDR", address));
    return SetInternet(SIOCSIFNETMASK, "SIOCSIFNETMASK", "255.255.255.0");
  }

 private:
  absl::Status SetInternet(unsigned long call, const char* name, const std::string& address) {
    sockaddr_in internet{};
    internet.sin_family = AF_INET;
    inet_pton(AF_INET, address.c_str(), &internet.sin_addr);
    memcpy(&request_.ifr_addr, &internet, sizeof(internet));
    return Control(call, name);
  }
  absl::Status Control(unsigned long call, const char* name) {
    if (ioctl(socket_, call, &request_) == 0) return absl::OkStatus();
    return Failed(absl::StrCat(name, " of ", request_.ifr_name));
  }

  const int socket_;
  ifreq request_{};
};

absl::Status SetUpInterfaces(int socket, int host) {
  ANNULUS_RETURN_IF_ERROR(Interface(socket, "lo").SetUp());
  Interface eth(socket, "eth0");
  ANNULUS_RETURN_IF_ERROR(eth.SetMtu(kMtu));
  ANNULUS_RETURN_IF_ERROR(eth.SetMac(host));
  ANNULUS_RETURN_IF_ERROR(eth.SetAddress(AddressOf(host)));
  return eth.SetUp();
}

// In the network namespace that this process is in.
absl::StatusOr<int> OpenTapHere(int host) {
  const int tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
  if (tap < 0) return Failed("/dev/net/tun");
  ifreq request{};
  strncpy(request.ifr_name, "eth0", sizeof(request.ifr_name) - 1);
  request.ifr_flags = IFF_TAP | IFF_NO_PI;
  if (ioctl(tap, TUNSETIFF, &request) != 0) return Failed("TUNSETIFF");
  const int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (control < 0) return Failed("socket");
  const absl::Status status = SetUpInterfaces(control, host);
  close(control);
  if (!status.ok()) return status;
  return tap;
}

absl::StatusOr<int> OpenNetwork(pid_t process) {
  const int fd = open(absl::StrCat("/proc/", process, "/ns/net").c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return Failed("a host's network");
  return fd;
}

// Tells the parent that the host is there, by the pipe, and sleeps.
[[noreturn]] void BeHost(int host, int ready) {
  const absl::Status status = SetUpHere(host);
  const std::string message(status.message());
  [[maybe_unused]] const ssize_t told = write(ready, message.data(), message.size());
  close(ready);
  signal(SIGCHLD, SIG_IGN);  // who loses its parent becomes our child: nobody waits for it
  while (status.ok()) pause();
  _exit(1);
}

int ExitCodeOf(int status) { return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status); }

[[noreturn]] void ExecuteAtHome(const std::string& command) {
  std::vector<std::string> variables;
  for (const char* name : {"HOME", "USER", "LOGNAME", "SHELL", "LANG", "PATH"}) {
    if (const char* value = std::getenv(name)) variables.push_back(absl::StrCat(name, "=", value));
  }
  std::vector<char*> environment;
  for (std::string& variable : variables) environment.push_back(variable.data());
  environment.push_back(nullptr);
  const char* home = std::getenv("HOME");
  if (home == nullptr || chdir(home) != 0) [[maybe_unused]]
    const int moved = chdir("/");
  const char* words[] = {"sh", "-c", command.c_str(), nullptr};
  execve("/bin/sh", const_cast<char**>(words), environment.data());
  _exit(127);
}

}  // namespace

std::string HostName(int host) { return absl::StrCat("host", host); }

absl::StatusOr<pid_t> ForkIntoNamespaces(int flags) {
  const auto pid = static_cast<pid_t>(syscall(SYS_clone, flags | SIGCHLD, nullptr, nullptr, nullptr, 0));
  if (pid < 0) return Failed("namespaces (this needs root)");
  if (pid == 0) prctl(PR_SET_PDEATHSIG, SIGKILL);
  return pid;
}

absl::StatusOr<pid_t> ForkMachine() { return ForkIntoNamespaces(kOfHost); }

absl::Status SetUpFirstHost(int hosts) {
  ANNULUS_RETURN_IF_ERROR(Mount("none", "/", nullptr, MS_REC | MS_PRIVATE));  // no mount is seen outside
  ANNULUS_RETURN_IF_ERROR(SetUpHere(0));
  std::string names = "127.0.0.1 localhost\n";
  for (int host = 0; host < hosts; ++host)
    absl::StrAppend(&names, AddressOf(host), " ", HostName(host), "\n");
  ANNULUS_RETURN_IF_ERROR(WriteFileDurably(kNamesFile, names));
  return Mount(kNamesFile, "/etc/hosts", nullptr, MS_BIND);
}

absl::StatusOr<pid_t> StartHost(int host) {
  int ready[2];
  if (pipe2(ready, O_CLOEXEC) != 0) return Failed("pipe");
  ANNULUS_ASSIGN_OR_RETURN(const pid_t process, ForkIntoNamespaces(kOfHost));
  if (process == 0) BeHost(host, ready[1]);
  close(ready[1]);
  char error[256] = {};
  const ssize_t bytes = read(ready[0], error, sizeof(error) - 1);  // until it has ended or closed the pipe
  close(ready[0]);
  if (bytes != 0) return absl::UnavailableError(absl::StrCat(HostName(host), ": ", error));
  return process;
}

absl::StatusOr<int> OpenTap(int host, pid_t process) {
  ANNULUS_ASSIGN_OR_RETURN(const int own, OpenNetwork(getpid()));
  ANNULUS_ASSIGN_OR_RETURN(const int other, OpenNetwork(process));
  if (setns(other, CLONE_NEWNET) != 0) return Failed("setns");
  absl::StatusOr<int> tap = OpenTapHere(host);
  if (setns(own, CLONE_NEWNET) != 0) return Failed("setns");
  close(other);
  close(own);
  return tap;
}

absl::StatusOr<int> RunOnHost(pid_t process, const std::string& command) {
  const auto handle = static_cast<int>(syscall(SYS_pidfd_open, process, 0));
  if (handle < 0 || setns(handle, kOfHost) != 0)
    return Failed(absl::StrCat("process 1 of a host, ", process));
  close(handle);
  const pid_t child = fork();  // only children are in its process namespace
  if (child < 0) return Failed("fork");
  if (child == 0) ExecuteAtHome(command);
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
  return ExitCodeOf(status);
}

std::vector<std::string> ProcessesLeft(const std::vector<pid_t>& hosts) {
  std::vector<std::string> left;
  const auto namespace_of = [](pid_t process) {
    std::error_code gone;
    return std::filesystem::read_symlink(absl::StrCat("/proc/", process, "/ns/uts"), gone).string();
  };
  for (const std::string& name : ListDirectory("/proc").value_or(std::vector<std::string>())) {
    pid_t process = 0;
    if (!absl::SimpleAtoi(name, &process)) continue;
    if (std::find(hosts.begin(), hosts.end(), process) != hosts.end()) continue;
    const std::string program = ReadFile(absl::StrCat("/proc/", name, "/comm")).value_or("");
    const std::string where = namespace_of(process);
    if (program.empty() || where.empty()) continue;  // it ends now
    for (size_t host = 0; host < hosts.size(); ++host) {
      if (namespace_of(hosts[host]) != where) continue;
      left.push_back(absl::StrCat(program.substr(0, program.find('\n')), " (", process, ") on ",
                                  HostName(static_cast<int>(host))));
    }
  }
  return left;
}

}  // namespace annulus::hosts
