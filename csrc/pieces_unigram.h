// The most probable pieces as by sentencepiece's unigram::Model (EncodeOptimized in unigram_model.cc, 0.2.2 and later).
//
// It adds float32 scores from the start of a text, so that which of two ways is better may depend on all that comes
// before: their scores, and sums nearly equal, are rounded at the magnitude of the sum so far. Where no piece goes on all
// ways meet, and what comes before is one number. With it each stretch is found exactly as there.
//
// Most stretches have one best way whatever comes before. With sums up to M, of n terms, float32 is off by at most
// n M / 2^24, so a way that is better by more than twice that in exact arithmetic wins. How much better it is at least is
// seen in the sums of the stretch alone, off by as much at most, with their own M. So a stretch is first encoded alone, and
// its result remembered with the largest magnitude before it for which it is certain.

#pragma once

#include <cmath>
#include <limits>

#include "pieces_memory.h"
#include "pieces_trie.h"
#include "pieces_vocabulary.h"

namespace megalm::pieces {

class Unigram {
 public:
  Unigram(const std::vector<Piece>& pieces, const Vocabulary&) {
    float smallest = std::numeric_limits<float>::max();
    for (const Piece& piece : pieces) {
      const float score = piece.user_defined ? float(0.1 * (int(piece.text.size()) - 1)) : piece.score;
      trie_.add(piece.characters, piece.id, score);
      if (piece.id >= int32_t(scores_.size())) scores_.resize(piece.id + 1);
      scores_[piece.id] = score;
      if (!piece.user_defined) smallest = std::min(smallest, score);
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
    float sum = sum_;
    for (size_t i = 0; i < count; ++i) {
      if (std::abs(sum) > kResetAbove) sum = 0;
      sum += score_of(symbols[i]);
    }
    sum_ = sum;
  }

  // The symbols of a stretch, before and after which no piece goes on; goes on after it. The largest magnitude of the sum
  // before with which it has these symbols; negative: not for certain, not even with this sum.
  float encode(std::string_view text, std::vector<int32_t>* symbols) {
    read(text);
    if (text.size() <= Memory::kLongest) {
      const float limit = encode_alone(symbols);
      if (std::abs(sum_) <= limit) return pass(symbols->data(), symbols->size()), limit;
    }
    encode_after(symbols);
    return -1;
  }

 private:
  static constexpr float kUnknownPenalty = 10, kResetAbove = 100000;
  static constexpr float kNever = -std::numeric_limits<float>::infinity();

  struct Node {
    float sum;        // of the best way to here
    float second;     // of the best of the others
    int32_t symbol;   // the last of the best way
    uint32_t length;  // of that symbol, in characters; 0: there is no way yet
  };

  void read(std::string_view text) {
    codes_.clear(), places_.clear();
    for (size_t at = 0, bytes; at < text.size(); at += bytes) {
      bytes = character_bytes(text[at]);
      codes_.push_back(character_of_four(&text[at], bytes));
      places_.push_back(trie_.place_of(codes_.back()));
    }
    nodes_.assign(codes_.size() + 1, {kNever, kNever, 0, 0});
    nodes_[0].sum = 0;
  }

  // `offer(next, symbol, score)` for every symbol that starts at a character
  template <class Function>
  void for_each_symbol(size_t at, const Function& offer) const {
    const Trie::Unit* units = trie_.units();
    const uint32_t* places = places_.data();
    const size_t count = places_.size();
    int32_t now = int32_t(places[at]);
    if (units[now].number < 0) offer(at + 1, ~int32_t(codes_[at]), unknown_score_);
    for (size_t next = at + 1;; ++next) {
      if (units[now].number >= 0) offer(next, units[now].number, units[now].score);
      if (next == count) return;
      const int32_t child = units[now].base + int32_t(places[next]);
      if (units[child].parent != now) return;
      now = child;
    }
  }

  // the symbols where nothing comes before, and up to which magnitude of the sum before they are certain
  float encode_alone(std::vector<int32_t>* symbols) {
    const double count = double(codes_.size()), within = count * largest_;
    if (within >= kResetAbove) return -1;
    Node* nodes = nodes_.data();
    for (size_t at = 0; at < codes_.size(); ++at) {
      const float sum = nodes[at].sum;
      for_each_symbol(at, [=](size_t next, int32_t symbol, float score) {
        Node& node = nodes[next];
        const float offered = sum + score;
        const bool better = offered > node.sum;
        node.second = std::max(node.second, std::min(node.sum, offered));
        node.sum = std::max(node.sum, offered);
        node.symbol = better ? symbol : node.symbol;
        node.length = better ? uint32_t(next - at) : node.length;
      });
    }
    const double gap = collect(symbols) - 2 * count * within / (1 << 24);
    return float(std::min(0.9 * gap * (1 << 23) / count, double(kResetAbove) - 1) - within);
  }

  // the symbols after all that came before
  void encode_after(std::vector<int32_t>* symbols) {
    nodes_.assign(nodes_.size(), {kNever, kNever, 0, 0});
    nodes_[0].sum = sum_;
    size_t furthest = 0;  // node that has a way
    Node* nodes = nodes_.data();
    for (size_t at = 0; at < codes_.size(); ++at) {
      if (std::abs(nodes[at].sum) > kResetAbove) reset(at, furthest);
      const float sum = nodes[at].sum;
      for_each_symbol(at, [=, &furthest](size_t next, int32_t symbol, float score) {
        const float offered = score + sum;
        if (!nodes[next].length || offered > nodes[next].sum) nodes[next] = {offered, kNever, symbol, uint32_t(next - at)};
        furthest = std::max(furthest, next);
      });
    }
    sum_ = nodes_.back().sum;
    collect(symbols);
  }

  // as sentencepiece keeps sums small: from here on they count from 0
  void reset(size_t at, size_t furthest) {
    const float before = nodes_[at].sum;
    for (size_t i = at; i <= furthest || i == at; ++i)
      if (i == at || nodes_[i].length) nodes_[i].sum -= before;
  }

  // the symbols of the best way, and by how much it is the best where that is least
  double collect(std::vector<int32_t>* symbols) const {
    double gap = std::numeric_limits<double>::infinity();
    symbols->clear();
    for (size_t at = codes_.size(); at > 0; at -= nodes_[at].length) {
      const Node& node = nodes_[at];
      symbols->push_back(node.symbol);
      gap = std::min(gap, double(node.sum) - node.second);
    }
    std::reverse(symbols->begin(), symbols->end());
    return gap;
  }

  float score_of(int32_t symbol) const { return symbol < 0 ? unknown_score_ : scores_[symbol]; }

  Trie trie_;
  std::vector<uint32_t> codes_, places_;  // of a stretch's characters
  std::vector<Node> nodes_;               // before each character and at the end
  std::vector<float> scores_;             // by id
  float unknown_score_, largest_, sum_ = 0;
};

}  // namespace megalm::pieces
