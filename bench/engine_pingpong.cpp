// What does the engine take for a write with an immediate? bench_engine.py compiles this with csrc
// and compares it with fabric_floor.cpp, which does the same with nothing but libfabric.
//
//   engine_pingpong TRANSPORT INTERFACE LAYER [SECONDS]      INTERFACE: "-" for the transport's own
//   choice
//
// LAYER: transport  Transport::post_write and poll, both sides spinning: the backend alone
//        ring       what the exchange uses: command ring -> proxy -> counter word (16 B is its
//        least message) user       what TransferEngine uses: Proxy::submit and take_immediates cost
//        the backend again, in bursts of 16 B over 1, 8 and 64 connections: CPU time of a post, of
//        a completion memcpy     no peer: memcpy into a shared segment, the roof for shm (LAYER
//        alone matters)
// Methods: two processes. latency: ping-pong, half a round trip. bandwidth: 16 writes in flight,
// each with an immediate, from the first post to the last local completion. turnaround (ring): from
// push() to the sent counter, one at a time. commands (ring): how many the proxy takes from the
// ring, of a closed channel, which it then drops. idle (ring): CPU of a process whose connected
// proxy has nothing to do. One JSON line per figure; 10^9 bytes/s, payload only.
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine.hpp"

using namespace moe_comm;  // NOLINT: a program of one file

namespace {

constexpr size_t kMaxBytes = 32 << 20;
constexpr long kDepth = 16;
constexpr uint32_t kValue = 7;
constexpr Secret kSecret = 42;
constexpr double kLimit = 30;  // seconds until a wait is given up

[[noreturn]] void die(const std::string& text) {
  fprintf(stderr, "engine_pingpong: %s\n", text.c_str());
  _exit(1);
}
void check(const Status& status) {
  if (!status.ok()) die(status.text());
}
template <typename T>
T check(Result<T> result) {
  if (!result.ok()) die(result.status().text());
  return std::move(result.value());
}

double now_us() {
  return std::chrono::duration<double, std::micro>(Clock::now().time_since_epoch()).count();
}

struct Figures {
  const char *transport, *layer;
  void print(const char* what, size_t bytes, const std::string& values) const {
    printf(
        "{\"bench\": \"engine\", \"transport\": \"%s\", \"layer\": \"%s\", \"what\": \"%s\", "
        "\"bytes\": %zu, %s}\n",
        transport, layer, what, bytes, values.c_str());
    fflush(stdout);
  }
  void latency(size_t bytes, std::vector<double>& half) const {
    std::sort(half.begin(), half.end());
    char text[128];
    snprintf(text, sizeof text, "\"p50_us\": %.2f, \"p99_us\": %.2f, \"iterations\": %zu",
             half[half.size() / 2], half[half.size() * 99 / 100], half.size());
    print("latency", bytes, text);
  }
  void bandwidth(size_t bytes, long count, double us) const {
    char text[128];
    snprintf(text, sizeof text, "\"gb_per_s\": %.3f, \"writes_per_s\": %.0f",
             bytes * count / us * 1e-3, count / us * 1e6);
    print("bandwidth", bytes, text);
  }
};

struct Wire {  // to the other process, while connecting
  int fd;
  void put(std::span<const std::byte> bytes) {
    const uint64_t size = bytes.size();
    if (::write(fd, &size, sizeof size) < 0 || (size && ::write(fd, bytes.data(), size) < 0))
      die("wire");
  }
  std::vector<std::byte> get() {
    uint64_t size = 0;
    if (recv(fd, &size, sizeof size, MSG_WAITALL) != sizeof size) die("the other process ended");
    std::vector<std::byte> bytes(size);
    if (size && recv(fd, bytes.data(), size, MSG_WAITALL) < 0) die("wire");
    return bytes;
  }
  std::vector<std::byte> swap(std::span<const std::byte> bytes) {
    put(bytes);
    return get();
  }
  void meet() { swap({}); }
};

// One end of a connection to the other process. `sent` and `arrived` count what was seen to be
// complete.
class Layer {
 public:
  virtual ~Layer() = default;
  virtual void write(size_t bytes) = 0;
  virtual void until_sent(long count) = 0;     // of our writes
  virtual void until_arrived(long count) = 0;  // of the other's
  virtual size_t least_bytes() const { return 8; }
  virtual void progress() {}  // what no thread of its own does
  char* memory() { return reinterpret_cast<char*>(segment_.data()); }
  long posted() const { return posted_; }

 protected:
  SharedSegment segment_ = check(SharedSegment::create("engine_pingpong", kMaxBytes));
  MemoryRegion region_;
  RemoteRegion remote_;
  long posted_ = 0;
};

std::unique_ptr<Transport> open(const std::string& name, const std::string& interface) {
  if (name == "shm") return check(open_shm(kSecret));
  if (name.starts_with("verbs")) return check(open_verbs(kSecret, interface));
  return check(open_fabric(kSecret, name.substr(7), interface));
}

// Both are here; the other may need our polling until it is.
void meet_polling(Layer& layer, Wire& wire) {
  wire.put({});
  for (char byte; recv(wire.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0;) layer.progress();
  wire.get();
}

class TransportLayer final : public Layer {
 public:
  TransportLayer(const std::string& name, const std::string& interface, Wire& wire) {
    transport_ = open(name, interface);
    region_ = check(transport_->register_memory(segment_.bytes()));
    remote_ = check(parse_region(wire.swap(serialise(describe(region_)))));
    peer_ = check(transport_->connect(wire.swap(transport_->info().address)));
    while (!ready_) progress();
    meet_polling(*this, wire);
  }
  void write(size_t bytes) override {
    WriteRequest request;
    request.peer = peer_;
    request.local = &region_;
    request.remote = &remote_;
    request.num_bytes = bytes;
    request.has_immediate = true;
    request.immediate = Immediate::user(kValue);
    Status status = transport_->post_write(request);
    for (; status.code() == Code::kAgain; status = transport_->post_write(request)) progress();
    check(status);
    ++posted_;
  }
  void until_sent(long count) override {
    while (sent_ < count) progress();
  }
  void until_arrived(long count) override {
    while (arrived_ < count) progress();
  }
  void progress() override {
    const size_t n = transport_->poll(completions_, false);
    for (size_t i = 0; i < n; ++i) {
      check(completions_[i].status);
      switch (completions_[i].kind) {
        case Completion::Kind::kWriteDone:
          ++sent_;
          break;
        case Completion::Kind::kImmediate:
          ++arrived_;
          break;
        case Completion::Kind::kPeerReady:
          ready_ = true;
          break;
        case Completion::Kind::kPeerRefused:
        case Completion::Kind::kPeerLost:
          die("the peer is gone");
      }
    }
  }

 private:
  std::unique_ptr<Transport> transport_;
  PeerId peer_{};
  Completion completions_[64];
  bool ready_ = false;
  long sent_ = 0, arrived_ = 0;
};

class EngineLayer : public Layer {
 public:
  EngineLayer(const std::string& name, const std::string& interface, Wire& wire) {
    EngineOptions options;
    options.transport = name;
    options.interface = interface;
    options.secret = kSecret;
    engine_ = check(Engine::open(options));
    region_ = check(proxy().register_memory(segment_.bytes()));
    remote_ = check(parse_region(wire.swap(serialise(describe(region_)))));
    peer_ = check(proxy().connect(wire.swap(proxy().info().address)));
    check(engine_->wait_ready(peer_, kLimit));
  }
  ~EngineLayer() override {
    proxy().run([this] { region_ = MemoryRegion{}; });
  }

 protected:
  Proxy& proxy() { return engine_->proxy(); }
  std::unique_ptr<Engine> engine_;
  uint32_t peer_ = 0;
};

class UserLayer final : public EngineLayer {
 public:
  using EngineLayer::EngineLayer;
  void write(size_t bytes) override {
    operations_.push_back(
        proxy().submit({{peer_, &region_, 0, bytes, &remote_, 0, true, kValue}}, nullptr));
    ++posted_;
  }
  void until_sent(long count) override {
    for (; sent_ < count; ++sent_) {
      if (!proxy().wait(*operations_.front(), kLimit)) die("a write did not end");
      check(operations_.front()->status());
      operations_.pop_front();
    }
  }
  void until_arrived(long count) override {
    if (count > arrived_ &&
        !proxy().take_immediates(kValue, static_cast<uint64_t>(count - arrived_), kLimit)) {
      die("an immediate did not come");
    }
    arrived_ = std::max(arrived_, count);
  }

 private:
  std::deque<std::shared_ptr<Operation>> operations_;
  long sent_ = 0, arrived_ = 0;
};

// Connections to one process, written to in turn. The other process polls until the first is done.
class Cost {
 public:
  Cost(const std::string& name, const std::string& interface, Wire& wire)
      : wire_(wire), transport_(open(name, interface)) {
    region_ = check(transport_->register_memory(segment_.bytes()));
    remote_ = check(parse_region(wire.swap(serialise(describe(region_)))));
    address_ = wire.swap(transport_->info().address);
  }
  void poll_until_told() {
    for (char byte; recv(wire_.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0;) poll();
    wire_.get();
  }
  void done() { wire_.put({}); }
  void measure(size_t num_peers, double seconds, const Figures& figures);

 private:
  static constexpr long kBurst = 32;
  size_t poll() {
    const size_t n = transport_->poll(completions_, false);
    for (size_t i = 0; i < n; ++i) {
      check(completions_[i].status);
      ended_ += completions_[i].kind == Completion::Kind::kWriteDone;
      ready_ += completions_[i].kind == Completion::Kind::kPeerReady;
    }
    return n;
  }

  Wire& wire_;
  SharedSegment segment_ = check(SharedSegment::create("engine_pingpong", 1 << 20));
  std::unique_ptr<Transport> transport_;
  MemoryRegion region_;
  RemoteRegion remote_;
  Address address_;
  std::vector<PeerId> peers_;
  Completion completions_[64];
  long ended_ = 0;
  size_t ready_ = 0;
};

void Cost::measure(size_t num_peers, double seconds, const Figures& figures) {
  while (peers_.size() < num_peers) peers_.push_back(check(transport_->connect(address_)));
  while (ready_ < num_peers) poll();
  WriteRequest request;
  request.local = &region_;
  request.remote = &remote_;
  request.num_bytes = 16;
  request.has_immediate = true;
  request.immediate = Immediate::user(kValue);
  std::vector<double> post, take;  // ns for each write, of each burst
  long refused = 0, number = 0;
  for (const double begin = now_us(); now_us() - begin < seconds * 1e6;) {
    double in_polls = 0;
    const double start = now_us();
    double posted = 0;
    ended_ = 0;
    for (long i = 0; i < kBurst; ++number) {
      request.peer = peers_[static_cast<size_t>(number) % num_peers];
      request.following = static_cast<uint32_t>(kBurst - 1 - i);
      const Status status = transport_->post_write(request);
      if (status.ok()) {
        ++i;
        continue;
      }
      if (status.code() != Code::kAgain) check(status);
      ++refused;
      const double waiting = now_us();
      poll();
      in_polls += now_us() - waiting;
    }
    posted = now_us() - start - in_polls;
    double taking = 0;
    while (ended_ < kBurst) {  // polls that find nothing are the network's time, not ours
      const double before = now_us();
      if (poll() > 0) taking += now_us() - before;
    }
    post.push_back(posted * 1e3 / kBurst);
    take.push_back(taking * 1e3 / kBurst);
  }
  std::sort(post.begin(), post.end());
  std::sort(take.begin(), take.end());
  char text[192];
  snprintf(text, sizeof text,
           "\"peers\": %zu, \"post_ns\": %.1f, \"post_p99_ns\": %.1f, \"completion_ns\": %.1f, "
           "\"refused\": %ld, "
           "\"iterations\": %zu",
           num_peers, post[post.size() / 2], post[post.size() * 99 / 100], take[take.size() / 2],
           refused, post.size());
  figures.print("cost", 16, text);
}

// A row of immediates holds two epochs at a time: write i goes by channel i % (depth / 2), in its
// turn there.
class RingLayer final : public EngineLayer {
 public:
  static constexpr long kChannels = kDepth / kNumBanks;
  RingLayer(const std::string& name, const std::string& interface, Wire& wire)
      : EngineLayer(name, interface, wire) {
    uint32_t rows[kChannels];
    for (long c = 0; c < kChannels; ++c) {
      RowTarget target{{&arrived_[c][0], &arrived_[c][1]}, &bell_, "engine_pingpong"};
      rows[c] = check(proxy().open_row(std::move(target), kFirstEpoch));
    }
    const auto theirs = wire.swap(std::as_bytes(std::span(rows)));
    for (long c = 0; c < kChannels; ++c) {
      uint32_t row;
      std::memcpy(&row, theirs.data() + c * sizeof row, sizeof row);
      channels_[c] = check(proxy().open_channel(
          {peer_, &region_, remote_, row, {&sent_[c][0], &sent_[c][1]}, &bell_}));
    }
  }
  void write(size_t bytes) override {
    const auto [channel, epoch] = place(posted_);
    check(proxy().push({channels_[channel], static_cast<uint32_t>(epoch & 0xffff), 0, 0, bytes},
                       kLimit));
    ++posted_;
  }
  void until_sent(long count) override {  // each of our writes before `count`, in any order
    for (; seen_sent_ < count; ++seen_sent_) {
      const auto [channel, epoch] = place(seen_sent_);
      wait(sent_[channel][epoch % kNumBanks], (epoch - kFirstEpoch) / kNumBanks + 1);
    }
  }
  void until_arrived(long count) override {
    for (; seen_arrived_ < count; ++seen_arrived_) {
      const auto [channel, epoch] = place(seen_arrived_);
      wait(arrived_[channel][epoch % kNumBanks], epoch);
    }
  }
  size_t least_bytes() const override { return 16; }

  // How many commands a second go through the ring: those of a closed channel, which the proxy
  // takes and drops.
  double commands_per_s(double seconds) {
    const uint32_t closed =
        check(proxy().open_channel({peer_, &region_, remote_, 0, {nullptr, nullptr}, nullptr}));
    proxy().close_channel(closed);
    const uint64_t before = proxy().stats().commands.load();
    uint64_t pushed = 0;
    const double start = now_us();
    for (; now_us() - start < seconds * 1e6; pushed += 256) {
      for (int i = 0; i < 256; ++i) check(proxy().push({closed, 2, 0, 0, 16}, kLimit));
    }
    while (proxy().stats().commands.load() < before + pushed) sched_yield();
    return static_cast<double>(pushed) / (now_us() - start) * 1e6;
  }

 private:
  static constexpr uint64_t kFirstEpoch = 2;
  static std::pair<long, uint64_t> place(long number) {
    return {number % kChannels, kFirstEpoch + static_cast<uint64_t>(number / kChannels)};
  }
  void wait(Counter& word, uint64_t target) {  // as Exchange::wait does
    auto there = [&] { return word_at(word).load(std::memory_order_acquire) >= target; };
    while (!proxy().help(kLimit, there)) sleep_on(bell_, 1.0, there);
  }
  Doorbell bell_{};
  Counter arrived_[kChannels][kNumBanks] = {}, sent_[kChannels][kNumBanks] = {};
  uint32_t channels_[kChannels] = {};
  long seen_sent_ = 0, seen_arrived_ = 0;
};

// --- what is measured ----------------------------------------------------------------------------

// The first process decides when to stop; its last ping says so in its first byte.
void ping_pong(Layer& layer, bool first, size_t bytes, double seconds, long& expected,
               const Figures& figures) {
  std::vector<double> half;
  const double begin = now_us();
  constexpr int kWarm = 50;
  for (int round = 0;; ++round) {
    const double start = now_us();
    if (first) {
      const bool last = round > kWarm + 10 && (start - begin > seconds * 1e6 || round > 20000);
      layer.memory()[0] = last ? 1 : 0;
      layer.write(bytes);
      layer.until_arrived(++expected);
      if (round >= kWarm) half.push_back((now_us() - start) / 2);
      layer.until_sent(layer.posted());
      if (last) break;
    } else {
      layer.until_arrived(++expected);
      const bool last = layer.memory()[0] == 1;  // before our pong may change it
      layer.write(bytes);
      layer.until_sent(layer.posted());
      if (last) break;
    }
  }
  if (first) figures.latency(bytes, half);
}

void stream(Layer& layer, bool first, size_t bytes, double seconds, long& expected,
            const Figures& figures) {
  const long count = std::clamp<long>(static_cast<long>(seconds * 4e9 / static_cast<double>(bytes)),
                                      2 * kDepth, static_cast<long>(seconds * 40000));
  if (!first) {
    layer.until_arrived(expected += count);
    layer.write(layer.least_bytes());
    layer.until_sent(layer.posted());
    return;
  }
  const double start = now_us();
  for (long i = 0; i < count; ++i) {
    layer.until_sent(layer.posted() - kDepth + 1);
    layer.write(bytes);
  }
  layer.until_sent(layer.posted());
  figures.bandwidth(bytes, count, now_us() - start);
  layer.until_arrived(++expected);
}

void turnaround(Layer& layer, double seconds, const Figures& figures) {
  std::vector<double> times;
  for (const double begin = now_us(); now_us() - begin < seconds * 1e6;) {
    const double start = now_us();
    layer.write(layer.least_bytes());
    layer.until_sent(layer.posted());
    times.push_back(now_us() - start);
  }
  std::sort(times.begin(), times.end());
  char text[128];
  snprintf(text, sizeof text, "\"p50_us\": %.2f, \"p99_us\": %.2f, \"iterations\": %zu",
           times[times.size() / 2], times[times.size() * 99 / 100], times.size());
  figures.print("turnaround", layer.least_bytes(), text);
}

void idle(double seconds, const Figures& figures) {
  auto cpu_s = [] {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec +
           (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
  };
  usleep(200'000);
  const double start = cpu_s();
  usleep(static_cast<useconds_t>(seconds * 1e6));
  char text[64];
  snprintf(text, sizeof text, "\"cpu_percent\": %.3f", (cpu_s() - start) / seconds * 100);
  figures.print("idle", 0, text);
}

void copy_floor(double seconds, const Figures& figures) {
  auto segment = check(SharedSegment::create("engine_pingpong", kMaxBytes));
  std::vector<char> source(kMaxBytes, 1);
  std::memset(segment.data(), 1, kMaxBytes);
  for (const size_t bytes :
       {size_t{4096}, size_t{65536}, size_t{1} << 20, size_t{4} << 20, kMaxBytes}) {
    long count = 0;
    const double start = now_us();
    for (; now_us() - start < seconds * 5e5; ++count) {
      std::memcpy(segment.data(), source.data(), bytes);
      asm volatile("" ::: "memory");
    }
    figures.bandwidth(bytes, count, now_us() - start);
  }
}

int cost(const std::string& transport, const std::string& interface, Wire& wire, pid_t child,
         double seconds, const Figures& figures) {
  const bool first = child != 0;
  {
    Cost cost(transport, interface, wire);
    if (first) {
      for (const size_t num_peers : {1, 8, 64}) cost.measure(num_peers, seconds * 0.5, figures);
      cost.done();
    } else {
      cost.poll_until_told();
    }
    wire.meet();
  }
  if (!first) _exit(0);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) die("TRANSPORT INTERFACE LAYER [SECONDS]");
  const std::string transport = argv[1], interface = strcmp(argv[2], "-") == 0 ? "" : argv[2],
                    name = argv[3];
  const double seconds = argc > 4 ? atof(argv[4]) : 1.0;
  const Figures figures{argv[1], argv[3]};
  if (name == "memcpy") return copy_floor(seconds, figures), 0;
  int wires[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, wires) != 0) die("socketpair");
  const pid_t child = fork();
  const bool first = child != 0;
  close(wires[first ? 1 : 0]);
  Wire wire{wires[first ? 0 : 1]};
  if (name == "cost") return cost(transport, interface, wire, child, seconds, figures);
  std::unique_ptr<Layer> layer;
  if (name == "transport") layer = std::make_unique<TransportLayer>(transport, interface, wire);
  if (name == "ring") layer = std::make_unique<RingLayer>(transport, interface, wire);
  if (name == "user") layer = std::make_unique<UserLayer>(transport, interface, wire);
  if (!layer) die("LAYER: transport, ring, user, cost or memcpy");
  std::memset(layer->memory(), 0, kMaxBytes);
  wire.meet();
  long expected = 0;
  const size_t least = layer->least_bytes();
  for (const size_t bytes :
       {least, size_t{4096}, size_t{65536}, size_t{1} << 20, size_t{4} << 20, kMaxBytes}) {
    ping_pong(*layer, first, bytes, seconds * (bytes == least ? 1 : 0.3), expected, figures);
  }
  for (const size_t bytes :
       {size_t{4096}, size_t{65536}, size_t{1} << 20, size_t{4} << 20, kMaxBytes}) {
    stream(*layer, first, bytes, seconds, expected, figures);
  }
  meet_polling(*layer, wire);
  if (auto* ring = dynamic_cast<RingLayer*>(layer.get())) {
    if (first) turnaround(*ring, seconds * 0.5, figures);
    wire.meet();  // the other's rows take what came meanwhile
    if (first) {
      char text[64];
      snprintf(text, sizeof text, "\"commands_per_s\": %.0f", ring->commands_per_s(seconds * 0.5));
      figures.print("commands", 16, text);
      idle(2.0, figures);
    }
  }
  wire.meet();
  layer.reset();
  if (!first) _exit(0);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
