// What can libfabric itself do here? A bare loop of fi_writemsg with an immediate between two
// processes: none of our code, so it is the floor that bench_engine.py compares the engine with.
//
//   g++ -O2 -std=c++20 bench/fabric_floor.cpp -o fabric_floor -lfabric
//   fabric_floor PROVIDER [DOMAIN | -] [delivery] [fd]      fabric_floor "tcp;ofi_rxm" lo
//
// DOMAIN: interface or device, as fi_info calls it. Methods: both sides spin on one completion
// queue. latency: 8 B ping-pong, 20 000 rounds, half a round trip. bandwidth: 16 writes in flight,
// each with an immediate, from the first post to the last local completion (libfabric's default;
// with `delivery`, FI_DELIVERY_COMPLETE: the peer has the bytes). With `fd` the queue is one that a
// thread could sleep on: it signals a file descriptor, also to those that spin. One JSON line per
// figure; 10^9 bytes/s, payload only.
#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define TRY(call)                                          \
  if (long rc_ = (call); rc_ < 0) {                        \
    fprintf(stderr, "%s: %s\n", #call, fi_strerror(-rc_)); \
    _exit(1);                                              \
  }

constexpr size_t kMaxBytes = 32 << 20;
constexpr int kDepth = 16;

struct Side {
  fi_info* info = nullptr;
  fid_fabric* fabric;
  fid_domain* domain;
  fid_av* av;
  fid_cq* cq;
  fid_ep* ep;
  fid_mr* mr;
  fi_addr_t peer;
  uint64_t peer_base, peer_key;
  char* memory;
  uint64_t flags;
  fi_context2 contexts[kDepth];
  long sent = 0, arrived = 0;  // completions seen

  void progress() {
    fi_cq_data_entry entries[16];
    ssize_t n = fi_cq_read(cq, entries, 16);
    if (n == -FI_EAGAIN) return;
    TRY(n);
    for (ssize_t i = 0; i < n; ++i) ++(entries[i].flags & FI_REMOTE_CQ_DATA ? arrived : sent);
  }

  void write(size_t bytes, long number) {
    void* descriptor = fi_mr_desc(mr);
    iovec local{memory, bytes};
    fi_rma_iov remote{peer_base, bytes, peer_key};
    fi_msg_rma message{&local, &descriptor, 1, peer, &remote, 1, &contexts[number % kDepth], 7};
    ssize_t rc;
    while ((rc = fi_writemsg(ep, &message, flags)) == -FI_EAGAIN) progress();
    TRY(rc);
  }

  void open(const char* provider, const char* domain_name, bool delivery, bool fd, int wire) {
    fi_info* hints = fi_allocinfo();
    hints->ep_attr->type = FI_EP_RDM;
    hints->caps = FI_MSG | FI_RMA;
    hints->mode = FI_CONTEXT | FI_CONTEXT2;
    hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
    hints->domain_attr->threading = FI_THREAD_DOMAIN;
    hints->domain_attr->cq_data_size = 4;
    hints->fabric_attr->prov_name = strdup(provider);
    if (domain_name) hints->domain_attr->name = strdup(domain_name);
    TRY(fi_getinfo(FI_VERSION(1, 17), nullptr, nullptr, 0, hints, &info));
    TRY(fi_fabric(info->fabric_attr, &fabric, nullptr));
    TRY(fi_domain(fabric, info, &domain, nullptr));
    fi_av_attr av_attr{};
    fi_cq_attr cq_attr{};
    cq_attr.format = FI_CQ_FORMAT_DATA;
    cq_attr.size = 1024;
    if (fd) cq_attr.wait_obj = FI_WAIT_FD;
    TRY(fi_av_open(domain, &av_attr, &av, nullptr));
    TRY(fi_cq_open(domain, &cq_attr, &cq, nullptr));
    TRY(fi_endpoint(domain, info, &ep, nullptr));
    TRY(fi_ep_bind(ep, &av->fid, 0));
    TRY(fi_ep_bind(ep, &cq->fid, FI_TRANSMIT | FI_RECV));
    TRY(fi_enable(ep));
    memory = static_cast<char*>(aligned_alloc(4096, kMaxBytes));
    memset(memory, 1, kMaxBytes);
    TRY(fi_mr_reg(domain, memory, kMaxBytes, FI_WRITE | FI_REMOTE_WRITE, 0, 42, 0, &mr, nullptr));
    flags = FI_REMOTE_CQ_DATA | FI_COMPLETION | (delivery ? FI_DELIVERY_COMPLETE : 0);

    struct {
      char name[256];
      uint64_t base, key;
    } mine{}, theirs;
    size_t length = sizeof mine.name;
    TRY(fi_getname(&ep->fid, mine.name, &length));
    mine.base =
        info->domain_attr->mr_mode & FI_MR_VIRT_ADDR ? reinterpret_cast<uint64_t>(memory) : 0;
    mine.key = fi_mr_key(mr);
    TRY(::write(wire, &mine, sizeof mine));
    TRY(recv(wire, &theirs, sizeof theirs, MSG_WAITALL));
    TRY(fi_av_insert(av, theirs.name, 1, &peer, 0, nullptr));
    peer_base = theirs.base;
    peer_key = theirs.key;
  }
};

double now_us() {
  return std::chrono::duration<double, std::micro>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int main(int argc, char** argv) {
  const char* provider = argc > 1 ? argv[1] : "tcp;ofi_rxm";
  const char* domain = argc > 2 && strcmp(argv[2], "-") != 0 ? argv[2] : nullptr;
  bool delivery = false, fd = false;
  for (int i = 3; i < argc; ++i) {
    delivery |= strcmp(argv[i], "delivery") == 0;
    fd |= strcmp(argv[i], "fd") == 0;
  }
  int wires[2];
  TRY(socketpair(AF_UNIX, SOCK_STREAM, 0, wires));
  const pid_t child = fork();
  const bool first = child != 0;
  if (!first) prctl(PR_SET_PDEATHSIG, SIGKILL);
  static Side side;
  side.open(provider, domain, delivery, fd, wires[first]);
  auto until = [&](const long& counter, long value) {
    while (counter < value) side.progress();
  };
  auto print = [&](const char* what, size_t bytes, const char* format, double a, double b) {
    printf(
        "{\"bench\": \"fabric_floor\", \"provider\": \"%s\", \"delivery_complete\": %s, \"what\": "
        "\"%s\", \"bytes\": %zu, ",
        provider, delivery ? "true" : "false", what, bytes);
    printf(format, a, b);
    fflush(stdout);
  };

  std::vector<double> half;
  long posted = 0, expected = 0;
  for (int round = 0; round < 22000; ++round) {  // the first 2000 warm up
    const double start = now_us();
    if (first) side.write(8, posted++);
    until(side.arrived, ++expected);
    if (!first) side.write(8, posted++);
    until(side.sent, posted - 1);
    if (round >= 2000) half.push_back((now_us() - start) / 2);
  }
  until(side.sent, posted);
  std::sort(half.begin(), half.end());
  if (first)
    print("latency", 8, "\"p50_us\": %.2f, \"p99_us\": %.2f}\n", half[half.size() / 2],
          half[half.size() * 99 / 100]);

  for (size_t bytes : {4096, 65536, 1 << 20, 8 << 20, 32 << 20}) {
    const long count = std::clamp<long>((1l << 30) / static_cast<long>(bytes), 32, 20000);
    const double start = now_us();
    if (first) {
      for (long i = 0; i < count; ++i) {
        until(side.sent, posted - kDepth + 1);
        side.write(bytes, posted++);
      }
      until(side.sent, posted);
      const double seconds = (now_us() - start) * 1e-6;
      print("bandwidth", bytes, "\"gb_per_s\": %.3f, \"writes_per_s\": %.0f}\n",
            bytes * count / seconds * 1e-9, count / seconds);
      until(side.arrived, ++expected);
    } else {
      until(side.arrived, expected += count);
      side.write(8, posted++);
      until(side.sent, posted);
    }
  }
  if (!first) {
    char last;
    TRY(read(wires[0], &last, 1));  // the first is done reading our last write
    _exit(0);
  }
  TRY(::write(wires[1], "x", 1));
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}
