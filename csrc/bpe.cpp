// Byte-pair encoding with the pieces and scores of a sentencepiece model: the merges of its bpe::Model (bpe_model.cc),
// word by word, each word once. A library of its own, without torch; see megalm/kernels/bpe.py.
//
// Of all adjacent symbols that form a piece, the pair whose piece has the highest score is merged, the leftmost of
// equals, until none is left. Where no piece goes on behind a word (a blank, U+2581, after something else) no merge
// does either, so that the ids of a text are those of its words.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace {

constexpr std::string_view kBlank = "\xe2\x96\x81";
constexpr size_t kRemembered = 1 << 17;       // words
constexpr size_t kLongestRemembered = 64;     // bytes of one
constexpr size_t kRememberedBytes = 1 << 26;  // of all

size_t character_bytes(unsigned char first) {
  return first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
}

uint64_t hash_of(std::string_view word) {
  uint64_t state = word.size() * 0x9e3779b97f4a7c15u;
  for (size_t at = 0; at < word.size(); at += 8) {
    uint64_t part = 0;
    std::memcpy(&part, word.data() + at, std::min<size_t>(8, word.size() - at));
    state = (state ^ part) * 0xff51afd7ed558ccdu;
    state ^= state >> 32;
  }
  return state;
}

struct Hash {
  size_t operator()(std::string_view word) const { return hash_of(word); }
};

struct Symbol {
  int before, after;  // neighbours, -1 at the ends
  const char* start;
  uint32_t bytes;  // 0: merged into the one before
};

struct Merge {
  float score;
  int left, right;
  uint32_t bytes;
  bool operator<(const Merge& other) const {
    return score < other.score || (score == other.score && left > other.left);
  }
};

struct Known {
  uint64_t hash;
  uint32_t word, ids;  // where they are stored
  uint16_t bytes, count;
};

class Model {
 public:
  Model(const char* text, const int64_t* ends, const int32_t* ids, const float* scores, int64_t count,
        const int32_t* byte_ids, int32_t unknown)
      : text_(text, count ? ends[count - 1] : 0), byte_ids_(byte_ids, byte_ids + 256), unknown_(unknown),
        table_(2 * kRemembered) {
    pieces_.reserve(count);
    for (int64_t i = 0, start = 0; i < count; start = ends[i++])
      pieces_.emplace(std::string_view(text_).substr(start, ends[i] - start), Piece{ids[i], scores[i]});
  }

  int64_t encode(std::string_view text, int32_t* out) {
    int32_t* end = out;
    while (!text.empty()) {
      const std::string_view word = text.substr(0, word_bytes(text));
      text.remove_prefix(word.size());
      const int32_t* ids;
      size_t count;
      look_up(word, &ids, &count);
      // neighbouring unknown symbols are one, also across words
      if (count && end > out && ids[0] == unknown_ && end[-1] == unknown_) ++ids, --count;
      end = std::copy(ids, ids + count, end);
    }
    return end - out;
  }

 private:
  struct Piece {
    int32_t id;
    float score;
  };

  // blanks and what follows them, up to the next blank
  static size_t word_bytes(std::string_view text) {
    size_t at = 0;
    while (text.compare(at, kBlank.size(), kBlank) == 0) at += kBlank.size();
    const size_t found = text.find(kBlank, at);
    return found == std::string_view::npos ? text.size() : found;
  }

  void look_up(std::string_view word, const int32_t** ids, size_t* count) {
    if (word.size() > kLongestRemembered) {
      encode_word(word);
      *ids = found_.data(), *count = found_.size();
      return;
    }
    const uint64_t hash = hash_of(word);
    size_t slot = hash & (table_.size() - 1);
    for (; table_[slot].bytes; slot = (slot + 1) & (table_.size() - 1)) {
      const Known& known = table_[slot];
      if (known.hash == hash && std::string_view(words_.data() + known.word, known.bytes) == word) {
        *ids = ids_.data() + known.ids, *count = known.count;
        return;
      }
    }
    encode_word(word);
    if (++num_known_ > kRemembered || words_.size() + 4 * ids_.size() > kRememberedBytes) {
      std::fill(table_.begin(), table_.end(), Known{});
      words_.clear(), ids_.clear(), num_known_ = 1;
      slot = hash & (table_.size() - 1);
    }
    table_[slot] = {hash, uint32_t(words_.size()), uint32_t(ids_.size()), uint16_t(word.size()), uint16_t(found_.size())};
    words_.insert(words_.end(), word.begin(), word.end());
    ids_.insert(ids_.end(), found_.begin(), found_.end());
    *ids = found_.data(), *count = found_.size();
  }

  // the ids of a word, into found_
  void encode_word(std::string_view word) {
    symbols_.clear(), merges_.clear(), found_.clear();
    for (size_t at = 0; at < word.size();) {
      const size_t bytes = std::min(character_bytes(word[at]), word.size() - at);
      const int number = symbols_.size();
      symbols_.push_back({number - 1, number + 1, word.data() + at, uint32_t(bytes)});
      at += bytes;
    }
    if (!symbols_.empty()) symbols_.back().after = -1;
    for (size_t right = 1; right < symbols_.size(); ++right) offer(right - 1, right);
    while (!merges_.empty()) {
      const Merge best = merges_.front();
      std::pop_heap(merges_.begin(), merges_.end());
      merges_.pop_back();
      Symbol &left = symbols_[best.left], &right = symbols_[best.right];
      if (!left.bytes || !right.bytes || left.bytes + right.bytes != best.bytes) continue;  // merged otherwise
      left.bytes = best.bytes, right.bytes = 0;
      left.after = right.after;
      if (right.after >= 0) symbols_[right.after].before = best.left;
      offer(left.before, best.left);
      offer(best.left, left.after);
    }
    for (int at = symbols_.empty() ? -1 : 0; at >= 0; at = symbols_[at].after) emit(symbols_[at]);
  }

  void offer(int left, int right) {
    if (left < 0 || right < 0) return;
    const uint32_t bytes = symbols_[left].bytes + symbols_[right].bytes;
    const auto piece = pieces_.find({symbols_[left].start, bytes});
    if (piece == pieces_.end()) return;
    merges_.push_back({piece->second.score, left, right, bytes});
    std::push_heap(merges_.begin(), merges_.end());
  }

  void emit(const Symbol& symbol) {
    const auto piece = pieces_.find({symbol.start, symbol.bytes});
    if (piece != pieces_.end()) {
      found_.push_back(piece->second.id);
    } else if (byte_ids_[0] >= 0) {
      for (uint32_t i = 0; i < symbol.bytes; ++i) found_.push_back(byte_ids_[uint8_t(symbol.start[i])]);
    } else if (found_.empty() || found_.back() != unknown_) {
      found_.push_back(unknown_);
    }
  }

  const std::string text_;
  const std::vector<int32_t> byte_ids_;
  const int32_t unknown_;
  std::unordered_map<std::string_view, Piece, Hash> pieces_;
  std::vector<Known> table_;
  std::vector<char> words_;
  std::vector<int32_t> ids_, found_;
  std::vector<Symbol> symbols_;
  std::vector<Merge> merges_;
  size_t num_known_ = 0;
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Pieces lie end to end in `text`; `byte_ids` are -1 where a model has no bytes.
EXPORT void* megalm_bpe_new(const char* text, const int64_t* ends, const int32_t* ids, const float* scores,
                            int64_t count, const int32_t* byte_ids, int32_t unknown) {
  return new Model(text, ends, ids, scores, count, byte_ids, unknown);
}

EXPORT void megalm_bpe_delete(void* model) { delete static_cast<Model*>(model); }

// The ids of `count` texts, which lie end to end, into `out` (room for one a byte), their numbers into `lengths`.
EXPORT int64_t megalm_bpe_encode(void* model, const char* text, const int64_t* ends, int64_t count, int32_t* out,
                                 int64_t* lengths) {
  int64_t total = 0;
  for (int64_t i = 0, start = 0; i < count; start = ends[i++]) {
    lengths[i] = static_cast<Model*>(model)->encode({text + start, size_t(ends[i] - start)}, out + total);
    total += lengths[i];
  }
  return total;
}
