#include "mapped_ring.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <bit>

namespace moe_comm {
namespace {
constexpr size_t kWordsAt = 256;  // behind the words `taken` and `abort`, each in its own line
constexpr size_t kAbortAt = 128;

size_t whole_pages(size_t num_bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (num_bytes + page - 1) / page * page;
}

size_t times_at(const RingOptions& o) { return kWordsAt + o.num_words * sizeof(ArmedWord); }

size_t slots_at(const RingOptions& o) {
  return whole_pages(times_at(o) + o.num_times * sizeof(uint64_t));
}
}  // namespace

Result<std::shared_ptr<MappedRing>> MappedRing::create(const RingOptions& o) {
  const auto wrong = [](const std::string& text) { return Status(Code::kInvalid, text); };
  if (!std::has_single_bit(o.num_slots) || o.num_slots > 1u << 24) {
    return wrong("num_slots: expected a power of two, at most 2^24, got " +
                 std::to_string(o.num_slots));
  }
  if (o.num_words == 0 || o.num_words > 1u << 20)
    return wrong("num_words: expected 1 to 2^20, got " + std::to_string(o.num_words));
  if (o.num_times > 1u << 20)
    return wrong("num_times: expected at most 2^20, got " + std::to_string(o.num_times));
  if (!(o.timeout_s > 0 && o.timeout_s < 1e6))
    return wrong("timeout_s: expected more than 0, got " + std::to_string(o.timeout_s));
  if (!(o.silent_s > 0 && o.silent_s < 1e6))
    return wrong("silent_s: expected more than 0, got " + std::to_string(o.silent_s));
  if (o.first_ticket % (2ull * o.num_slots) != 0) {
    return wrong("first_ticket: expected a multiple of 2 * num_slots, got " +
                 std::to_string(o.first_ticket));
  }
  const size_t num_bytes = slots_at(o) + whole_pages(o.num_slots * sizeof(Command));
  // Shared, or a fork would give this process other pages than those the GPU has.
  void* address =
      mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED)
    return Status::from_errno("mmap of a ring of " + std::to_string(num_bytes) + " bytes");
  static_cast<RingControl*>(address)->taken_until = o.first_ticket;
  return std::shared_ptr<MappedRing>(new MappedRing(o, Mapping(address, num_bytes)));
}

MappedRing::MappedRing(const RingOptions& options, Mapping memory)
    : options_(options),
      memory_(std::move(memory)),
      control_(reinterpret_cast<RingControl*>(memory_.data())),
      abort_word_(reinterpret_cast<Counter*>(memory_.data() + kAbortAt)),
      words_(reinterpret_cast<ArmedWord*>(memory_.data() + kWordsAt)),
      times_(reinterpret_cast<uint64_t*>(memory_.data() + times_at(options))),
      slots_(reinterpret_cast<Command*>(memory_.data() + slots_at(options))),
      consumer_(control_, slots_, options.num_slots),
      is_armed_(options.num_words, 0) {
  static_assert(sizeof(RingControl) <= kAbortAt);
  armed_.reserve(options.num_words);
}

DeviceRing MappedRing::view(uint64_t* reserved, uint64_t* taken_seen) const {
  return {slots_,
          reserved,
          taken_seen,
          &control_->taken_until,
          abort_word_,
          options_.num_slots,
          static_cast<uint64_t>(options_.timeout_s * 1e9)};
}

// H5: what the proxy saw (bytes in host memory, by the transport's promise, H4) happens before the
// release store of `status`, and that before the one of `ended`. Bytes that a NIC wrote into a
// GPU's memory would need a flush of that GPU first: no window lies there yet.
void MappedRing::end(uint32_t word_idx, WaitStatus status) {
  ArmedWord& word = words_[word_idx];
  std::atomic_ref(word.status).store(status, std::memory_order_release);
  word_at(word.ended).store(1, std::memory_order_release);
  stats_.ended.fetch_add(1, std::memory_order_relaxed);
  if (status != kWaitOk) stats_.failed.fetch_add(1, std::memory_order_relaxed);
}

void MappedRing::fail(Status status) {
  fault_.raise(std::move(status));
  word_at(*abort_word_).store(1, std::memory_order_release);
  std::atomic_thread_fence(std::memory_order_seq_cst);  // pairs with the one in ring.cuh's arm
  for (const Armed& armed : armed_) {
    is_armed_[armed.arm.word_idx] = 0;
    end(armed.arm.word_idx, kWaitAborted);
  }
  armed_.clear();
  end_all();
}

// Also those of commands that are in the ring and will not be taken.
void MappedRing::end_all() {
  for (uint32_t i = 0; i < options_.num_words; ++i) {
    if (word_at(words_[i].ended).load(std::memory_order_relaxed) != 0) continue;
    std::atomic_ref(words_[i].status).store(kWaitAborted, std::memory_order_release);
    word_at(words_[i].ended).store(1, std::memory_order_release);
  }
}

}  // namespace moe_comm
