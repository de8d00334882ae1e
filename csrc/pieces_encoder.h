// A text to ids: normalized, cut where no piece goes on, and each stretch looked up or encoded.

#pragma once

#include "pieces_memory.h"
#include "pieces_normalizer.h"
#include "pieces_vocabulary.h"

namespace megalm::pieces {

class Encoder {
 public:
  virtual ~Encoder() = default;
  // the ids of a text, to be read before the next call
  virtual std::pair<const int32_t*, size_t> encode(std::string_view text) = 0;
};

// `Algorithm`: Bpe or Unigram.
template <class Algorithm>
class StretchEncoder : public Encoder {
 public:
  StretchEncoder(const Spec& spec, const std::vector<Piece>& pieces, int32_t unknown, std::vector<int32_t> byte_ids)
      : normalizer_(spec, symbols_of(pieces)),
        vocabulary_(pieces, normalizer_.blank(), unknown, std::move(byte_ids)),
        algorithm_(pieces, vocabulary_) {}

  std::pair<const int32_t*, size_t> encode(std::string_view text) override {
    const std::string_view normal = normalizer_(text);
    if (ids_.size() < normal.size() + kRoom) ids_.resize(normal.size() + normal.size() / 2 + kRoom);  // at most one a byte
    end_ = ids_.data();
    algorithm_.begin();
    size_t start = 0;
    for (const size_t blank : normalizer_.blanks()) {
      const size_t cut = cut_at(normal, blank);
      if (cut > start) encode_word(normal.substr(start, cut - start)), start = cut;
    }
    if (start < normal.size()) encode_word(normal.substr(start));
    encode_pending();
    return {ids_.data(), size_t(end_ - ids_.data())};
  }

 private:
  static constexpr size_t kRoom = 64;
  static constexpr size_t kWholeWord = 32;  // bytes
  static constexpr size_t kAhead = 32;      // stretches

  static std::vector<std::string_view> symbols_of(const std::vector<Piece>& pieces) {
    std::vector<std::string_view> symbols;
    for (const Piece& piece : pieces)
      if (piece.user_defined) symbols.push_back(piece.text);
    return symbols;
  }

  // where a text can be cut before or after a blank; 0: it cannot
  size_t cut_at(std::string_view text, size_t blank) const {
    const size_t size = normalizer_.blank().size(), after = blank + size;
    if (vocabulary_.cuts_before_blanks()) return blank >= size && is_blank(text, blank - size) ? 0 : blank;
    return vocabulary_.cuts_after_blanks() && !is_blank(text, after) ? after : 0;
  }

  // read where four bytes can be, after the text as well
  bool is_blank(std::string_view text, size_t at) const {
    const char* sign = text.data() + at;
    return normalizer_.blank().size() == 1 ? *sign == ' ' : !std::memcmp(sign, kLowBlock.data(), kLowBlock.size());
  }

  void encode_word(std::string_view word) {
    if (word.size() <= kWholeWord) return encode_stretch(word);
    uint32_t before = 0;
    size_t start = 0;
    for (size_t at = 0, bytes; at < word.size(); at += bytes) {
      bytes = character_bytes(word[at]);
      const uint32_t character = character_of_four(&word[at], bytes);
      if (at > start && !vocabulary_.goes_on(before, character)) encode_stretch(word.substr(start, at - start)), start = at;
      before = character;
    }
    encode_stretch(word.substr(start));
  }

  void encode_stretch(std::string_view text) {
    if (text.size() > Memory::kLongest) {
      encode_pending();
      algorithm_.encode(text, &symbols_);
      return write(symbols_.data(), symbols_.size());
    }
    if (text.size() == character_bytes(text[0])) {
      pending_[num_pending_].text = text;
    } else {
      memory_.make_key(text, &pending_[num_pending_]);
    }
    if (++num_pending_ == kAhead) encode_pending();
  }

  // what comes from memory while later stretches are looked for
  void encode_pending() {
    for (size_t i = 0; i < num_pending_; ++i) {
      const std::string_view text = pending_[i].text;
      text.size() == character_bytes(text[0]) ? encode_character(text) : encode_known(pending_[i]);
    }
    num_pending_ = 0;
  }

  void encode_character(std::string_view text) {
    const int32_t symbol = vocabulary_.alone(character_of_four(text.data(), text.size()));
    algorithm_.pass(&symbol, 1);
    write(&symbol, 1);
  }

  void encode_known(const Memory::Key& key) {
    const size_t at = memory_.find(key);
    if (at != Memory::kNowhere && algorithm_.holds(memory_[at])) return write(at);
    const float limit = algorithm_.encode(key.text, &symbols_);
    const bool unknown = std::any_of(symbols_.begin(), symbols_.end(), [](int32_t symbol) { return symbol < 0; });
    if (limit >= 0) memory_.add(key, symbols_.data(), symbols_.size(), unknown, limit);
    write(symbols_.data(), symbols_.size());
  }

  void write(size_t at) {
    const Remembered& known = memory_[at];
    if (!known.unknown) {
      const int32_t* start = end_;
      end_ = memory_.copy(at, end_);
      return algorithm_.pass(start, known.count);
    }
    int32_t symbols[Memory::kMostSymbols];
    memory_.copy(at, symbols);
    algorithm_.pass(symbols, known.count);
    write(symbols, known.count);
  }

  void write(const int32_t* symbols, size_t count) {
    for (size_t i = 0; i < count; ++i) {
      if (symbols[i] >= 0) {
        *end_++ = symbols[i];
      } else {
        end_ = vocabulary_.write_unknown(uint32_t(~symbols[i]), ids_.data(), end_);
      }
    }
  }

  Normalizer normalizer_;
  const Vocabulary vocabulary_;
  Algorithm algorithm_;
  Memory memory_;
  Memory::Key pending_[kAhead];
  size_t num_pending_ = 0;
  std::vector<int32_t> ids_, symbols_;
  int32_t* end_ = nullptr;
};

}  // namespace megalm::pieces
