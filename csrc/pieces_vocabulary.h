// The pieces of a model, and where its texts can be cut.
//
// Between two characters that no piece has side by side no piece goes on: the ids of a text are those of what lies before
// and after such a place. So words are cut at their blanks, and most of a text without blanks after a character or two.

#pragma once

#include <stdexcept>
#include <unordered_map>

#include "pieces_text.h"

namespace megalm::pieces {

struct Piece {
  std::string_view text;
  int32_t id;
  float score;
  bool user_defined;
  std::vector<uint32_t> characters;
};

// In a sentence of symbols: the id of a piece, or ~character for one that no piece covers.
class Vocabulary {
 public:
  // `byte_ids`: of the 256 bytes, for characters that no piece covers; empty: these are `unknown`, neighbours together
  Vocabulary(const std::vector<Piece>& pieces, std::string_view blank, int32_t unknown, std::vector<int32_t> byte_ids)
      : byte_ids_(std::move(byte_ids)), unknown_(unknown), alone_(kCharacters), pairs_((1u << kPairBits) / 64) {
    std::vector<uint32_t> blanks;
    read_characters(blank, &blanks);
    for (uint32_t code = 0; code < kCharacters; ++code) alone_[code] = ~int32_t(code);
    for (const Piece& piece : pieces) {
      const std::vector<uint32_t>& text = piece.characters;
      if (text.size() == 1) alone_[text[0]] = piece.id;
      for (size_t i = 1; i < text.size(); ++i) {
        pairs_[place_of(text[i - 1], text[i]) / 64] |= uint64_t(1) << place_of(text[i - 1], text[i]) % 64;
        cuts_before_blanks_ &= text[i] != blanks[0] || text[i - 1] == blanks[0];
        cuts_after_blanks_ &= text[i] == blanks[0] || text[i - 1] != blanks[0];
      }
    }
  }

  int32_t alone(uint32_t character) const { return alone_[character]; }
  int32_t unknown() const { return unknown_; }

  // whether a piece may go on from one character to the next; sometimes although none does
  bool goes_on(uint32_t left, uint32_t right) const {
    const uint32_t place = place_of(left, right);
    return pairs_[place / 64] >> place % 64 & 1;
  }

  // whether no piece goes on from another character to a blank, and from a blank to another character
  bool cuts_before_blanks() const { return cuts_before_blanks_; }
  bool cuts_after_blanks() const { return cuts_after_blanks_; }

  // writes the ids of a character that no piece covers after those from `begin` to `end`; returns their end
  int32_t* write_unknown(uint32_t character, const int32_t* begin, int32_t* end) const {
    if (byte_ids_.empty()) {
      if (end == begin || end[-1] != unknown_) *end++ = unknown_;
      return end;
    }
    uint8_t bytes[4];
    const size_t count = write_character(character, bytes);
    for (size_t i = 0; i < count; ++i) *end++ = byte_ids_[bytes[i]];
    return end;
  }

 private:
  static constexpr int kPairBits = 21;

  static uint32_t place_of(uint32_t left, uint32_t right) {
    return (left * 0x9e3779b1u ^ right * 0x85ebca6bu) * 0xc2b2ae35u >> (32 - kPairBits);
  }

  const std::vector<int32_t> byte_ids_;
  const int32_t unknown_;
  std::vector<int32_t> alone_;
  std::vector<uint64_t> pairs_;  // by hash: characters that a piece has side by side
  bool cuts_before_blanks_ = true, cuts_after_blanks_ = true;
};

}  // namespace megalm::pieces
