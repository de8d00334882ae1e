// Byte-pair encoding with the pieces and scores of a sentencepiece model: the merges of its bpe::Model (bpe_model.cc),
// stretch by stretch, each stretch once. A library of its own, without torch; see megalm/kernels/bpe.py.
//
// Of all adjacent symbols that form a piece, the pair whose piece has the highest score is merged, the leftmost of
// equals, until none is left. Between two characters that no piece has side by side nothing is ever merged: there a text
// is cut, and its ids are those of its stretches. So words are cut at their blanks, and most of a text without blanks
// after every character or two.
//
// Before that a text is normalized as by its Normalizer (normalizer.cc): from the left, the longest sequence that the
// model's table has at a place is replaced.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace {

constexpr std::string_view kBlank = "\xe2\x96\x81";
constexpr uint32_t kPairBits = 21;
constexpr size_t kRemembered = 1 << 17;       // stretches
constexpr size_t kLongestRemembered = 64;     // bytes of one
constexpr size_t kRememberedBytes = 1 << 26;  // of all

size_t character_bytes(unsigned char first) {
  return first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
}

// the character at the start of a text, which is `bytes` long
uint32_t character_at(const char* text, size_t bytes) {
  const auto byte = [text](size_t i) { return uint32_t(uint8_t(text[i])); };
  if (bytes == 1) return byte(0);
  if (bytes == 2) return (byte(0) & 0x1f) << 6 | (byte(1) & 0x3f);
  if (bytes == 3) return (byte(0) & 0x0f) << 12 | (byte(1) & 0x3f) << 6 | (byte(2) & 0x3f);
  return (byte(0) & 0x07) << 18 | (byte(1) & 0x3f) << 12 | (byte(2) & 0x3f) << 6 | (byte(3) & 0x3f);
}

uint32_t pair_of(uint32_t left, uint32_t right) {
  return (left * 0x9e3779b1u ^ right * 0x85ebca6bu) * 0xc2b2ae35u >> (32 - kPairBits);
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

class Normalizer {
 public:
  // `table`: u32 size of a trie, the trie (units of a Darts-clone double array), texts that end with NUL; or nothing
  Normalizer(std::string_view table, bool trims, bool prefix) : trims_(trims), prefix_(prefix) {
    if (table.empty()) return;
    uint32_t size;
    std::memcpy(&size, table.data(), 4);
    trie_.resize(size / 4);
    std::memcpy(trie_.data(), table.data() + 4, size);
    texts_ = table.substr(4 + size);
  }

  const std::string& normalize(std::string_view text) {
    out_.clear();
    for (size_t used; trims_ && !text.empty() && longest(text, &used) == " ";) text.remove_prefix(used);
    if (text.empty()) return out_;
    if (prefix_) out_ += kBlank;
    bool after_blank = trims_;
    while (!text.empty()) {
      size_t used;
      std::string_view part = longest(text, &used);
      text.remove_prefix(used);
      while (after_blank && !part.empty() && part[0] == ' ') part.remove_prefix(1);
      if (part.empty()) continue;
      for (const char byte : part) byte == ' ' ? out_ += kBlank : out_ += byte;
      after_blank = trims_ && part.back() == ' ';
    }
    while (trims_ && out_.ends_with(kBlank)) out_.resize(out_.size() - kBlank.size());
    return out_;
  }

 private:
  // what the longest sequence at the start of `text`, of `used` bytes, becomes; where there is none a character stays
  std::string_view longest(std::string_view text, size_t* used) const {
    *used = std::min(character_bytes(text[0]), text.size());
    if (trie_.empty()) return text.substr(0, *used);
    int64_t found = -1;
    uint32_t node = offset(trie_[0]);
    for (size_t at = 0; at < text.size(); ++at) {
      const uint32_t place = node ^ uint8_t(text[at]);
      if (place >= trie_.size() || (trie_[place] & 0x800000ffu) != uint8_t(text[at])) break;
      node = place ^ offset(trie_[place]);
      if (trie_[place] & 0x100 && node < trie_.size()) found = trie_[node] & 0x7fffffffu, *used = at + 1;
    }
    return found < 0 ? text.substr(0, *used) : std::string_view(texts_.c_str() + std::min<size_t>(found, texts_.size()));
  }

  static uint32_t offset(uint32_t unit) { return (unit >> 10) << ((unit & 0x200) >> 6); }

  const bool trims_, prefix_;
  std::vector<uint32_t> trie_;
  std::string texts_, out_;
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
        const int32_t* byte_ids, int32_t unknown, const Normalizer& normalizer)
      : normalizer_(normalizer), text_(text, count ? ends[count - 1] : 0), byte_ids_(byte_ids, byte_ids + 256), unknown_(unknown),
        pairs_(1u << kPairBits), alone_(0x110000, -1), table_(2 * kRemembered) {
    pieces_.reserve(count);
    for (int64_t i = 0, start = 0; i < count; start = ends[i++]) {
      const auto piece = std::string_view(text_).substr(start, ends[i] - start);
      pieces_.emplace(piece, Piece{ids[i], scores[i]});
      note_pairs(piece, ids[i]);
    }
  }

  // the ids of a text, to be read before the next call
  const std::vector<int32_t>& encode(std::string_view given) {
    const std::string_view text = normalizer_.normalize(given);
    encoded_.resize(text.size());  // every id stands for a byte at least
    int32_t *out = encoded_.data(), *end = out;
    uint32_t before = 0;
    size_t start = 0, bytes = 0;
    for (size_t at = 0; at < text.size(); at += bytes) {
      bytes = std::min(character_bytes(text[at]), text.size() - at);
      const uint32_t character = character_at(text.data() + at, bytes);
      if (at > start && !pairs_[pair_of(before, character)]) {
        end = append(text.substr(start, at - start), before, out, end);
        start = at;
      }
      before = character;
    }
    if (start < text.size()) end = append(text.substr(start), before, out, end);
    encoded_.resize(end - out);
    return encoded_;
  }

 private:
  struct Piece {
    int32_t id;
    float score;
  };

  void note_pairs(std::string_view piece, int32_t id) {
    uint32_t before = 0;
    for (size_t at = 0, bytes = 0; at < piece.size(); at += bytes) {
      bytes = std::min(character_bytes(piece[at]), piece.size() - at);
      const uint32_t character = character_at(piece.data() + at, bytes);
      if (at) pairs_[pair_of(before, character)] = true;
      if (bytes == piece.size()) alone_[character] = id;
      before = character;
    }
  }

  // adds the ids of a stretch, whose last character is `last`
  int32_t* append(std::string_view word, uint32_t last, const int32_t* out, int32_t* end) {
    if (word.size() == character_bytes(word[0]) && alone_[last] >= 0) {
      *end = alone_[last];
      return end + 1;
    }
    const int32_t* ids;
    size_t count;
    look_up(word, &ids, &count);
    // neighbouring unknown symbols are one, also across stretches
    if (count && end > out && ids[0] == unknown_ && end[-1] == unknown_) ++ids, --count;
    return std::copy(ids, ids + count, end);
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

  Normalizer normalizer_;
  const std::string text_;
  const std::vector<int32_t> byte_ids_;
  const int32_t unknown_;
  std::vector<bool> pairs_;     // by hash: characters that a piece has side by side
  std::vector<int32_t> alone_;  // ids of pieces of one character
  std::unordered_map<std::string_view, Piece, Hash> pieces_;
  std::vector<Known> table_;
  std::vector<char> words_;
  std::vector<int32_t> ids_, found_, encoded_;
  std::vector<Symbol> symbols_;
  std::vector<Merge> merges_;
  size_t num_known_ = 0;
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Pieces lie end to end in `text`; `byte_ids` are -1 where a model has no bytes; `table` is its precompiled_charsmap.
EXPORT void* megalm_bpe_new(const char* text, const int64_t* ends, const int32_t* ids, const float* scores,
                            int64_t count, const int32_t* byte_ids, int32_t unknown, const char* table,
                            int64_t table_bytes, int trims, int prefix) {
  const Normalizer normalizer({table, size_t(table_bytes)}, trims, prefix);
  return new Model(text, ends, ids, scores, count, byte_ids, unknown, normalizer);
}

EXPORT void megalm_bpe_delete(void* model) { delete static_cast<Model*>(model); }

// The ids of `count` texts, which lie end to end, into `out`, which has room for `room`, their numbers into `lengths`;
// the number of all ids, which is more than `room` where they were too many.
EXPORT int64_t megalm_bpe_encode(void* model, const char* text, const int64_t* ends, int64_t count, int32_t* out,
                                 int64_t room, int64_t* lengths) {
  int64_t total = 0;
  for (int64_t i = 0, start = 0; i < count; start = ends[i++]) {
    const auto& ids = static_cast<Model*>(model)->encode({text + start, size_t(ends[i] - start)});
    lengths[i] = ids.size();
    if (total + lengths[i] <= room) std::copy(ids.begin(), ids.end(), out + total);
    total += lengths[i];
  }
  return total;
}
