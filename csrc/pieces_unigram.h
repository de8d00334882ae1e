// The most probable pieces as by sentencepiece's unigram::Model (EncodeOptimized in unigram_model.cc, 0.2.2 and later).
//
// It adds float32 scores from the start of a text, so that which of two ways is better may depend on all that comes
// before: their scores, and sums nearly equal, are rounded at the magnitude of the sum so far. Where no piece goes on all
// ways meet, and what comes before is one number. With it each stretch is found exactly as there.
//
// A result is remembered with the largest magnitude before it for which it is certain: with sums up to M, of n terms,
// float32 is off by at most n M / 2^24, so a way that is better by more than twice that in exact arithmetic wins.

#pragma once

#include <cmath>
#include <limits>

#include "pieces_memory.h"
#include "pieces_vocabulary.h"

namespace megalm::pieces {

class Unigram {
 public:
  Unigram(const std::vector<Piece>& pieces, const Vocabulary&) {
    float smallest = std::numeric_limits<float>::max();
    for (const Piece& piece : pieces) {
      trie_.add(piece.characters, piece.id);
      if (piece.id >= int32_t(scores_.size())) scores_.resize(piece.id + 1);
      scores_[piece.id] = piece.user_defined ? float(0.1 * (int(piece.text.size()) - 1)) : piece.score;
      if (!piece.user_defined) smallest = std::min(smallest, piece.score);
    }
    trie_.finish();
    unknown_score_ = smallest - kUnknownPenalty;
    largest_ = std::abs(unknown_score_);
    for (const float score : scores_) largest_ = std::max(largest_, std::abs(score));
  }

  void begin() { sum_ = 0; }
  bool holds(const Remembered& known) const { return std::abs(sum_) <= known.limit; }

  // goes on after symbols that are those of the best way
  void pass(const int32_t* symbols, size_t count) {
    for (size_t i = 0; i < count; ++i) {
      if (std::abs(sum_) > kResetAbove) sum_ = 0;
      sum_ += score_of(symbols[i]);
    }
  }

  // The symbols of a stretch, before and after which no piece goes on; goes on after it. The largest magnitude of the sum
  // before with which it has these symbols; negative: not for certain, not even with this sum.
  float encode(std::string_view text, std::vector<int32_t>* symbols) {
    codes_.clear();
    read_characters(text, &codes_);
    const float before = sum_;
    nodes_.assign(codes_.size() + 1, {0, 0, 0});
    nodes_[0].sum = before;
    const bool measured = text.size() <= Memory::kLongest;
    gaps_.assign(measured ? nodes_.size() : 0, {});
    if (measured) gaps_[0].best = 0;
    furthest_ = 0;
    for (size_t at = 0; at < codes_.size(); ++at) measured ? extend<true>(at) : extend<false>(at);
    sum_ = nodes_.back().sum;
    symbols->clear();
    for (size_t at = codes_.size(); at > 0; at -= nodes_[at].length) symbols->push_back(nodes_[at].symbol);
    std::reverse(symbols->begin(), symbols->end());
    const float limit = measured ? certain_up_to(smallest_gap()) : -1;
    return std::abs(before) <= limit ? limit : -1;
  }

 private:
  static constexpr float kUnknownPenalty = 10, kResetAbove = 100000;
  static constexpr double kNever = -std::numeric_limits<double>::infinity();

  struct Node {
    float sum;  // of the best way to here
    int32_t symbol;
    uint32_t length;  // of the last symbol, in characters; 0: there is no way yet
  };

  struct Gap {
    double best = kNever, second = kNever, chosen = kNever;  // of all ways in exact arithmetic, and the one of `sum`

    void add(double exact, bool is_chosen) {
      chosen = is_chosen ? exact : chosen;
      second = std::max(second, std::min(best, exact));
      best = std::max(best, exact);
    }
  };

  // every symbol that starts at a character
  template <bool kMeasured>
  void extend(size_t at) {
    if (std::abs(nodes_[at].sum) > kResetAbove) reset(at);
    const size_t count = codes_.size();
    const uint32_t* codes = codes_.data();
    const float* scores = scores_.data();
    Node* nodes = nodes_.data();
    Gap* gaps = gaps_.data();
    const float sum = nodes[at].sum;
    const double exact = kMeasured ? gaps[at].best : 0;
    const auto offer = [=](size_t next, int32_t symbol, float score) {
      const float offered = score + sum;
      const bool better = !nodes[next].length || offered > nodes[next].sum;
      if (better) nodes[next] = {offered, symbol, uint32_t(next - at)};
      if (kMeasured) gaps[next].add(exact + score, better);
    };
    PairTable::Value node = trie_.first(codes[at]);
    const bool alone = node.second >= 0;
    if (!alone) offer(at + 1, ~int32_t(codes[at]), unknown_score_);
    size_t next = at + 1;
    for (; node.first >= 0; node = trie_.child(node.first, codes[next++])) {
      if (node.second >= 0) offer(next, node.second, scores[node.second]), furthest_ = std::max(furthest_, next);
      if (next == count || node.first == Trie::kLeaf) break;
    }
    furthest_ = std::max(furthest_, at + 1);
  }

  // as sentencepiece keeps sums small: from here on they count from 0
  void reset(size_t at) {
    const float before = nodes_[at].sum;
    for (size_t i = at; i <= furthest_ || i == at; ++i)
      if (i == at || nodes_[i].length) nodes_[i].sum -= before;
  }

  // by how much the best way is better, in exact arithmetic, where it is least; negative: another one is the best
  double smallest_gap() const {
    double smallest = std::numeric_limits<double>::infinity();
    for (size_t at = codes_.size(); at > 0; at -= nodes_[at].length) {
      const Gap& gap = gaps_[at];
      smallest = std::min(smallest, gap.chosen < gap.best ? -1 : gap.best - gap.second);
    }
    return smallest;
  }

  float certain_up_to(double gap) const {
    const double count = double(codes_.size()), within = count * largest_;
    return float(std::min(0.9 * gap * (1 << 23) / count, double(kResetAbove) - 1) - within);
  }

  float score_of(int32_t symbol) const { return symbol < 0 ? unknown_score_ : scores_[symbol]; }

  Trie trie_;
  std::vector<uint32_t> codes_;
  std::vector<Node> nodes_;  // before each character of a stretch and at its end
  std::vector<Gap> gaps_;
  size_t furthest_ = 0;  // node that has a way
  std::vector<float> scores_;  // by id
  float unknown_score_, largest_, sum_ = 0;
};

}  // namespace megalm::pieces
