// Byte-pair encoding as by sentencepiece's bpe::Model (bpe_model.cc): of all adjacent symbols that form a piece, the pair
// whose piece has the highest score is merged, the leftmost of equals, until none is left.

#pragma once

#include <climits>

#include "pieces_memory.h"
#include "pieces_trie.h"
#include "pieces_vocabulary.h"

namespace megalm::pieces {

class Bpe {
 public:
  explicit Bpe(const std::vector<Piece>& pieces, const Vocabulary& vocabulary) : vocabulary_(vocabulary) {
    std::unordered_map<std::string_view, int32_t> symbols;
    for (const Piece& piece : pieces)
      if (!piece.user_defined) symbols.emplace(piece.text, piece.id);
    for (const Piece& piece : pieces) {
      if (piece.user_defined) {
        frozen_.add(piece.characters, piece.id);
        continue;
      }
      size_t cut = 0;
      for (size_t i = 1; i < piece.characters.size(); ++i) {
        cut += character_bytes(piece.text[cut]);
        const int32_t left = symbol_of(piece, 0, i, piece.text.substr(0, cut), symbols);
        const int32_t right = symbol_of(piece, i, piece.characters.size(), piece.text.substr(cut), symbols);
        if (left != kNone && right != kNone) merges_.insert(left, right, piece.id).second = order_of(piece.score);
      }
    }
    frozen_.finish();
  }

  void begin() {}
  bool holds(const Remembered&) const { return true; }
  void pass(const int32_t*, size_t) {}

  // The symbols of a stretch, before and after which no piece goes on. Not negative: it always has these.
  float encode(std::string_view text, std::vector<int32_t>* symbols) {
    split(text, symbols);
    symbols->size() <= kShort ? merge_few(symbols) : merge_many(symbols);
    return 0;
  }

 private:
  static constexpr size_t kShort = 40;
  static constexpr int32_t kNone = INT_MIN;  // no id, and no character either

  struct Link {
    int before, after;  // neighbours, -1 at the ends
    bool merged;        // into the one before
  };

  struct Candidate {
    int32_t order, left, right, left_symbol, right_symbol, merged;
    bool operator<(const Candidate& other) const {
      return order != other.order ? order < other.order : left > other.left;
    }
  };

  // floats as integers in the same order
  static int32_t order_of(float score) {
    int32_t bits;
    std::memcpy(&bits, &score, 4);
    return bits < 0 ? bits ^ INT_MAX : bits;
  }

  int32_t symbol_of(const Piece& piece, size_t start, size_t stop, std::string_view text,
                    const std::unordered_map<std::string_view, int32_t>& symbols) const {
    const int32_t alone = vocabulary_.alone(piece.characters[start]);
    if (stop - start == 1 && alone < 0) return alone;
    const auto found = symbols.find(text);
    return found == symbols.end() ? kNone : found->second;
  }

  // characters, and the user-defined symbols, which are never merged
  void split(std::string_view text, std::vector<int32_t>* symbols) const {
    symbols->clear();
    for (size_t at = 0; at < text.size();) {
      const size_t bytes = character_bytes(text[at]);
      const uint32_t code = character_at(&text[at], bytes);
      size_t used = bytes;
      const int32_t id = frozen_.longest(text.substr(at), &used);
      symbols->push_back(id < 0 ? vocabulary_.alone(code) : id);
      at += used;
    }
  }

  void merge_few(std::vector<int32_t>* symbols) const {
    int32_t* own = symbols->data();
    size_t count = symbols->size();
    PairTable::Value merges[kShort];
    const auto look_up = [&](size_t i) {
      merges[i] = merges_.find(own[i], own[i + 1]);
      if (merges[i].first < 0) merges[i].second = INT_MIN;
    };
    for (size_t i = 0; i + 1 < count; ++i) look_up(i);
    while (count > 1) {
      size_t best = 0;
      for (size_t i = 1; i + 1 < count; ++i)
        if (merges[i].second > merges[best].second) best = i;
      if (merges[best].first < 0) break;
      own[best] = merges[best].first;
      --count;
      std::copy(own + best + 2, own + count + 1, own + best + 1);
      if (best + 2 < count + 1) std::copy(merges + best + 2, merges + count, merges + best + 1);
      if (best) look_up(best - 1);
      if (best + 1 < count) look_up(best);
    }
    symbols->resize(count);
  }

  void merge_many(std::vector<int32_t>* symbols) {
    const int count = int(symbols->size());
    links_.resize(count), candidates_.clear();
    for (int i = 0; i < count; ++i) links_[i] = {i - 1, i + 1 < count ? i + 1 : -1, false};
    for (int i = 0; i + 1 < count; ++i) offer(*symbols, i, i + 1);
    while (!candidates_.empty()) {
      const Candidate best = candidates_.front();
      std::pop_heap(candidates_.begin(), candidates_.end());
      candidates_.pop_back();
      Link &left = links_[best.left], &right = links_[best.right];
      if (left.merged || right.merged) continue;
      if ((*symbols)[best.left] != best.left_symbol || (*symbols)[best.right] != best.right_symbol) continue;
      (*symbols)[best.left] = best.merged;
      right.merged = true;
      left.after = right.after;
      if (left.after >= 0) links_[left.after].before = best.left;
      offer(*symbols, left.before, best.left);
      offer(*symbols, best.left, left.after);
    }
    size_t kept = 0;
    for (int i = 0; i >= 0; i = links_[i].after) (*symbols)[kept++] = (*symbols)[i];
    symbols->resize(kept);
  }

  void offer(const std::vector<int32_t>& symbols, int left, int right) {
    if (left < 0 || right < 0) return;
    const PairTable::Value merge = merges_.find(symbols[left], symbols[right]);
    if (merge.first < 0) return;
    candidates_.push_back({merge.second, left, right, symbols[left], symbols[right], merge.first});
    std::push_heap(candidates_.begin(), candidates_.end());
  }

  const Vocabulary& vocabulary_;
  Trie frozen_;
  PairTable merges_;  // by symbols: the piece that they form, and its score
  std::vector<Link> links_;
  std::vector<Candidate> candidates_;
};

}  // namespace megalm::pieces
